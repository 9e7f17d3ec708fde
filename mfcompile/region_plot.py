"""The picture of a region map: inputs, stacks and heads, coloured by modality, with what flows between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mfcompile.layered_layout import Layout, lay_out
from mfcompile.report_plot import FAINT, FURTHER_COLOURS, INK, NAMED_COLOURS, STYLE

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

WIDTH, HEIGHT, ROW, GAP, LANE = 3.1, 0.74, 1.4, 0.5, 0.3
"""Inches: size of a box, distance from row to row, least distance of neighbours, room for an arrow that passes a row."""

PORT = 0.3
"""Inches between two arrows that arrive at one box."""

CARD = 0.07
"""Inches by which the cards behind a stack of blocks stick out."""

MARGIN, HEAD, FOOT = 0.45, 0.85, 0.75
"""Inches around the picture, above it (title) and below it (legend)."""

_LISTED = 34
"""Letters of output names that one box lists."""

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass
class Box:
    """One box of the picture: a node of the quotient graph, or several that are drawn as one.

    Attributes:
        names: what it stands for.
        data: attributes of the node; counts are summed over nodes.
    """

    names: list[str]
    data: dict[str, Any] = field(default_factory=dict)


def plot_regions(
    graph: nx.DiGraph, file: Path | IO[bytes], *, title: str, subtitle: str = "", format: str | None = None
) -> None:
    """Draw a quotient graph from top to bottom.

    Outputs and heads that hang between the same boxes are drawn as one, and so is a chain of heads of one module: the number
    of boxes does not grow with depth. No arrow runs through a box.

    Args:
        graph: what ``passes.block_graph.block_graph`` gives.
        file: where to write; the suffix of a path chooses the format.
        title: printed above the picture.
        subtitle: printed below the title.
        format: "png", "svg" or "pdf", for a file object.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folded, boxes = fold(graph)
    layout = lay_out(folded, width=WIDTH, lane=LANE, gap=GAP)
    colours = _colours(folded)
    xs = [x for x, _ in layout.places.values()] + [x for points in layout.routes.values() for x, _ in points]
    left, right = min(xs) - WIDTH / 2 - MARGIN, max(xs) + WIDTH / 2 + MARGIN
    right = max(right, left + 1.75 * (len(colours) + 2) + 2 * MARGIN)  # the legend has to fit
    top, bottom = -HEIGHT / 2 - HEAD, (layout.layers - 1) * ROW + HEIGHT / 2 + FOOT
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(right - left, bottom - top))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        axes.axis("off")
        _draw_arrows(axes, folded, layout, colours)
        for name, (x, depth) in layout.places.items():
            _draw_box(axes, boxes[name], x, depth * ROW, colours)
        axes.text(left + MARGIN, top + 0.3, title, size=13, weight="bold", va="center")
        axes.text(left + MARGIN, top + 0.56, subtitle, size=9, va="center", color=FAINT)
        _draw_legend(axes, colours, left + MARGIN, bottom - 0.32)
        figure.savefig(file, format=format, dpi=160, facecolor="white")


def fold(graph: nx.DiGraph) -> tuple[nx.DiGraph, dict[str, Box]]:
    """The graph as it is drawn: chains of heads of one module, and heads and outputs that hang alike, each as one box.

    Returns:
        (the folded graph, its boxes by node name).
    """
    folded = graph.copy()
    boxes = {name: Box([name], dict(data)) for name, data in graph.nodes(data=True)}
    for name in list(folded.nodes):
        while name in folded and (following := _next_of_chain(folded, boxes, name)) is not None:
            _join(folded, boxes, name, following)
    hanging: dict[tuple[object, ...], str] = {}
    for name in list(folded.nodes):
        data = boxes[name].data
        if data["kind"] not in {"head", "output"}:
            continue
        key = (data["kind"], data["region"], frozenset(folded.predecessors(name)), frozenset(folded.successors(name)))
        first = hanging.setdefault(key, name)
        if first != name:
            _join(folded, boxes, first, name)
    return folded, boxes


def _next_of_chain(graph: nx.DiGraph, boxes: Mapping[str, Box], name: str) -> str | None:
    """The head that alone follows a head of the same module and region, and follows nothing else."""
    after = list(graph.successors(name))
    if len(after) != 1 or list(graph.predecessors(after[0])) != [name]:
        return None
    one, other = boxes[name].data, boxes[after[0]].data
    is_chain = one["kind"] == other["kind"] == "head" and one["region"] == other["region"]
    return after[0] if is_chain and _common([name, after[0]]) else None


