"""Which modalities reach every value of an ONNX graph: the ground on which it is divided into parts.

Three facts of every value, each by one walk forwards:

- ``reach``: the modalities of the inputs that it is computed from, sizes of inputs included where they matter. It only
  grows along the graph, so that parts made by it never depend on each other in a circle.
- ``content``: the same without sizes. A value of no content (a mask, positions, ``arange``) can be computed anywhere.
- ``varies``: whether it depends on any input at all; what does not is folded when a session is created.

A size is no content: the batch of the image is the batch of the text wherever the graph gives both axes one name, and
either part can ask the input that it has. ``localise_sizes`` brings sizes into a form in which this can be seen.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

NO_LABELS: frozenset[str] = frozenset()

TABLE_LOOKUPS = frozenset({"Gather", "GatherND", "GatherElements"})
"""Operators that read rows of their first operand: a tied embedding is looked up by one part and multiplied by another."""


_INT64 = ir.TensorType(ir.DataType.INT64)


@dataclass(frozen=True)
class Axis:
    """A named dimension of the graph's inputs.

    Attributes:
        symbol: its name.
        places: every (input, dimension) that has it.
    """

    symbol: str
    places: tuple[tuple[ir.Value, int], ...]


@dataclass(frozen=True)
class Reach:
    """What reaches each value of the main graph; see the module.

    Attributes:
        reach: value -> modalities.
        content: value -> modalities whose content it holds.
        varies: values that depend on an input.
    """

    reach: Mapping[ir.Value, frozenset[str]]
    content: Mapping[ir.Value, frozenset[str]]
    varies: frozenset[ir.Value]


def localise_sizes(graph: ir.Graph) -> dict[ir.Value, Axis]:
    """Rewrite every Shape of known dimensions as one size per named axis, in place.

    Args:
        graph: its inputs have named dimensions; equal names mean equal sizes.

    Returns:
        value that holds one size, (1,) int64 -> its axis. Every other Shape is left as it is.
    """
    axes = input_axes(graph)
    made: dict[str, ir.Value] = {}
    taken = {str(value.name) for value in _all_values(graph)}
    for node in list(graph):
        dims = _shape_dims(node)
        if dims is None or node.outputs[0].is_graph_output():
            continue
        if not all(isinstance(dim, int) or str(dim.value) in axes for dim in dims):
            continue
        pieces = []
        for dim in dims:
            if isinstance(dim, int):
                pieces.append(_constant_size(graph, dim, taken))
                continue
            symbol = str(dim.value)
            if symbol not in made:
                made[symbol] = _ask(graph, axes[symbol], taken)
            pieces.append(made[symbol])
        whole = pieces[0] if len(pieces) == 1 else _join(graph, node, pieces, taken)
        node.outputs[0].replace_all_uses_with(whole)
        graph.remove(node)
    return {value: axes[symbol] for symbol, value in made.items()}


def input_axes(graph: ir.Graph) -> dict[str, Axis]:
    """Name -> axis, for every named dimension of the graph's inputs."""
    found: dict[str, list[tuple[ir.Value, int]]] = {}
    for value in graph.inputs:
        for dim, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                found.setdefault(size.value, []).append((value, dim))
    return {symbol: Axis(symbol, tuple(places)) for symbol, places in found.items()}


def find_reach(
    graph: ir.Graph,
    axes: Mapping[ir.Value, Axis],
    modalities: Mapping[str, str | None],
    late: Container[ir.Value] = (),
) -> Reach:
    """Follow modalities from the inputs through the graph.

    Args:
        graph: in topological order.
        axes: what ``localise_sizes`` gave.
        modalities: input name -> modality, None for control; inputs that are not named are control.
        late: initializers that reach their nodes like an input of every modality, except where a table is looked up.
    """
    every = frozenset(modalities.get(str(value.name)) or "" for value in graph.inputs) - {""}
    reach: dict[ir.Value, frozenset[str]] = {}
    content: dict[ir.Value, frozenset[str]] = {}
    varies: set[ir.Value] = set()
    for value in graph.inputs:
        modality = modalities.get(str(value.name))
        reach[value] = content[value] = NO_LABELS if modality is None else frozenset({modality})
        varies.add(value)
    for value in graph.initializers.values():
        if value.is_graph_input():
            continue
        reach[value] = every if value in late else NO_LABELS
        content[value] = NO_LABELS
    for node in graph:
        reads = list(read_values(node))
        labels = NO_LABELS.union(*(reach[value] for value in reads if not _is_table(node, value)))
        inner = NO_LABELS.union(*(content[value] for value in reads))
        is_size = bool(node.outputs) and node.outputs[0] in axes
        if is_size:
            labels, inner = size_reach(axes[node.outputs[0]], modalities), NO_LABELS
        for output in node.outputs:
            reach[output], content[output] = labels, inner
            if is_size or any(value in varies for value in reads):
                varies.add(output)
    return Reach(reach, content, frozenset(varies))


