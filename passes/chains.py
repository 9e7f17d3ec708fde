"""Stacks of layers of one weight each: items of a list, or matrices of one parameter, of which one feeds another.

They are too small for a block of their own by the rules of ``blocks``, which look for layers of several weights: a list of
nn.Linear or of parameters, a list of modules that hold one linear layer, a parameter that stacks a matrix per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx, nn

from mfcompile.graph import CapturedGraph
from mfcompile.passes.blocks import CONTAINERS, structure
from mfcompile.region import WeightUse


def chained_items(captured: CapturedGraph, uses: Sequence[WeightUse]) -> dict[WeightUse, str]:
    """Use -> path of the item that it belongs to, for items of one weight that feed another item of their list.

    Args:
        captured: the graph.
        uses: the uses of linear weights that lie in no block.
    """
    modules = dict(captured.module.named_modules(remove_duplicate=False))
    places: dict[str, dict[str, list[WeightUse]]] = {}
    for use in uses:
        for container, item in _places(use, modules):
            places.setdefault(container, {}).setdefault(item, []).append(use)
    upstream = _upstream(captured, uses) if any(len(items) > 1 for items in places.values()) else {}
    found: dict[WeightUse, str] = {}
    for items in places.values():
        single = {item: group for item, group in items.items() if len({use.fqn for use in group}) == 1}
        for item, group in single.items():
            others = [other for other in single if other != item and _kind(modules, other) == _kind(modules, item)]
            if any(_feeds(upstream, group, single[other]) for other in others):
                found.update({use: item for use in group if use not in found})
    return found


def _places(use: WeightUse, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """(list, item) for every list that the weight lies in, innermost first."""
    if use.layout.experts and not use.reading.experts and not use.reading.routing:
        yield use.fqn, f"{use.fqn}[{use.experts[0]}]"
        return
    owner = use.fqn.rpartition(".")[0]
    if isinstance(modules.get(owner), nn.ParameterList):
        yield owner, use.fqn
        return
    path = owner
    while path:
        container = path.rpartition(".")[0]
        around = modules.get(container)
        # A Sequential of bare layers is a head or a projector; a list of them, or of modules around them, is a stack.
        if isinstance(around, CONTAINERS) and (isinstance(around, nn.ModuleList) or path != owner):
            yield container, path
        path = container


def _kind(modules: Mapping[str, nn.Module], item: str) -> object:
    """What two items of one list must share to be alike; parameters of a list, and matrices of a parameter, always are."""
    module = modules.get(item)
    if module is None:
        return None
    return type(module) if not list(module.children()) else structure(module)


def _feeds(upstream: Mapping[str, int], group: Sequence[WeightUse], other: Sequence[WeightUse]) -> bool:
    """Results of the one reach the other, or the other way round."""
    bits, others = (sum({upstream[f"={use.node}"] for use in listed}) for listed in (group, other))
    return any(upstream[use.node] & others for use in group) or any(upstream[use.node] & bits for use in other)


def _upstream(captured: CapturedGraph, uses: Sequence[WeightUse]) -> dict[str, int]:
    """Node of a use -> bits of the uses whose results reach it; "=" and the node -> its own bit."""
    own = {name: 1 << index for index, name in enumerate(dict.fromkeys(use.node for use in uses))}
    reached: dict[fx.Node, int] = {}
    found = {f"={name}": bit for name, bit in own.items()}
    for node in captured.graph.nodes:
        bits = 0
        for source in node.all_input_nodes:
            bits |= reached[source]
        if node.name in own:
            found[node.name] = bits
            bits |= own[node.name]
        reached[node] = bits
    return found
