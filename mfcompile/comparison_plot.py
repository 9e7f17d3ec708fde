"""The picture of a comparison: how well every pruner does as sparsity grows, and how far their masks agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.report_plot import FAINT, INK, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2a78b5", "#e08e0b", "#1f9d6b", "#b5508f", "#c2452d", "#6f5bb5", "#8a6d3b", "#2ba6b8", "#7a9a1a", "#d1648a")
MARKERS = "osD^v<>ph*"

LEGEND_ROW = 0.19
"""Inches of one row of the legend."""

MOST_NUMBERS = 16
"""Above this many pruners the numbers in the cells would be too small to read."""


@dataclass(frozen=True)
class Line:
    """One pruner.

    Attributes:
        label: its name.
        colour, marker: of its line; the floor is grey.
        is_floor: what every other pruner must beat.
        points: (sparsity achieved in percent, output error, metric), by rising sparsity; NaN where there is none.
    """

    label: str
    colour: str
    marker: str
    is_floor: bool
    points: tuple[tuple[float, float, float], ...]


def plot_comparison(document: Mapping[str, Any], directory: Path | str, *, stem: str = "compare") -> tuple[Path, Path]:
    """Draw a comparison as ``compare.png`` and ``compare.svg``.

    The files carry no date: the same comparison gives the same bytes.

    Args:
        document: what ``Comparison.as_dict`` returned.
        directory: where the two files go.
        stem: their name without the ending.
    """
    return save_picture(lambda: _draw(document), Path(directory) / stem)


def lines(document: Mapping[str, Any]) -> tuple[Line, ...]:
    """The lines in the order of the pruners, each with a colour and a marker of its own."""
    metric = (document["metric"] or {}).get("name")
    found = []
    for index, pruner in enumerate(document["pruners"]):
        rows = [row for row in document["rows"] if row["pruner"] == pruner["label"]]
        points = sorted(
            (100 * row["achieved"], _number(row["output_error"]), _number(row["metrics"].get(metric))) for row in rows
        )
        colour = FAINT if pruner["is_floor"] else COLOURS[index % len(COLOURS)]
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        found.append(Line(pruner["label"], colour, marker, pruner["is_floor"], tuple(points)))
    return tuple(found)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _draw(document: Mapping[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn, metric = lines(document), document["metric"]
    matrix = document["agreement"][document["middle"]]
    columns = max(1, int(5.6 / (0.55 + 0.075 * max(len(line.label) for line in drawn))))
    legend = LEGEND_ROW * math.ceil((len(drawn) + (metric is not None)) / columns)
    names = 0.075 * max(len(label) for label in matrix["pruners"])
    cells = min(max(2.6, 0.5 * len(matrix["pruners"])), 6.0)
    top, bottom, left, gap = 0.8, 0.65 + legend, 0.75, 0.75
    middle = max(cells + 0.72 * names - legend, 5.0 if metric else 3.4)
    width, height = left + 5.6 + gap + names + cells + 0.3, top + middle + bottom
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def place(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x / width, y / height, w / width, h / height

    if metric:
        share = 0.58 * middle
        upper = figure.add_axes(place(left, bottom + middle - share, 5.6, share))
        lower = figure.add_axes(place(left, bottom, 5.6, middle - share - 0.25), sharex=upper)
        _draw_lines(upper, drawn, which=2)
        _frame_metric(upper, document)
        _draw_lines(lower, drawn, which=1)
    else:
        lower = figure.add_axes(place(left, bottom, 5.6, middle))
        _draw_lines(lower, drawn, which=1)
    lower.set_ylabel("output error (relative L2)" if _is_relative(document) else "outputs that differ")
    lower.set_xlabel("sparsity: weights removed (%)")
    lower.set_ylim(bottom=0)
    handles, labels = (upper if metric else lower).get_legend_handles_labels()
    lower.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0, -0.46 / (lower.get_position().height * height)), ncols=columns,
        frameon=False, borderaxespad=0, handlelength=2.2, columnspacing=1.4, labelspacing=0.35,
    )  # fmt: skip
    heat = figure.add_axes(place(width - 0.3 - cells, height - top - cells, cells, cells))
    _draw_agreement(heat, matrix)
    _draw_titles(figure, document, left / width, 1 - 0.28 / height, 1 - 0.50 / height)
    return figure


def _is_relative(document: Mapping[str, Any]) -> bool:
    return any(item["kind"] == "float" for item in document["outputs"])


def _draw_lines(axes: Axes, drawn: Sequence[Line], which: int) -> None:
    """One line per pruner over sparsity: of the output error (1) or of the metric (2)."""
    for line in drawn:
        points = [point for point in line.points if not math.isnan(point[which])]
        axes.plot(
            [point[0] for point in points], [point[which] for point in points], color=line.colour, marker=line.marker,
            markersize=6, markeredgecolor="white", markeredgewidth=0.6, linewidth=1.6,
            linestyle=(0, (2, 2)) if line.is_floor else "-", label=line.label, zorder=2 if line.is_floor else 3,
        )  # fmt: skip
    ticks = sorted({round(point[0], 1) for line in drawn for point in line.points})
    if ticks and (ticks[-1] - ticks[0]) / max(len(ticks) - 1, 1) > 2:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    if ticks and ticks[-1] - ticks[0] < 1:
        axes.set_xlim(ticks[0] - 5, ticks[-1] + 5)
    axes.grid(visible=True, color=FAINT, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _frame_metric(axes: Axes, document: Mapping[str, Any]) -> None:
    metric = document["metric"]
    dense = _number(document["dense"]["metrics"].get(metric["name"]))
    if not math.isnan(dense):
        axes.axhline(dense, color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label=f"dense: {dense:.4g}", zorder=1)
    axes.set_ylabel(f"{metric['name']} ({'higher' if metric['is_higher_better'] else 'lower'} is better)")
    axes.tick_params(axis="x", labelbottom=False)


def _draw_agreement(axes: Axes, matrix: Mapping[str, Any]) -> None:
    """Cohen's kappa of every pair; below 0, less than chance gives, is drawn as 0."""
    labels, values = matrix["pruners"], matrix["kappa"]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest", aspect="equal")
    size = min(8.5, 62 / max(len(labels), 1))
    axes.set_yticks(range(len(labels)), labels, fontsize=max(size, 7))
    axes.set_xticks(range(len(labels)), labels, fontsize=max(size, 7), rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if row != column and len(labels) <= MOST_NUMBERS:
                shown = f"{abs(value) if round(value, 2) == 0 else value:.2f}"
                axes.text(
                    column, row, shown, ha="center", va="center", fontsize=size, color="white" if value > 0.62 else INK
                )  # fmt: skip
    given = matrix["sparsity"]
    at = "" if isinstance(given, Mapping) else f" at {100 * given:.4g} %"
    axes.set_title(f"Agreement of masks{at}\n(Cohen's kappa; 0: by chance, 1: the same)", fontsize=9.5, loc="left")


def _draw_titles(figure: Figure, document: Mapping[str, Any], left: float, first: float, second: float) -> None:
    model, data = document["model"], document["data"]
    figure.text(left, first, f"Pruners compared on {model['class']}", fontsize=13, fontweight="bold")
    noun = "sample" if data["compared_samples"] == 1 else "samples"
    figure.text(
        left,
        second,
        f"{model['prunable']:,} prunable weights of {model['parameters']:,}; outputs compared on "
        f"{data['compared_samples']:,} {noun} ({data['compared_on']})",
        color=INK,
    )
