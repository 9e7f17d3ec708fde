"""The pictures: metrics at the highest sparsity (Fig. 3 of the paper), sparsity of every layer (Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.over_seeds import Figure
from benchmarks.tavlp.orderings import HEADLINES, headline_title
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.summary import Results, title
from benchmarks.tavlp.tasks import TASKS
from mfcompile.comparison_plot import COLOURS
from mfcompile.report_plot import FAINT, FURTHER_COLOURS, NAMED_COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_highest_sparsity(
    results: Results, families: Sequence[str], pruners: Sequence[str], sparsity: float, path: Path
) -> None:
    """Bars of every pruner, one panel for each family and task that has a cell there, with the dense model as a line.

    Args:
        results: where figures come from.
        families: rows of panels.
        pruners: bars, from top to bottom.
        sparsity: fraction removed.
        path: of the PNG, which carries no date.
    """
    from matplotlib import pyplot, rc_context

    def has_cell(task: str) -> bool:
        metric = next(iter(TASKS[task].metrics))
        return any(results.figure(family, task, name, sparsity, metric) for family in families for name in pruners)

    tasks = [task for task in TASKS if has_cell(task)] or list(TASKS)[:1]
    size = (4.2 * len(tasks) + 1.2, (0.19 * len(pruners) + 0.8) * len(families))
    with rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(families), len(tasks), figsize=size, squeeze=False, sharey=True, sharex="col", layout="constrained"
        )
        for row, family in zip(panels, families, strict=True):
            for axes, task in zip(row, tasks, strict=True):
                _bars(axes, results, family, task, pruners, sparsity)
        figure.savefig(path, dpi=160, metadata={"Software": None})
        pyplot.close(figure)


def _bars(axes: Axes, results: Results, family: str, task: str, pruners: Sequence[str], sparsity: float) -> None:
    metrics = HEADLINES[task]
    dense = Figure.of(list(results.values(family, task, "dense", 0.0, metrics).values()))
    if dense is not None:
        axes.axvline(dense.mean, color=FAINT, linewidth=1, linestyle="--")
    for index, pruner in enumerate(pruners):
        found = Figure.of(list(results.values(family, task, pruner, sparsity, metrics).values()))
        if found is not None:
            colour = FAINT if pruner == "random" else COLOURS[index % len(COLOURS)]
            axes.barh(index, found.mean, xerr=found.deviation, color=colour, height=0.75, capsize=2)
            end = found.mean + (found.deviation or 0)
            axes.annotate(
                f"{found.mean:.1f}",
                (end, index),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        else:
            axes.barh(index, 0.0)  # so that the axis begins at 0 without any bar as well
            axes.text(0, index, " no cell", va="center", color=FAINT, fontsize=6)
    axes.set_yticks(range(len(pruners)), [title(pruner) for pruner in pruners], fontsize=7)
    line = "" if dense is None else f"line: dense, {dense.mean:.1f}"
    axes.set_title(f"{family}, {task}: {headline_title(task)} at {100 * sparsity:.0f} %\n{line}", fontsize=8)
    axes.set_ylim(len(pruners) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_allocations(results: Results, families: Sequence[str], pruners: Sequence[str], sparsity: float, path: Path) -> None:
    """The sparsity of every layer, coloured by region: a row of panels for each family, a column for each pruner.

    Args:
        results: whose records of masks are drawn; a panel without one is empty.
        families, pruners: rows and columns.
        sparsity: fraction removed, drawn as a line.
        path: of the PNG, which carries no date.
    """
    from matplotlib import pyplot, rc_context

    with rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(families),
            len(pruners),
            figsize=(3.8 * len(pruners), 2.3 * len(families) + 0.4),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for row, family in zip(panels, families, strict=True):
            for axes, pruner in zip(row, pruners, strict=True):
                _layers(axes, results, family, pruner, sparsity)
            row[0].set_ylabel("removed, in %")
        figure.savefig(path, dpi=160, metadata={"Software": None})
        pyplot.close(figure)


def _layers(axes: Axes, results: Results, family: str, pruner: str, sparsity: float) -> None:
    axes.set_title(f"{family}: {title(pruner)}", fontsize=9)
    axes.set_xlabel("layer, in the order of the model")
    record = results.masks(family, PRUNERS[pruner], sparsity, 0)
    if record is None:
        return
    places = list(record["layer_sparsity"].items())
    further = iter(FURTHER_COLOURS)
    for region in dict.fromkeys(record["layer_region"].values()):
        colour = NAMED_COLOURS.get(region) or next(further)
        found = [(index, 100 * value) for index, (name, value) in enumerate(places) if record["layer_region"][name] == region]
        share = 100 * record["region_sparsity"][region]
        axes.plot(
            *zip(*found, strict=True), color=colour, marker="o", markersize=2.5, linewidth=1, label=f"{region} {share:.0f} %"
        )
    axes.axhline(100 * sparsity, color=FAINT, linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 103)
    axes.legend(fontsize=7, loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
