"""Where tokens come from and where they are read: walks over a recorded graph for what weighs its activations by tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mfcompile.graph import CapturedGraph, TensorValue
from mfcompile.masked_weights import mask_weight
from mfcompile.passes.operators import CONTENT_FREE, CONTRACTIONS, argument, is_stored, is_view, operator_name
from mfcompile.passes.token_axis import index_per_sample
from mfcompile.passes.token_places import Place, node_sizes
from mfcompile.passes.token_shape_rules import whole_axis
from mfcompile.passes.token_spread import VIEWS, places_behind, sources_of

_JOINS = frozenset({"cat", "concat"})


def with_meta_tensors(captured: CapturedGraph) -> fx.Graph:
    """A copy of a recorded graph, nodes of the same names, with meta tensors as values: what rules of operators read."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copies))
    for node, copy in copies.items():
        copy.name = node.name
        copy.meta["module_stack"] = node.meta.get("module_stack", ())
        copy.meta["val"] = pytree.tree_map(
            lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, TensorValue) else leaf,
            node.meta.get("val"),
        )
    return graph


def content_nodes(graph: fx.Graph, content: Iterable[str]) -> set[fx.Node]:
    """Nodes that depend on what nodes with content hold, not on their sizes or truth alone.

    Args:
        graph: any.
        content: names of these nodes.
    """
    starts, found = set(content), set()
    for node in graph.nodes:
        if node.name in starts or (
            operator_name(node) not in CONTENT_FREE and any(item in found for item in node.all_input_nodes)
        ):
            found.add(node)
    return found


def content_ancestors(node: fx.Node) -> set[fx.Node]:
    """Nodes whose values reach a node, not their sizes or truth alone; the node itself too."""
    found, pending = {node}, [node]
    while pending:
        current = pending.pop()
        fresh = [item for item in current.all_input_nodes if item not in found and operator_name(current) not in CONTENT_FREE]
        found.update(fresh)
        pending += fresh
    return found


class Upstream:
    """Where axes come from; what was walked once is remembered."""

    def __init__(self) -> None:
        self._sources: dict[tuple[fx.Node, Place, Any], list[tuple[fx.Node, Place]]] = {}

    def of(self, node: fx.Node, place: Place, size: int) -> dict[fx.Node, set[Place]]:
        """Every node that an axis comes from, the node itself first, with its places in them."""
        found: dict[fx.Node, set[Place]] = {node: {place}}
        pending = [(node, place)]
        while pending:
            for source, at in self._before(*pending.pop(), size):
                if at not in found.setdefault(source, set()):
                    found[source].add(at)
                    pending.append((source, at))
        return found

    def _before(self, node: fx.Node, place: Place, size: int) -> list[tuple[fx.Node, Place]]:
        key = (node, place, size)
        if key not in self._sources:
            self._sources[key] = self._look(node, place, size)
        return self._sources[key]

    @staticmethod
    def _look(node: fx.Node, place: Place, size: int) -> list[tuple[fx.Node, Place]]:
        if operator_name(node) in _JOINS:
            full = [item for item in node.all_input_nodes if prod(node_sizes(item))]
            if len(full) == 1:  # joined to nothing, as keys are to an empty cache
                return [(full[0], place)]
        return sources_of(node, place, size)


def feeders(start: fx.Node, content: set[fx.Node], results: set[fx.Node], *, through_sums: bool) -> set[fx.Node]:
    """The layers and attentions that a value is made of directly: walking back ends at them.

    Args:
        start: the value; a layer itself is its own feeder.
        content: nodes with content; others are not walked to.
        results: result nodes of attentions.
        through_sums: walk through sums of two activations; without, a residual add ends the walk.
    """
    found: set[fx.Node] = set()
    seen, pending = {start}, [start]
    while pending:
        node = pending.pop()
        operands = [item for item in node.all_input_nodes if item in content]
        if node in results or is_layer(node):
            found.add(node)
            continue
        if not through_sums and operator_name(node) in {"add", "add_"} and len(operands) > 1:
            continue
        fresh = [item for item in operands if item not in seen]
        seen.update(fresh)
        pending += fresh
    return found


def is_layer(node: fx.Node) -> bool:
    """A product of an activation and a stored weight, masked or not."""
    return operator_name(node) in CONTRACTIONS and any(map(_is_weight, node.all_input_nodes))


def _is_weight(node: fx.Node) -> bool:
    while node.op == "call_function" and ((len(node.all_input_nodes) == 1 and is_view(node)) or node.target is mask_weight):
        node = node.all_input_nodes[0]
    return is_stored(node)


