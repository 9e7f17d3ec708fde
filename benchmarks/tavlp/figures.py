"""The pictures: metrics at the highest sparsity (Fig. 3 of the paper), sparsity of every layer (Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Bars of every pruner, one panel for each family and task, with the dense model as a line.

    Args:
        results: where figures come from.
        families: rows of panels.
        pruners: bars.
        sparsity: fraction removed.
        path: of the PNG, which carries no date.
    """
    from matplotlib import pyplot, rc_context

    with rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(families),
            len(TASKS),
            figsize=(3.6 * len(TASKS), 2.5 * len(families) + 0.6),
            squeeze=False,
            layout="constrained",
        )
        for row, family in zip(panels, families, strict=True):
            for axes, task in zip(row, TASKS, strict=True):
                _bars(axes, results, family, task, pruners, sparsity)
        figure.savefig(path, dpi=160, metadata={"Software": None})
        pyplot.close(figure)


def _bars(axes: Axes, results: Results, family: str, task: str, pruners: Sequence[str], sparsity: float) -> None:
    metric = next(iter(TASKS[task].metrics))
    dense = results.figure(family, task, "dense", 0.0, metric)
    if dense is not None:
        axes.axhline(dense.mean, color=FAINT, linewidth=1, linestyle="--")
        axes.text(len(pruners) - 0.5, dense.mean, "dense", color=FAINT, fontsize=7, ha="right", va="bottom")
    for index, pruner in enumerate(pruners):
        found = results.figure(family, task, pruner, sparsity, metric)
        if found is not None:
            colour = FAINT if pruner == "random" else COLOURS[index % len(COLOURS)]
            axes.bar(index, found.mean, yerr=found.deviation, color=colour, width=0.75, capsize=2)
        else:
            axes.text(index, 0, "no cell", rotation=90, ha="center", va="bottom", color=FAINT, fontsize=6)
    axes.set_xticks(range(len(pruners)), [title(pruner) for pruner in pruners], rotation=50, ha="right", fontsize=7)
    axes.set_title(f"{family}, {task}: {TASKS[task].metrics[metric]} at {100 * sparsity:.0f} %", fontsize=8)
    axes.set_xlim(-0.6, len(pruners) - 0.4)
    axes.set_ylim(bottom=0)
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
