"""The picture of a report: the sparsity of every layer, coloured by region (Fig. 4 of the MULTIFLOW paper)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_COLOURS = {"vision": "#2a78b5", "text": "#e08e0b", "fusion": "#1f9d6b"}
FURTHER_COLOURS = ("#b5508f", "#6f5bb5", "#8a6d3b", "#5f6b7a", "#c2452d")
INK = "#22272e"
FAINT = "#8b949e"

MOST_LABELS = 48
"""Above this many sites their names would be too small to read; positions are numbered instead."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "mfcompile",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Band:
    """The bars of one region, side by side.

    Attributes:
        region: its name.
        colour: of its bars.
        sparsity: achieved over the region.
        positions: x of every bar.
        heights: sparsity of every site, in percent.
        labels: site names without what all of the region share.
    """

    region: str
    colour: str
    sparsity: float
    positions: tuple[float, ...]
    heights: tuple[float, ...]
    labels: tuple[str, ...]


def plot_sparsity(report: Mapping[str, Any], directory: Path | str, *, stem: str = "sparsity") -> tuple[Path, Path]:
    """Draw the sparsity of every site, grouped by region, as ``sparsity.png`` and ``sparsity.svg``.

    The files carry no date: the same report gives the same bytes.

    Args:
        report: what ``build_report`` returned.
        directory: where the two files go.
        stem: their name without the ending.
    """
    return save_picture(lambda: _draw(report), Path(directory) / stem)


def save_picture(draw: Callable[[], Figure], path: Path) -> tuple[Path, Path]:
    """Draw in the style of the house, and write ``<path>.png`` and ``<path>.svg`` without a date."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = draw()
        png, svg = (path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg"))
        figure.savefig(png, dpi=160, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def arrange(report: Mapping[str, Any]) -> tuple[Band, ...]:
    """The bars of every region, regions in order of first appearance, sites in depth order, a gap between regions."""
    bands: list[Band] = []
    start, space = 0.0, max(1.0, len(report["sites"]) / 60)
    spare = list(FURTHER_COLOURS)
    for row in report["regions"]:
        members = [site for site in report["sites"] if site["region"] == row["region"]]
        colour = NAMED_COLOURS.get(row["region"]) or (spare.pop(0) if spare else FAINT)
        bands.append(
            Band(
                region=row["region"],
                colour=colour,
                sparsity=row["sparsity"],
                positions=tuple(start + index for index in range(len(members))),
                heights=tuple(100 * site["sparsity"] for site in members),
                labels=short_names([site["name"] for site in members]),
            )
        )
        start += len(members) + space
    return tuple(bands)


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names without the beginning that all share and the ending that most share, as long as they stay distinct."""
    parts = [name.split(".") for name in names]
    front = _shared_count([part[:-1] for part in parts])
    parts = [part[front:] for part in parts]
    endings = Counter(part[-1] for part in parts if len(part) > 1)
    for ending, count in endings.most_common(1):
        if 2 * count <= len(names):
            break
        shorter = [part[:-1] if len(part) > 1 and part[-1] == ending else part for part in parts]
        if len({tuple(part) for part in shorter}) == len(names):
            parts = shorter
    return tuple(".".join(part) for part in parts)