@dataclass(frozen=True)
class ReadOut:
    """A token that the model reads alone.

    Attributes:
        position: the same in every sample, from the front; None where ``index`` says it.
        index: node of (samples,) positions.
        via: what lies between the tokens in question and those that are read, in order: a node of (samples, kept) positions
            where tokens were cut, a number where so many were taken off in front.
    """

    position: int | None
    index: fx.Node | None
    via: tuple[fx.Node | int, ...] = ()


def read_outs(start: fx.Node, axis: int, batch: Place, nodes: Sequence[fx.Node]) -> tuple[ReadOut, ...]:
    """The tokens of a node that are read alone downstream: CLS, EOS at an index of each sample, the last one.

    Reads behind cuts of tokens count for the token that stood there before.

    Args:
        start: any node.
        axis: its token axis.
        batch: its batch axis.
        nodes: all nodes behind it, in the order of the graph.
    """
    found: dict[fx.Node, set[Any]] = {start: {(Place(axis), (), int(node_sizes(start)[axis]))}}
    reads: dict[ReadOut, None] = {}
    for node in nodes:
        states: set[Any] = set()
        for operand in node.all_input_nodes:
            for place, via, size in found.get(operand, ()):
                read = _read(node, operand, place, batch, via, size)
                if read is not None:
                    reads[read] = None
                length = int(node_sizes(operand)[place.axis]) // (place.outer * place.inner)
                states |= {(moved, via, size) for moved in places_behind(node, operand, place, length)}
                states |= _behind_cuts(node, operand, place, via, size)
        if states:
            found[node] = found.get(node, set()) | states
    return tuple(reads)


def _read(node: fx.Node, operand: fx.Node, place: Place, batch: Place, via: tuple[Any, ...], size: int) -> ReadOut | None:
    name, length = operator_name(node), node_sizes(operand)[place.axis]
    if not place.is_whole or not node.args or node.args[0] is not operand:
        return None
    rank = len(node_sizes(operand))
    if name == "select" and int(node.args[1]) % rank == place.axis:  # type: ignore[arg-type]
        position = int(node.args[2]) % length  # type: ignore[arg-type]
        return ReadOut(position, None, via) if position < size else None
    is_part = name in {"slice", "narrow"} and int(argument(node, "dim", 1, 0)) % rank == place.axis
    if is_part and node_sizes(node)[place.axis] == 1:
        position = int(argument(node, "start", 2, 0) or 0) % length
        return ReadOut(position, None, via) if position < size else None
    if name == "index":
        index = index_per_sample(node, operand, place, batch)
        return None if index is None else ReadOut(None, index, via)
    return None


def _behind_cuts(node: fx.Node, operand: fx.Node, place: Place, via: tuple[Any, ...], size: int) -> set[Any]:
    """Tokens that go on with fewer, or with others behind them."""
    name, rank = operator_name(node), len(node_sizes(operand))
    if not place.is_whole or (name not in _JOINS and node.args[0] is not operand):
        return set()
    if name == "gather" and int(argument(node, "dim", 1)) % rank == place.axis:
        kept = _kept_positions(argument(node, "index", 2))
        return set() if kept is None else {(place, (*via, kept), int(node_sizes(kept)[1]))}
    is_part = name == "narrow" or (name == "slice" and not whole_axis(node))
    if is_part and int(argument(node, "dim", 1, 0)) % rank == place.axis:
        start = int(argument(node, "start", 2, 0) or 0) % node_sizes(operand)[place.axis]
        step, count = argument(node, "step", 4, 1) if name == "slice" else 1, int(node_sizes(node)[place.axis])
        return {(place, (*via, start), min(count, size - start))} if step == 1 and size - start > 0 else set()
    if name in _JOINS and int(argument(node, "dim", 1, 0)) % rank == place.axis and node.args[0][0] is operand:  # type: ignore[index]
        return {(place, via, size)}
    return set()


def _kept_positions(index: Any) -> fx.Node | None:
    """(samples, kept), of which the index of a gather is an expansion."""
    while isinstance(index, fx.Node):
        if len(node_sizes(index)) == 2:
            return index
        if operator_name(index) not in VIEWS | {"expand", "unsqueeze"}:
            return None
        index = index.args[0]
    return None


def order_of(graph: fx.Graph) -> Mapping[fx.Node, int]:
    """Position of every node."""
    return {node: position for position, node in enumerate(graph.nodes)}
