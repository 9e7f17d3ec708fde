"""The picture of a benchmark: how much faster or slower every form is, and what it takes of disk, memory and time to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mfcompile.comparison_plot import COLOURS
from mfcompile.report_plot import FAINT, INK, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = (
    ("size_bytes", "file (MB)", 1e6),
    ("resident_bytes", "memory held (MB)", 1e6),
    ("creation_ms", "time to load (ms)", 1.0),
)
"""Key in the JSON, title and unit of the panels on the right."""

BAR, GROUP_GAP = 0.30, 0.45
"""Width of a bar and of the gap between groups, in the units of the x axis."""

LEAST_PANEL, SIDE, GAP, LEAST_WIDTH = 3.6, 2.4, 0.7, 9.2
"""Inches: the panels of speed, those of costs, what is between them, and the whole."""


@dataclass(frozen=True)
class Bar:
    """One form at one size.

    Attributes:
        variant: its name.
        position: x of the bar.
        speedup, low, high: median and quartiles of baseline time / own time.
    """

    variant: str
    position: float
    speedup: float
    low: float
    high: float


def plot_benchmark(document: Mapping[str, Any], directory: Path | str, *, stem: str = "bench") -> tuple[Path, Path]:
    """Draw a benchmark as ``bench.png`` and ``bench.svg``.

    The files carry no date: the same benchmark gives the same bytes.

    Args:
        document: what ``Benchmark.as_dict`` returned.
        directory: where the two files go.
        stem: their name without the ending.
    """
    return save_picture(lambda: _draw(document), Path(directory) / stem)


def colours(document: Mapping[str, Any]) -> dict[str, str]:
    """Form -> colour; the baseline is grey."""
    others = [item["name"] for item in document["variants"] if item["name"] != document["baseline"]]
    found = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}
    return {document["baseline"]: FAINT, **found}


def bars(document: Mapping[str, Any], threads: int) -> tuple[tuple[Bar, ...], tuple[float, ...]]:
    """The bars of one panel, and the middle of every group.

    Args:
        document: what ``Benchmark.as_dict`` returned.
        threads: of the panel.
    """
    baseline = document["baseline"]
    names = [
        item["name"]
        for item in document["variants"]
        if item["name"] != baseline and any(row["variant"] == item["name"] for row in document["timings"])
    ]
    width = max(len(names), 1) * BAR + GROUP_GAP
    found, middles = [], []
    for size in range(len(document["sizes"])):
        middles.append(size * width)
        for index, name in enumerate(names):
            row = _row(document, name, size, threads)
            if row is not None and row["speedup"] is not None:
                position = size * width + (index - (len(names) - 1) / 2) * BAR
                found.append(Bar(name, position, row["speedup"], row["speedup_low"], row["speedup_high"]))
    return tuple(found), tuple(middles)


def _row(document: Mapping[str, Any], variant: str, size: int, threads: int) -> Mapping[str, Any] | None:
    rows: Sequence[Mapping[str, Any]] = document["timings"]
    key = (variant, size, threads)
    return next((row for row in rows if (row["variant"], row["size"], row["threads"]) == key), None)


def _draw(document: Mapping[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threads = list(dict.fromkeys(row["threads"] for row in document["timings"]))
    groups, middles = bars(document, threads[0]) if threads else ((), ())
    names = len({bar.variant for bar in groups}) or 1
    panel = max(LEAST_PANEL, 1.25 * len(middles) * (names * BAR + GROUP_GAP))
    rows = max(len(threads), 1)
    top, bottom, left = 1.35, 0.55, 0.7
    height_each = 2.5 if rows > 1 else 3.4
    names_width = 0.085 * max(len(item["name"]) for item in document["variants"])
    width = max(left + panel + GAP + names_width + SIDE + 0.3, LEAST_WIDTH)
    panel = width - (left + GAP + names_width + SIDE + 0.3)
    height = top + bottom + rows * height_each + (rows - 1) * 0.62
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    for index, count in enumerate(threads):
        place = bottom + (rows - 1 - index) * (height_each + 0.62)
        axes = figure.add_axes((left / width, place / height, panel / width, height_each / height))
        _draw_speedups(axes, document, count)
    space = (height - top - bottom - 2 * 0.52) / 3
    for index, (key, title, unit) in enumerate(COSTS):
        place = bottom + (2 - index) * (space + 0.52)
        box = ((left + panel + GAP + names_width) / width, place / height, SIDE / width, space / height)
        _draw_cost(figure.add_axes(box), document, key, title, unit)
    _draw_titles(figure, document, left / width, height)
    _draw_legend(figure, document, left / width, 1 - 0.80 / height)
    return figure


def _draw_speedups(axes: Axes, document: Mapping[str, Any], threads: int) -> None:
    """Speedup of every form at every size, as bars from 1, with their quartiles."""
    found, middles = bars(document, threads)
    shades, baseline = colours(document), document["baseline"]
    for bar in found:
        axes.bar(bar.position, bar.speedup - 1, bottom=1, width=0.86 * BAR, color=shades[bar.variant], zorder=2)
        spread = [[bar.speedup - bar.low], [bar.high - bar.speedup]]
        axes.errorbar(bar.position, bar.speedup, yerr=spread, color=INK, linewidth=0.9, capsize=2.2, zorder=3)
        above = bar.speedup >= 1
        axes.annotate(
            f"{bar.speedup:.2f}", (bar.position, max(bar.high, 1) if above else min(bar.low, 1)), (0, 3 if above else -3),
            textcoords="offset points", ha="center", va="bottom" if above else "top", fontsize=7.5, color=INK,
        )  # fmt: skip
    axes.axhline(1, color=INK, linewidth=1.0, zorder=2.5)
    high = max([bar.high for bar in found] + [1.2])
    low = min([bar.low for bar in found] + [0.9])
    reach = high - min(low, 1)
    axes.set_ylim(min(low, 1) - 0.12 * reach, high + 0.12 * reach)
    sizes = [size["label"].replace(", ", "\n") for size in document["sizes"]]
    axes.set_xticks(middles, sizes)
    edge = max(0.5, (middles[1] - middles[0]) / 2 if len(middles) > 1 else 0.9)
    axes.set_xlim(middles[0] - edge, middles[-1] + edge)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"speed ({baseline} = 1)")
    axes.set_title(f"{threads} thread{'' if threads == 1 else 's'}", fontsize=9.5, loc="left")
    _clean(axes, "y")


def _draw_cost(axes: Axes, document: Mapping[str, Any], key: str, title: str, unit: float) -> None:
    """One bar per form, with its figure; a form without one is said to have none."""
    shades = colours(document)
    variants = list(document["variants"])
    axes.set_yticks(range(len(variants)), [item["name"] for item in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    largest = max([item.get(key) or 0 for item in variants] + [1e-9])
    for index, item in enumerate(variants):
        value = item.get(key)
        if value is None:
            axes.text(0.01 * largest / unit, index, "not measured", va="center", color=FAINT, fontsize=7.5)
            continue
        axes.barh(index, value / unit, height=0.7, color=shades[item["name"]], zorder=2)
        axes.text((value + 0.02 * largest) / unit, index, _figure(value / unit), va="center", fontsize=7.5, color=INK, zorder=3)
    axes.set_xlim(0, 1.22 * largest / unit)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(axis="y", length=0)
    _clean(axes, "x")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _clean(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.grid(visible=True, axis=grid, color=FAINT, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_titles(figure: Figure, document: Mapping[str, Any], left: float, height: float) -> None:
    model, machine = document["model"], document["machine"]
    sparsity = "" if "sparsity" not in model else f", {100 * model['sparsity']:.4g} % of its prunable weights removed"
    figure.text(left, 1 - 0.28 / height, f"{model['name']} on this machine{sparsity}", fontsize=13, fontweight="bold")
    load = "" if machine["load_average"] is None else f", load average {machine['load_average']:g}"
    figure.text(
        left,
        1 - 0.50 / height,
        f"{machine['processor']}, {machine['cores']} cores{load}; onnxruntime {machine['onnxruntime']}, sparse runtime: "
        f"{machine['sparse_runtime'] or 'none'}. Medians of rounds in turns, with quartiles",
        color=INK,
    )


def _draw_legend(figure: Figure, document: Mapping[str, Any], left: float, place: float) -> None:
    from matplotlib.patches import Patch

    shades = colours(document)
    handles = [Patch(color=shades[item["name"]], label=item["name"]) for item in document["variants"]]
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(left, place), ncols=len(handles), frameon=False, borderaxespad=0,
        borderpad=0, handlelength=1.2, columnspacing=1.5,
    )  # fmt: skip
