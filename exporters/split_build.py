"""The parts of a divided graph as models of their own; weights are shared, not copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from mfcompile.exporters.split_partition import PartPlan, partition
from mfcompile.exporters.split_reach import bodies
from mfcompile.split import SplitRequest


@dataclass(frozen=True)
class ModelPart:
    """One part, ready to be written.

    Attributes:
        name: "vision", "text", ..., "fusion".
        model: its graph; initializers share their tensors with the whole model's.
        sources: input name -> name of the part that gives it; inputs of the whole model are not in it.
    """

    name: str
    model: ir.Model
    sources: Mapping[str, str]


@dataclass(frozen=True)
class SplitModel:
    """A model divided into parts.

    Attributes:
        parts: in running order.
        input_names: inputs of the whole that any part reads, in order.
        output_names: outputs of the whole, in order.
        notes: decisions worth knowing.
    """

    parts: tuple[ModelPart, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    notes: tuple[str, ...]


def split_model(model: ir.Model, request: SplitRequest) -> SplitModel:
    """Divide a model into one part per modality and their fusion.

    Args:
        model: with named inputs, outputs and dimensions; values inside it may be renamed, what it computes stays.
        request: modalities, regions and sizes.

    Raises:
        ExportError: there is nothing to divide, or it cannot be divided; says why.
    """
    divided = partition(model, request)
    givers = {str(value.name): part for value, part in divided.crossings.items()}
    parts = []
    for plan in divided.parts:
        read = {str(value.name) for value in plan.inputs if not value.is_graph_input()}
        parts.append(ModelPart(plan.name, _build(model, plan), {name: givers[name] for name in sorted(read)}))
    used = {value for plan in divided.parts for value in plan.inputs}
    notes = list(divided.notes)
    for name, holders in shared_weights(parts).items():
        notes.append(f"{name} is stored in {' and '.join(holders)}: both use it")
    return SplitModel(
        tuple(parts),
        tuple(str(value.name) for value in model.graph.inputs if value in used),
        tuple(str(value.name) for value in model.graph.outputs),
        tuple(notes),
    )


def complete_request(
    request: SplitRequest, model: ir.Model, names: Mapping[str, Iterable[str]], example: Mapping[str, Tensor]
) -> SplitRequest:
    """The request with every name of a tied parameter, and the sizes that named dimensions have in the example.

    Args:
        request: regions by one name of each parameter.
        model: with named inputs and dimensions.
        names: parameter -> all of its names.
        example: input name -> tensor.
    """
    regions = {name: region for fqn, region in request.regions.items() for name in names.get(fqn, (fqn,))}
    return SplitRequest(request.modalities, regions, {**dimension_sizes(model, example), **request.sizes})


def dimension_sizes(model: ir.Model, example: Mapping[str, Tensor]) -> dict[str, int]:
    """Named dimension of the model's inputs -> its size in the example.

    Args:
        model: with named inputs and dimensions.
        example: input name -> tensor.
    """
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        shape = example[str(value.name)].shape if str(value.name) in example else ()
        for size, length in zip(value.shape or (), shape, strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                sizes[size.value] = int(length)
    return sizes


def shared_weights(parts: list[ModelPart]) -> dict[str, list[str]]:
    """Matrices that several parts store -> the names of these parts."""
    holders: dict[str, list[str]] = {}
    for part in parts:
        for name, value in part.model.graph.initializers.items():
            shape = value.shape
            if shape is not None and sum(isinstance(dim, int) and dim > 1 for dim in shape) >= 2 and _is_float(value):
                holders.setdefault(name, []).append(part.name)
    return {name: names for name, names in holders.items() if len(names) > 1}


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _build(model: ir.Model, plan: PartPlan) -> ir.Model:
    made: dict[ir.Value, ir.Value] = {}
    inputs = [_copy_value(value, made) for value in plan.inputs]
    initializers: list[ir.Value] = []
    nodes: list[ir.Node] = []
    for node in plan.nodes:
        if node.outputs[0] in plan.sizes:
            source, dim = plan.sizes[node.outputs[0]]
            attributes = {"start": ir.AttrInt64("start", dim), "end": ir.AttrInt64("end", dim + 1)}
            nodes.append(_new_node(node, [made[source]], list(attributes.values()), made))
        else:
            nodes.append(_copy_node(node, made, initializers))
    outputs = [made[value] for value in plan.outputs]
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=dict(model.opset_imports), name=plan.name
    )
    used = {node.op_identifier() for node in graph.all_nodes()}
    functions = [function for function in model.functions.values() if function.identifier() in _closure(model, used)]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def _closure(model: ir.Model, used: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    """Functions that are called, and those that they call."""
    found, pending = set[tuple[str, str, str]](), list(used)
    while pending:
        name = pending.pop()
        if name in found or name not in model.functions:
            continue
        found.add(name)
        pending += [node.op_identifier() for node in model.functions[name].all_nodes()]
    return found


def _copy_value(value: ir.Value, made: dict[ir.Value, ir.Value]) -> ir.Value:
    copy = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
    made[value] = copy
    return copy


def _copy_node(node: ir.Node, made: dict[ir.Value, ir.Value], initializers: list[ir.Value]) -> ir.Node:
    """A node over copied values; initializers of the main graph are copied when they are first read."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is not None and value not in made:
            initializers.append(_copy_value(value, made))
        inputs.append(None if value is None else made[value])
    attributes = [_copy_attribute(item, made, initializers) if bodies(node) else item for item in node.attributes.values()]
    return _new_node(node, inputs, attributes, made)


def _new_node(
    node: ir.Node, inputs: list[ir.Value] | list[ir.Value | None], attributes: list[ir.Attr], made: dict[ir.Value, ir.Value]
) -> ir.Node:
    outputs = [_copy_value(value, made) for value in node.outputs]
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        attributes,
        overload=node.overload,
        outputs=outputs,
        name=node.name,
        version=node.version,
    )


def _copy_attribute(attribute: ir.Attr, made: dict[ir.Value, ir.Value], initializers: list[ir.Value]) -> ir.Attr:
    if attribute.type == ir.AttributeType.GRAPH:
        return ir.AttrGraph(attribute.name, _copy_body(attribute.as_graph(), made, initializers))
    if attribute.type == ir.AttributeType.GRAPHS:
        return ir.AttrGraphs(attribute.name, [_copy_body(body, made, initializers) for body in attribute.as_graphs()])
    return attribute


def _copy_body(body: ir.Graph, made: dict[ir.Value, ir.Value], outer: list[ir.Value]) -> ir.Graph:
    """A body of control flow; what it captures from outside is found in ``made``, or is an outer initializer."""
    inputs = [_copy_value(value, made) for value in body.inputs]
    own = [_copy_value(value, made) for value in body.initializers.values()]
    nodes = [_copy_node(node, made, outer) for node in body]
    for value in body.outputs:
        if value not in made:
            outer.append(_copy_value(value, made))
    outputs = [made[value] for value in body.outputs]
    return ir.Graph(inputs, outputs, nodes=nodes, initializers=own, opset_imports=dict(body.opset_imports), name=body.name)
