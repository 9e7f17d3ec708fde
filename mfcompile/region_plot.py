"""The picture of a region map: inputs, stacks and heads, coloured by modality, with what flows between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mfcompile.report_plot import FAINT, FURTHER_COLOURS, INK, NAMED_COLOURS, STYLE

if TYPE_CHECKING:
    import networkx as nx

WIDTH, HEIGHT = 2.7, 0.78
"""Size of a box, in inches."""

COLUMN, ROW = 3.5, 1.05
"""Distance from box to box, in inches."""


def plot_regions(graph: nx.DiGraph, file: Path | IO[bytes], *, title: str, format: str | None = None) -> None:
    """Draw a quotient graph from left to right.

    Args:
        graph: what ``passes.block_graph.block_graph`` gives.
        file: where to write; the suffix of a path chooses the format.
        title: printed above the picture.
        format: "png", "svg" or "pdf", for a file object.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    places = _places(graph)
    columns = 1 + max((x for x, _ in places.values()), default=0)
    rows = 1 + max((y for _, y in places.values()), default=0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * COLUMN, rows * ROW + 0.8))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(-COLUMN / 2, (columns - 0.5) * COLUMN)
        axes.set_ylim(-ROW / 2 - 0.6, (rows - 0.5) * ROW + 0.2)
        axes.invert_yaxis()
        axes.axis("off")
        colours = _colours(graph)
        for source, target in graph.edges:
            (x0, y0), (x1, y1) = places[source], places[target]
            bend = 0.0 if x1 == x0 + 1 else 0.12
            axes.annotate(
                "",
                (x1 * COLUMN - WIDTH / 2, y1 * ROW),
                (x0 * COLUMN + WIDTH / 2, y0 * ROW),
                arrowprops={"arrowstyle": "-|>", "color": FAINT, "lw": 1.1, "connectionstyle": f"arc3,rad={bend}"},
            )
        for name, (x, y) in places.items():
            data = graph.nodes[name]
            colour = colours.get(data["region"], FAINT)
            corner = (x * COLUMN - WIDTH / 2, y * ROW - HEIGHT / 2)
            is_solid = data["kind"] == "stack"
            box = FancyBboxPatch(
                corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.09", linewidth=1.4, edgecolor=colour,
                facecolor=colour if is_solid else "white", zorder=2,
            )  # fmt: skip
            axes.add_patch(box)
            ink = "white" if is_solid else INK
            axes.text(x * COLUMN, y * ROW - 0.1, _short(name), ha="center", va="center", color=ink, weight="bold", zorder=3)
            axes.text(x * COLUMN, y * ROW + 0.17, _caption(data), ha="center", va="center", color=ink, size=8, zorder=3)
        axes.text(-WIDTH / 2, -ROW / 2 - 0.3, title, size=11, weight="bold", va="center")
        figure.savefig(file, format=format, dpi=160, facecolor="white")


def _places(graph: nx.DiGraph) -> dict[str, tuple[int, float]]:
    """Column by the longest way from an input (cycles count as one place), row by order in the column."""
    import networkx as nx

    condensed = nx.condensation(graph)
    column: dict[str, int] = {}
    for index, layer in enumerate(nx.topological_generations(condensed)):
        for part in layer:
            for offset, name in enumerate(sorted(condensed.nodes[part]["members"])):
                column[name] = index + (offset if len(condensed.nodes[part]["members"]) > 1 else 0)
    rows: dict[int, list[str]] = {}
    for name in graph.nodes:
        rows.setdefault(column[name], []).append(name)
    height = max((len(names) for names in rows.values()), default=1)
    places: dict[str, tuple[int, float]] = {}
    for place in sorted(rows):
        names = sorted(rows[place], key=lambda name: _wanted_row(graph, name, places))
        for index, name in enumerate(names):
            places[name] = (place, index + (height - len(names)) / 2)
    return places


def _wanted_row(graph: nx.DiGraph, name: str, places: Mapping[str, tuple[int, float]]) -> float:
    """Mean row of what feeds a node, so that arrows cross less."""
    above = [places[source][1] for source in graph.predecessors(name) if source in places]
    return sum(above) / len(above) if above else 0.0


def _colours(graph: nx.DiGraph) -> dict[str, str]:
    further = iter(FURTHER_COLOURS * len(graph))
    found: dict[str, str] = {}
    for _, data in graph.nodes(data=True):
        region = data["region"]
        if region and region not in found:
            found[region] = NAMED_COLOURS.get(region) or next(further)
    return found


def _caption(data: Mapping[str, Any]) -> str:
    if data["kind"] == "input":
        return f"input, {data['region']}"
    if data["kind"] == "output":
        return "output"
    size = f"{data['weights'] / 1e6:.1f} M" if data["weights"] >= 1e5 else f"{data['weights']:,}"
    if data["kind"] == "head":
        return f"head or projector, {data['region']}, {size} weights"
    blocks = "1 block" if data["blocks"] == 1 else f"{data['blocks']} blocks"
    return f"{data['region']}, {blocks}, {size} weights"


def _short(name: str, most: int = 34) -> str:
    """The end of a long name says more than its beginning."""
    bare = name.rpartition(" (")[0] or name
    return bare if len(bare) <= most else "…" + bare[-most + 1 :]