def _shared_count(paths: Sequence[Sequence[str]]) -> int:
    """How many first items all paths share."""
    count = 0
    for items in zip(*paths, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return count


def _draw(report: Mapping[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bands = arrange(report)
    count = sum(len(band.positions) for band in bands)
    is_labelled = count <= MOST_LABELS
    longest = max((len(label) for band in bands for label in band.labels), default=0) if is_labelled else 0
    width = min(max(8.5, 2.2 + 0.26 * count), 14.0)
    columns = max(1, int(width / (0.9 + 0.08 * max([len(band.region) + 9 for band in bands], default=9))))
    bottom = 0.2 + (0.062 * longest if is_labelled else 0.3)
    top = 0.8 + 0.2 * math.ceil((len(bands) + 1) / columns)
    height = 3.2 + bottom + top
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left = 0.85 / width
    axes = figure.add_axes((left, bottom / height, 0.97 - left, 1 - (bottom + top) / height))
    _draw_bars(axes, bands, gap=0.22)
    _draw_frame(axes, bands, report, is_labelled)
    _draw_title(figure, axes, report, columns)
    return figure


def _draw_bars(axes: Axes, bands: Sequence[Band], gap: float) -> None:
    for band in bands:
        label = f"{band.region}: {100 * band.sparsity:.1f} % removed"
        axes.bar(band.positions, band.heights, width=1 - gap, color=band.colour, label=label, zorder=2)
        first, last = band.positions[0] - 0.5, band.positions[-1] + 0.5
        axes.axvspan(first, last, color=band.colour, alpha=0.07, linewidth=0, zorder=0)


def _draw_frame(axes: Axes, bands: Sequence[Band], report: Mapping[str, Any], is_labelled: bool) -> None:
    if not isinstance(report["options"].get("allocation"), Mapping):  # else every layer was asked for its own
        _draw_request(axes, bands, report["options"]["sparsity"])
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("sparsity: weights removed (%)")
    axes.yaxis.grid(True, color=FAINT, alpha=0.25, linewidth=0.7, zorder=1)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
    positions = [position for band in bands for position in band.positions]
    axes.set_xlim(-1, (positions[-1] if positions else 0) + 1)
    if is_labelled:
        axes.set_xticks(positions, [label for band in bands for label in band.labels], rotation=90, fontsize=7.5)
    else:
        axes.set_xticks([])
    for band in bands:
        middle = (band.positions[0] + band.positions[-1]) / 2
        noun = "layer" if len(band.positions) == 1 else "layers"
        is_wide = len(band.positions) > 0.035 * len(positions)
        if is_wide and not is_labelled:
            axes.annotate(
                f"{band.region}\n{len(band.positions)} {noun}",
                (middle, 0),
                xytext=(0, -6),
                textcoords="offset points",
                ha="center",
                va="top",
                color=band.colour,
                fontweight="bold",
                annotation_clip=False,
            )
    if not bands:
        axes.text(0.5, 50, "no weight was pruned", ha="center", va="center", transform=axes.get_yaxis_transform())


def _draw_request(axes: Axes, bands: Sequence[Band], sparsity: float | Mapping[str, float]) -> None:
    """A line at what was asked for: through all layers, or through those of each region."""
    style: dict[str, Any] = {"color": INK, "linestyle": (0, (5, 3)), "linewidth": 1.1, "zorder": 3}
    if not isinstance(sparsity, Mapping):
        axes.axhline(100 * sparsity, label=f"requested: {100 * sparsity:g} %", **style)
        return
    for index, band in enumerate(bands):
        label = "requested, by region" if index == 0 else "_"  # matplotlib leaves what begins so out of the legend
        height = 100 * sparsity[band.region]
        axes.hlines(height, band.positions[0] - 0.5, band.positions[-1] + 0.5, label=label, **style)


def _draw_title(figure: Figure, axes: Axes, report: Mapping[str, Any], columns: int) -> None:
    height = figure.get_figheight()
    prunable, everything = report["totals"]["prunable"], report["totals"]["all_parameters"]
    left = axes.get_position().x0
    figure.text(left, 1 - 0.28 / height, f"Sparsity per layer of {report['model']['class']}", fontsize=13, fontweight="bold")
    figure.text(
        left,
        1 - 0.50 / height,
        f"{100 * prunable['sparsity']:.2f} % of {prunable['weights']:,} prunable weights removed, "
        f"{100 * everything['sparsity']:.2f} % of all {everything['weights']:,} parameters",
        color=INK,
    )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.02),
        ncols=columns,
        frameon=False,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.6,
    )
