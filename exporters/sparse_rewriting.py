"""Linear layers over packed weights as SparseLinear nodes, in any onnx_ir graph.

::

    <fqn> --> Transpose --> MatMul --> Add --> Y         <fqn>.gaps ----+
                  X ----------^         ^            =>  <fqn>.values --+--> SparseLinear --> Y
                                bias ---+                X, bias -------+

A layer is told by structure: a product of any X with the weight as its right factor, by MatMul or Gemm, together with the
addition of a bias vector that follows. A weight that is read in any other way too (an embedding that is the output head as
well), or inside the body of control flow, keeps the nodes that decode it.

Where a file has its parameters is told in ``stored_weights``. They are never joined into one: q, k and v over one X stay
three nodes, because one node and a Split is no faster, with the runtime or without it
(``python -m benchmarks.sparse_export``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mfcompile.exporters.sparse_linear import DOMAIN, INT32_PLACES, VERSION, operator_type, sparse_linear_function

LEAST_OPSET, LEAST_IR = 13, 8
"""The oldest files that can hold the functions."""


@dataclass(frozen=True)
class LinearUse:
    """One layer that multiplies by a weight: ``output = x W^T + bias``.

    Attributes:
        nodes: MatMul or Gemm, and the Add of its bias where one follows.
    """

    nodes: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        """(..., K), as the graph has it now."""
        value = self.nodes[0].inputs[0]
        assert value is not None  # a product has a left factor
        return value

    @property
    def bias(self) -> ir.Value | None:
        """(N,), None where there is none."""
        product, last = self.nodes[0], self.nodes[-1]
        if last is not product:
            return last.inputs[1] if last.inputs[0] is product.outputs[0] else last.inputs[0]
        return product.inputs[2] if len(product.inputs) > 2 else None

    @property
    def output(self) -> ir.Value:
        """(..., N)."""
        return self.nodes[-1].outputs[0]

    def token_count(self, sizes: Mapping[str, int]) -> int | None:
        """Rows of X where named dimensions have these sizes; None where the graph does not tell."""
        if self.x.shape is None:
            return None
        count = 1
        for size in list(self.x.shape)[:-1]:
            known = size.evaluate(sizes) if isinstance(size, ir.SymbolicDim) else size
            if not isinstance(known, int):
                return None
            count *= known
        return count


@dataclass(frozen=True)
class LinearWeight:
    """A weight and the layers that multiply by it.

    Attributes:
        value: the weight in the graph.
        uses: the layers; empty where the weight is read in any other way.
        transposes: nodes between the weight and the layers.
        is_transposed: the weight is stored as (K, N).
        refusal: why there are no uses, in a few words; "" where there are.
    """

    value: ir.Value
    uses: tuple[LinearUse, ...]
    transposes: tuple[ir.Node, ...] = ()
    is_transposed: bool = False
    refusal: str = ""

    def token_count(self, sizes: Mapping[str, int]) -> int | None:
        """Rows of the layer that has the fewest, see ``LinearUse``; None where one of them is not known."""
        counts = [use.token_count(sizes) for use in self.uses]
        known = [count for count in counts if count is not None]
        return min(known) if known and len(known) == len(counts) else None


def holds_functions(model: ir.Model) -> bool:
    """The file is new enough for model-local functions."""
    return model.ir_version >= LEAST_IR and model.graph.opset_imports.get("", 0) >= LEAST_OPSET


def find_linear(weight: ir.Value, graph: ir.Graph) -> LinearWeight:
    """The layers that multiply by a weight; none, and why, where it is read in any other way.

    Args:
        weight: an initializer of the graph.
        graph: the main graph of the model.
    """
    if weight.is_graph_output():  # which declares a shape of its own, maybe one without sizes
        return LinearWeight(weight, (), refusal="it is an output")
    shape = () if weight.shape is None else weight.shape.numpy()
    if len(shape) != 2 or weight.dtype != ir.DataType.FLOAT:
        return LinearWeight(weight, (), refusal="it is no float32 matrix")
    rows, columns = shape
    if rows * columns > INT32_PLACES:
        return LinearWeight(weight, (), refusal="it has 2^31 places or more")
    transposes = tuple(node for node, _ in weight.uses() if _is_transpose(node) and node.graph is graph)
    readers = [(node, index, False) for node, index in weight.uses() if node not in transposes]
    readers += [(node, index, True) for swap in transposes for node, index in swap.outputs[0].uses()]
    if any(swap.outputs[0].is_graph_output() for swap in transposes):
        return LinearWeight(weight, (), refusal="it is an output")
    uses: list[LinearUse] = []
    stored: set[bool] = set()
    for node, index, is_swapped in readers:
        is_transposed = is_swapped == (_is_standard(node, "Gemm") and _flag(node, "transB"))
        use = _read_layer(node, index, columns if is_transposed else rows, graph)
        if use is None:
            return LinearWeight(weight, (), refusal=f"{node.op_type} reads it")
        uses.append(use)
        stored.add(is_transposed)
    if len(stored) != 1:
        return LinearWeight(weight, (), refusal="layers multiply by it and by its transpose" if stored else "nothing reads it")
    return LinearWeight(weight, tuple(uses), transposes, stored.pop())


def use_sparse_linear(
    model: ir.Model, layer: LinearWeight, encoding: str, gaps: ir.Value, values: ir.Value
) -> tuple[ir.Node, ...]:
    """Put SparseLinear nodes in place of every layer of a weight, and the functions that they need into the model.

    The weight and its transposes are left without readers: the transposes are removed, the initializer is the caller's.

    Args:
        model: changed in place.
        layer: with uses; see ``find_linear``.
        encoding: "gap8" or "gap4".
        gaps: initializer, the gaps of the weight as (N, K).
        values: initializer, its values.

    Returns:
        The nodes, one for each use.
    """
    rows, columns = _dense_shape(layer)
    attributes = {"shape": [rows, columns], "length": [rows * columns]}
    made = []
    for number, use in enumerate(layer.uses, start=1):
        has_bias = use.bias is not None
        inputs = [use.x, gaps, values, *([use.bias] if has_bias else [])]
        output = ir.Value(name=use.output.name, shape=use.output.shape, type=use.output.type)
        op_type = operator_type(encoding, has_bias=has_bias)
        name = f"{layer.value.name}" if number == 1 else f"{layer.value.name}.{number}"
        node = ir.node(op_type, inputs, attributes, domain=DOMAIN, outputs=[output], name=name)
        model.graph.insert_before(use.nodes[-1], node)
        use.output.replace_all_uses_with(output, replace_graph_outputs=True)
        for replaced in reversed(use.nodes):
            model.graph.remove(replaced, safe=True)
        _add_function(model, encoding, has_bias=has_bias)
        made.append(node)
    for swap in layer.transposes:
        model.graph.remove(swap, safe=True)
    return tuple(made)


def _dense_shape(layer: LinearWeight) -> tuple[int, int]:
    """(N, K)."""
    assert layer.value.shape is not None  # a weight with uses is a matrix
    first, second = layer.value.shape.numpy()
    return (second, first) if layer.is_transposed else (first, second)


def _is_transpose(node: ir.Node) -> bool:
    """Of a matrix."""
    perm = node.attributes.get("perm")
    return _is_standard(node, "Transpose") and (perm is None or list(perm.as_ints()) == [1, 0])


def _is_standard(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in ("", "ai.onnx")


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and attribute.as_int() != 0


def _read_layer(node: ir.Node, index: int, features: int, graph: ir.Graph) -> LinearUse | None:
    """The layer whose product this node is; None where it is none.

    Args:
        node: a reader of the weight or of its transpose.
        index: which of its inputs that is.
        features: N.
        graph: the main graph.
    """
    if node.graph is not graph or index != 1 or node.inputs[0] is None or node.inputs[0] is node.inputs[1]:
        return None
    product = node.outputs[0]
    if node.inputs[0].dtype not in (ir.DataType.FLOAT, None):
        return None
    if _is_standard(node, "Gemm"):
        addend = node.inputs[2] if len(node.inputs) > 2 else None
        if _flag(node, "transA") or _scale(node, "alpha") != 1 or (addend is not None and _scale(node, "beta") != 1):
            return None
        if addend is not None:
            return LinearUse((node,)) if _is_vector(addend, features) else None
    elif not _is_standard(node, "MatMul"):
        return None
    add = _only_reader(product)
    if add is not None and _is_standard(add, "Add") and add.graph is graph:
        addend = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
        if addend is not None and _is_vector(addend, features):
            return LinearUse((node, add))
    return LinearUse((node,))


def _scale(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = list(value.uses())
    return readers[0][0] if len(readers) == 1 and not value.is_graph_output() else None


def _is_vector(value: ir.Value, length: int) -> bool:
    """A float32 vector of this length, which an addition does not broadcast anything else to."""
    return value.shape is not None and list(value.shape) == [length] and value.dtype == ir.DataType.FLOAT


def _add_function(model: ir.Model, encoding: str, *, has_bias: bool) -> None:
    graph = model.graph
    proto = sparse_linear_function(encoding, graph.opset_imports[""], has_bias=has_bias)
    function = ir.serde.deserialize_function(proto)
    model.functions.setdefault(function.identifier(), function)
    graph.opset_imports[DOMAIN] = VERSION
