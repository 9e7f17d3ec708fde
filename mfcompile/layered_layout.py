"""Places for the nodes of a dataflow graph in layers, with room for the edges that pass a layer (Sugiyama's method)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

SWEEPS = 8
"""Times that the order of every layer is improved, down and up."""

PULLS = 20
"""Times that every node is drawn towards its neighbours; each costs little, and chains straighten slowly."""


@dataclass(frozen=True)
class Layout:
    """Where everything goes.

    Attributes:
        places: node -> (x of its middle, number of its layer).
        routes: edge between layers -> the points it runs through, both ends included.
        level: edges between nodes of one layer (of a cycle).
        layers: how many layers there are.
    """

    places: Mapping[str, tuple[float, int]]
    routes: Mapping[tuple[str, str], tuple[tuple[float, int], ...]]
    level: tuple[tuple[str, str], ...]
    layers: int


def lay_out(graph: nx.DiGraph, *, width: float, lane: float, gap: float) -> Layout:
    """Lay a graph out so that no edge runs through a node.

    Args:
        graph: nodes are names; nodes of a cycle share a layer, side by side.
        width: width of every node.
        lane: width that an edge takes where it passes a layer.
        gap: least distance between neighbours in a layer.
    """
    layer = _layers(graph)
    routes: dict[tuple[str, str], list[str]] = {}
    level: list[tuple[str, str]] = []
    links: list[tuple[str, str]] = []
    widths = dict.fromkeys(graph.nodes, width)
    for source, target in graph.edges:
        if layer[source] == layer[target]:
            level.append((source, target))
            continue
        chain = [source]
        for passed in range(layer[source] + 1, layer[target]):
            name = f"{source}\0{target}\0{passed}"
            layer[name], widths[name] = passed, lane
            chain.append(name)
        chain.append(target)
        routes[source, target] = chain
        links += pairwise(chain)
    rows = _ordered(layer, links, level)
    x = _spread(rows, links, widths, gap)
    return Layout(
        {name: (x[name], layer[name]) for name in graph.nodes},
        {edge: tuple((x[name], layer[name]) for name in chain) for edge, chain in routes.items()},
        tuple(level),
        len(rows),
    )


def _layers(graph: nx.DiGraph) -> dict[str, int]:
    """Node -> length of the longest way to it; nodes of a cycle count as one."""
    import networkx as nx

    condensed = nx.condensation(graph)
    return {
        name: index
        for index, parts in enumerate(nx.topological_generations(condensed))
        for part in parts
        for name in condensed.nodes[part]["members"]
    }


def _ordered(layer: Mapping[str, int], links: Sequence[tuple[str, str]], level: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Order within every layer, by the mean places of neighbours; the order with the fewest crossings is kept."""
    rows: list[list[str]] = [[] for _ in range(1 + max(layer.values(), default=-1))]
    for name, index in layer.items():
        rows[index].append(name)
    above, below = _neighbours(links)
    best, fewest = [list(row) for row in rows], _crossings(rows, links)
    for sweep in range(SWEEPS):
        order = rows if sweep % 2 == 0 else rows[::-1]
        beside = above if sweep % 2 == 0 else below
        for row in order:
            place = {name: index for other in rows for index, name in enumerate(other)}

            def wanted(name: str, place: Mapping[str, int] = place, beside: Mapping[str, list[str]] = beside) -> float:
                found = [place[other] for other in beside.get(name, ())]
                return sum(found) / len(found) if found else place[name]

            row.sort(key=wanted)
        crossings = _crossings(rows, links)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _neighbours(links: Sequence[tuple[str, str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for source, target in links:
        above.setdefault(target, []).append(source)
        below.setdefault(source, []).append(target)
    return above, below


def _crossings(rows: Sequence[Sequence[str]], links: Sequence[tuple[str, str]]) -> int:
    """Pairs of links between the same two layers that cross."""
    place = {name: (depth, index) for depth, row in enumerate(rows) for index, name in enumerate(row)}
    by_depth: dict[int, list[tuple[int, int]]] = {}
    for source, target in links:
        by_depth.setdefault(place[source][0], []).append((place[source][1], place[target][1]))
    return sum(
        (one[0] - other[0]) * (one[1] - other[1]) < 0
        for ends in by_depth.values()
        for index, one in enumerate(ends)
        for other in ends[index + 1 :]
    )


def _spread(
    rows: Sequence[Sequence[str]], links: Sequence[tuple[str, str]], widths: Mapping[str, float], gap: float
) -> dict[str, float]:
    """x of every node: near the mean of its neighbours, apart from those beside it."""
    x: dict[str, float] = {}
    for row in rows:
        x |= dict(zip(row, _apart([0.0] * len(row), [widths[name] for name in row], gap), strict=True))
    above, below = _neighbours(links)
    for sweep in range(PULLS + 1):
        is_last = sweep == PULLS
        for row in rows if is_last or sweep % 2 == 0 else rows[::-1]:
            # At last every node goes below what feeds it, so that chains are straight.
            beside = [above.get(name, ()) if is_last else [*above.get(name, ()), *below.get(name, ())] for name in row]
            wanted = [
                sum(x[other] for other in others) / len(others) if others else x[name]
                for name, others in zip(row, beside, strict=True)
            ]
            x |= dict(zip(row, _apart(wanted, [widths[name] for name in row], gap), strict=True))
    return x


def _apart(wanted: Sequence[float], widths: Sequence[float], gap: float) -> list[float]:
    """The places nearest to the wanted ones (least squares) that keep order and distance: isotonic regression."""
    offsets = [0.0]
    for one, other in pairwise(widths):
        offsets.append(offsets[-1] + (one + other) / 2 + gap)
    pools: list[tuple[float, int]] = []
    for place, offset in zip(wanted, offsets, strict=False):
        pools.append((place - offset, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (first, many), (second, more) = pools[-2:]
            pools[-2:] = [((first * many + second * more) / (many + more), many + more)]
    flat = [mean for mean, count in pools for _ in range(count)]
    return [place + offset for place, offset in zip(flat, offsets, strict=False)]