def late_weights(graph: ir.Graph, reach: Reach, regions: Mapping[str, str]) -> set[ir.Value]:
    """Weights that belong behind the meeting of modalities although one alone reaches them.

    The image-fed keys and values of a fusion block are fusion: their region is a mixture. Where a weight of one
    modality's own region lies behind such a weight (a patch projection whose output an attention reads as well), it is
    the beginning of that modality's tower all the same; and one that several modalities use apart from each other is
    shared, not fused.

    Args:
        graph: in topological order.
        reach: found without late weights.
        regions: initializer name -> region.
    """
    every = frozenset[str]().union(*reach.content.values())
    weights = read_weights(graph, reach)
    mixtures: dict[ir.Value, set[frozenset[str]]] = {}  # weight -> what reaches the nodes that read it
    early: set[ir.Value] = set()
    before_own: set[ir.Value] = set()  # values from which a weight of a single region is reached inside its tower
    for node in reversed(list(graph)):
        labels = frozenset[str]().union(*(reach.reach[value] for value in node.outputs))
        regions_read = {weight: regions.get(str(weight.name), "untagged") for weight in weights[node]}
        leads_on = len(labels) == 1 and any(value in before_own for value in node.outputs)
        for weight, region in regions_read.items():
            if region not in every and region != "untagged":
                mixtures.setdefault(weight, set()).add(labels)
                early.update([weight] if leads_on else [])
        if leads_on or (len(labels) == 1 and any(region in every for region in regions_read.values())):
            before_own.update(read_values(node))
    shared = {weight for weight, uses in mixtures.items() if sum(len(labels) == 1 for labels in uses) > 1}
    return set(mixtures) - early - shared if len(every) > 1 else set()


def is_weight(value: ir.Value | None) -> bool:
    """A stored tensor of two or more dimensions that are no 1: not a bias, a scale or a constant."""
    if value is None or not value.is_initializer() or value.shape is None or value.dtype is None:
        return False
    return value.dtype.is_floating_point() and sum(isinstance(dim, int) and dim > 1 for dim in value.shape) >= 2


def read_weights(graph: ir.Graph, reach: Reach) -> dict[ir.Node, list[ir.Value]]:
    """Node -> the weights that it reads, itself or through nodes that depend on no input (a transposed weight)."""
    behind: dict[ir.Value, list[ir.Value]] = {}
    found: dict[ir.Node, list[ir.Value]] = {}
    for node in graph:
        reads = [weight for value in read_values(node) for weight in ([value] if is_weight(value) else behind.get(value, []))]
        found[node] = list(dict.fromkeys(reads))
        if reads and not any(value in reach.varies for value in node.outputs):
            behind.update(dict.fromkeys(node.outputs, found[node]))
            found[node] = []
    return found


def size_reach(axis: Axis, modalities: Mapping[str, str | None]) -> frozenset[str]:
    """The modality that alone knows a size; none where a control input or several modalities have the axis."""
    owners = {modalities.get(str(value.name)) for value, _ in axis.places}
    if None in owners or len(owners) > 1:
        return NO_LABELS
    return frozenset(str(owner) for owner in owners)


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Every value of the main graph that a node reads, those that its subgraphs capture included."""
    seen: set[ir.Value] = set()
    for value in (*node.inputs, *captured_values(node)):
        if value is not None and value not in seen:
            seen.add(value)
            yield value


def captured_values(node: ir.Node) -> list[ir.Value]:
    """Values from outside that the bodies of a Loop, If or Scan read, in order of first use."""
    own: set[ir.Value] = set()
    found: dict[ir.Value, None] = {}

    def visit(graph: ir.Graph) -> None:
        own.update(graph.inputs)
        own.update(graph.initializers.values())
        for inner in graph:
            for value in inner.inputs:
                if value is not None and value not in own:
                    found[value] = None
            for body in bodies(inner):
                visit(body)
            own.update(inner.outputs)
        for value in graph.outputs:
            if value not in own:
                found[value] = None

    for body in bodies(node):
        visit(body)
    return list(found)


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs of a control flow operator."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def _is_table(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type in TABLE_LOOKUPS and value.is_initializer() and node.inputs[0] is value


def _shape_dims(node: ir.Node) -> list[int | ir.SymbolicDim] | None:
    """The dimensions that a Shape operator gives; None for other operators and unknown ranks."""
    if node.op_type != "Shape" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
        return None
    shape = node.inputs[0].shape
    if shape is None:
        return None
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(shape)
    return list(shape)[start:end] or None


def _constant_size(graph: ir.Graph, size: int, taken: set[str]) -> ir.Value:
    tensor = ir.tensor(np.array([size], np.int64))
    value = ir.Value(name=unused(f"size_{size}", taken), type=_INT64, shape=ir.Shape([1]), const_value=tensor)
    graph.initializers.add(value)
    return value


def _ask(graph: ir.Graph, axis: Axis, taken: set[str]) -> ir.Value:
    source, dim = axis.places[0]
    output = ir.Value(name=unused(f"size_of_{axis.symbol}", taken), type=_INT64, shape=ir.Shape([1]))
    node = ir.node("Shape", [source], {"start": dim, "end": dim + 1}, outputs=[output], name=output.name)
    graph.insert_before(graph[0], node)
    return output


def _join(graph: ir.Graph, before: ir.Node, pieces: list[ir.Value], taken: set[str]) -> ir.Value:
    output = ir.Value(name=unused(f"{before.outputs[0].name}_sizes", taken), type=_INT64, shape=ir.Shape([len(pieces)]))
    graph.insert_before(before, ir.node("Concat", pieces, {"axis": 0}, outputs=[output], name=output.name))
    return output


def unused(name: str, taken: set[str]) -> str:
    """The name, or the name with the first number from 2 on that makes it new; it is taken from now on."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