def _join(graph: nx.DiGraph, boxes: dict[str, Box], first: str, other: str) -> None:
    graph.add_edges_from((first, target) for target in list(graph.successors(other)) if target != first)
    graph.remove_node(other)
    boxes[first].names += boxes[other].names
    for key in ("weights", "pruned", "layers"):
        boxes[first].data[key] += boxes[other].data[key]
    del boxes[other]


def _common(names: Sequence[str]) -> str:
    """The longest path of a submodule that all names lie in."""
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared[: min(len(item) for item in parts) - 1])


def _draw_arrows(axes: Axes, graph: nx.DiGraph, layout: Layout, colours: Mapping[str, str]) -> None:
    """Arrows in the colour of what they carry; between two boxes of a cycle one with two heads."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    ports = _ports(layout)
    for (source, target), points in layout.routes.items():
        points = (*points[:-1], (points[-1][0] + ports[source, target], points[-1][1]))
        colour = colours.get(graph.nodes[source]["region"], FAINT)
        vertices, codes = _curve(points, 2 * CARD if graph.nodes[target]["blocks"] > 1 else 0.0)
        arrow = FancyArrowPatch(
            path=Curve(vertices, [Curve.MOVETO, *[Curve.CURVE4 if code else Curve.LINETO for code in codes]]),
            arrowstyle="-|>", mutation_scale=11, linewidth=1.5, color=colour, alpha=0.85, zorder=1,
        )  # fmt: skip
        axes.add_patch(arrow)
    for source, target in layout.level:
        if (target, source) in layout.level and source > target:
            continue  # drawn with its counterpart
        style = "<|-|>" if (target, source) in layout.level else "-|>"
        (x0, depth), (x1, _) = layout.places[source], layout.places[target]
        side = 1 if x1 > x0 else -1
        start, end = (x0 + side * WIDTH / 2, depth * ROW), (x1 - side * WIDTH / 2, depth * ROW)
        colour = colours.get(graph.nodes[source]["region"], FAINT)
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, linewidth=1.5, color=colour, zorder=1))


def _ports(layout: Layout) -> dict[tuple[str, str], float]:
    """Where an arrow ends beside the middle of its box, so that two that arrive do not hide each other."""
    arriving: dict[str, list[tuple[float, tuple[str, str]]]] = {}
    for edge, points in layout.routes.items():
        arriving.setdefault(edge[1], []).append((points[-2][0], edge))
    found = {}
    for ends in arriving.values():
        step = min(PORT, 0.8 * WIDTH / len(ends))
        for index, (_, edge) in enumerate(sorted(ends)):
            found[edge] = (index - (len(ends) - 1) / 2) * step
    return found


def _curve(points: Sequence[tuple[float, int]], above: float) -> tuple[list[tuple[float, float]], list[bool]]:
    """Vertices from below the first box to ``above`` the last, and which belong to a bend; rows are passed straight."""
    x, depth = points[0]
    vertices = [(x, depth * ROW + HEIGHT / 2)]
    codes: list[bool] = []
    for index, (x1, depth1) in enumerate(points[1:], start=1):
        x0, y0 = vertices[-1]
        y1 = depth1 * ROW - HEIGHT / 2
        is_last = index == len(points) - 1
        middle = (y0 + y1) / 2
        vertices += [(x0, middle), (x1, middle), (x1, y1 - (above + 0.03 if is_last else 0.0))]
        codes += [True] * 3
        if not is_last:
            vertices.append((x1, depth1 * ROW + HEIGHT / 2))
            codes.append(False)
    return vertices, codes


def _draw_box(axes: Axes, box: Box, x: float, y: float, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    data = box.data
    colour = colours.get(data["region"], FAINT)
    is_solid = data["kind"] == "stack"
    cards = (2, 1, 0) if is_solid and data["blocks"] > 1 else (0,)
    for card in cards:
        shift = card * CARD
        front = FancyBboxPatch(
            (x - WIDTH / 2 + shift, y - HEIGHT / 2 - shift), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.09",
            linewidth=1.2, edgecolor="white" if is_solid else colour, facecolor=colour if is_solid else "white",
            linestyle="-" if data["kind"] != "output" else (0, (3, 2)), alpha=1.0 - 0.3 * card, zorder=4 - card,
        )  # fmt: skip
        axes.add_patch(front)
    ink = "white" if is_solid else INK
    lines = [(_heading(box), 9.5, "bold"), *((text, 8.0, "normal") for text in _captions(box))]
    step = HEIGHT / (len(lines) + 0.6)
    for index, (text, size, weight) in enumerate(lines):
        place = y - HEIGHT / 2 + step * (index + 0.8)
        label = axes.text(x, place, text, ha="center", va="center", color=ink, size=size, weight=weight, zorder=5)
        _fit(axes, label)


def _fit(axes: Axes, label: Any) -> None:
    """Shrink a line until it fits its box."""
    figure: Any = axes.figure
    width = label.get_window_extent(figure.canvas.get_renderer()).width / figure.dpi
    if width > WIDTH - 0.16:
        label.set_fontsize(label.get_fontsize() * (WIDTH - 0.16) / width)


def _heading(box: Box) -> str:
    if box.data["kind"] == "output":
        shown = [box.names[0]]
        while len(shown) < len(box.names) and len(", ".join([*shown, box.names[len(shown)]])) <= _LISTED:
            shown.append(box.names[len(shown)])
        rest = len(box.names) - len(shown)
        return ", ".join(shown) + (f" and {rest} more" if rest else "")
    common = _common(box.names)
    if len(box.names) > 1 and not common:
        return ", ".join(_short(name, 20) for name in box.names[:2]) + ("" if len(box.names) == 2 else ", …")
    name = _short(common if len(box.names) > 1 else box.names[0])
    return f"{name}  {TIMES} {box.data['blocks']}" if box.data["kind"] == "stack" and box.data["blocks"] > 1 else name


def _captions(box: Box) -> Iterator[str]:
    """Below the name: what it is, and what of it would be pruned."""
    data = box.data
    if data["kind"] == "input":
        yield f"input: {data['region']}"
        return
    if data["kind"] == "output":
        yield "output" if len(box.names) == 1 else f"{len(box.names)} outputs"
        return
    what = "blocks" if data["blocks"] > 1 else "block" if data["kind"] == "stack" else "head or projector"
    yield f"{data['region']} {what}, {data['layers']} linear weight{'s' if data['layers'] > 1 else ''}"
    fate = f"{_count(data['pruned'])} of them prunable" if data["pruned"] else "left dense"
    yield f"{_count(data['weights'])} elements, {'all prunable' if data['pruned'] == data['weights'] else fate}"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"


def _draw_legend(axes: Axes, colours: Mapping[str, str], x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    entries: list[tuple[str, str, str, Any]] = [(region, colour, colour, "-") for region, colour in colours.items()]
    entries += [("head, projector, input", "white", INK, "-"), ("output", "white", FAINT, (0, (3, 2)))]
    for text, face, edge, style in entries:
        sample = FancyBboxPatch(
            (x, y - 0.08), 0.26, 0.16, boxstyle="round,pad=0,rounding_size=0.04", facecolor=face, edgecolor=edge,
            linestyle=style, linewidth=1.2,
        )  # fmt: skip
        axes.add_patch(sample)
        axes.text(x + 0.36, y, text, size=8.5, va="center")
        x += 0.75 + 0.075 * len(text)
    axes.text(x, y, "filled: repeated blocks", size=8.5, va="center", color=FAINT)


def _colours(graph: nx.DiGraph) -> dict[str, str]:
    further = iter(FURTHER_COLOURS * (1 + len(graph)))
    found: dict[str, str] = {}
    for _, data in graph.nodes(data=True):
        region = data["region"]
        if region and region not in found:
            found[region] = NAMED_COLOURS.get(region) or next(further)
    return found


def _short(name: str, most: int = 40) -> str:
    """A name without the parts in front that do not fit; the end says more than the beginning."""
    bare = name.rpartition(" (")[0] or name
    if len(bare) <= most:
        return bare
    parts = bare.split(".")
    while len(parts) > 1 and len(".".join(parts)) > most - 2:
        del parts[0]
    return "…" + ".".join(parts)[-most + 1 :]
