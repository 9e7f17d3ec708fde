"""ONNX operators as the aten operators of the same meaning, for passes that read graphs.

The graph is read, not run: operands and what they do with one another are right, numbers that no pass asks for are left
out. Only views of stored tensors can be run, on meta tensors, which is how weights are followed. An operator without an
entry is one opaque node of its operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import onnx
import torch
from torch import fx

from mfcompile.onnx_file import ELEMENT_TYPES

aten = torch.ops.aten

MICROSOFT = "com.microsoft"


class Builder(Protocol):
    """What the rules may ask for and do."""

    def read(self, name: str) -> fx.Node:
        """The node of a value."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Its sizes in the example."""

    def numbers(self, name: str) -> list[int] | None:
        """Its integers, where they are known."""

    def is_matrix(self, node: fx.Node) -> bool:
        """The node is a 2-D view of a stored float tensor."""

    def is_stored(self, node: fx.Node) -> bool:
        """The node is a view of a stored tensor."""

    def call(self, target: Any, *args: Any, out: str = "", shape: Sequence[int] | None = None) -> fx.Node:
        """Add a node; it is the value ``out``, or a step of its own of this shape."""


Rule = Callable[[Builder, onnx.NodeProto], None]


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of a node, or the default."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def emit(builder: Builder, node: onnx.NodeProto) -> None:
    """Add the nodes that one ONNX node stands for."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = _RULES.get((domain, node.op_type))
    if rule is None or not node.input:
        _opaque(builder, node)
    else:
        rule(builder, node)


def content_free(name: str) -> Callable[..., Any]:
    """A stand-in for an operator whose result carries no content, or for one that aten does not have."""
    known = _STAND_INS.get(name)
    if known is None:

        def stand_in(*args: Any) -> Any:
            raise RuntimeError("this graph is read, not run")

        stand_in.__name__ = stand_in.__qualname__ = name
        known = _STAND_INS.setdefault(name, stand_in)
    return known


_STAND_INS: dict[str, Callable[..., Any]] = {}


def _operands(builder: Builder, node: onnx.NodeProto, start: int = 0) -> list[fx.Node]:
    return [builder.read(name) for name in node.input[start:] if name]


def free_names(node: onnx.NodeProto) -> list[str]:
    """Names that the bodies of a control-flow node read from around it, in order."""
    found: dict[str, None] = {}

    def visit(graph: onnx.GraphProto, known: set[str]) -> None:
        known = known | {item.name for item in (*graph.input, *graph.initializer)}
        for inner in graph.node:
            found.update((name, None) for name in inner.input if name and name not in known)
            for item in inner.attribute:
                for body in (item.g, *item.graphs) if item.type in _GRAPHS else ():
                    visit(body, known)
            known |= set(inner.output)
        found.update((item.name, None) for item in graph.output if item.name not in known)

    for item in node.attribute:
        for body in ((item.g,) if item.type == onnx.AttributeProto.GRAPH else item.graphs):
            visit(body, set())
    return list(found)


_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _opaque(builder: Builder, node: onnx.NodeProto, name: str = "", start: int = 0) -> None:
    """One node that reads all operands, and one item of it per output."""
    operands = [*_operands(builder, node, start), *(builder.read(item) for item in free_names(node))]
    _several(builder, node, builder.call(content_free(name or node.op_type.lower()), *operands, out=_only_output(node)))


def _only_output(node: onnx.NodeProto) -> str:
    return node.output[0] if len(node.output) == 1 else ""


def _several(builder: Builder, node: onnx.NodeProto, result: fx.Node) -> None:
    if len(node.output) > 1:
        for index, name in enumerate(node.output):
            if name:
                builder.call(operator.getitem, result, index, out=name)


def _plain(target: Any) -> Rule:
    """All operands, in order."""
    return lambda builder, node: _several(
        builder, node, builder.call(target, *_operands(builder, node), out=_only_output(node))
    )


def _first(target: Any) -> Rule:
    """The first operand; the others say how."""
    return lambda builder, node: _several(
        builder, node, builder.call(target, builder.read(node.input[0]), out=_only_output(node))
    )


def _constant(name: str) -> Rule:
    """An operator whose result carries no content."""
    return _plain(content_free(name))


def _swap(builder: Builder, node: fx.Node) -> fx.Node:
    shape = list(node.meta["val"].shape)
    return builder.call(aten.transpose.int, node, -2, -1, shape=[*shape[:-2], shape[-1], shape[-2]])


def _multiply(builder: Builder, first: fx.Node, second: fx.Node, out: str, shape: Sequence[int] | None = None) -> fx.Node:
    """A stored matrix on the right makes a linear layer, as torch has it; every other product is one of activations."""
    if builder.is_matrix(second) and not (builder.is_stored(first) and builder.is_matrix(first)):
        return builder.call(aten.linear.default, first, _swap(builder, second), out=out, shape=shape)
    return builder.call(aten.matmul.default, first, second, out=out, shape=shape)


def _matmul(builder: Builder, node: onnx.NodeProto) -> None:
    first, second = builder.read(node.input[0]), builder.read(node.input[1])
    first = _swap(builder, first) if attribute(node, "transA", 0) else first
    second = _swap(builder, second) if attribute(node, "transB", 0) else second
    extra = [builder.read(name) for name in node.input[2:3] if name]
    shape = builder.shape(node.output[0])
    product = _multiply(builder, first, second, "" if extra else node.output[0], shape)
    if extra:
        builder.call(aten.add.Tensor, product, *extra, out=node.output[0])


def _einsum(builder: Builder, node: onnx.NodeProto) -> None:
    equation = attribute(node, "equation", b"").decode()
    builder.call(aten.einsum.default, equation, _operands(builder, node), out=node.output[0])


def _conv(builder: Builder, node: onnx.NodeProto) -> None:
    shape = builder.shape(node.input[1])
    rank = len(shape) - 2 if shape else 2
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}.get(rank, aten.conv2d.default)
    operands = _operands(builder, node)
    bias = operands[2] if len(operands) > 2 else None
    padding = list(attribute(node, "pads", [0] * rank))[:rank]
    steps = [list(attribute(node, key, [1] * rank)) for key in ("strides", "dilations")]
    builder.call(target, *operands[:2], bias, steps[0], padding, steps[1], attribute(node, "group", 1), out=node.output[0])


def _reshape(builder: Builder, node: onnx.NodeProto) -> None:
    shape = builder.shape(node.output[0])
    if shape is None:
        _opaque(builder, node)
        return
    builder.call(aten.reshape.default, builder.read(node.input[0]), list(shape), out=node.output[0])


def _expand(builder: Builder, node: onnx.NodeProto) -> None:
    shape = builder.shape(node.output[0])
    builder.call(aten.expand.default, builder.read(node.input[0]), list(shape or ()), out=node.output[0])


def _transpose(builder: Builder, node: onnx.NodeProto) -> None:
    source = builder.read(node.input[0])
    rank = len(builder.shape(node.output[0]) or ())
    order = list(attribute(node, "perm", range(rank - 1, -1, -1)))
    builder.call(aten.permute.default, source, order, out=node.output[0])


def _cast(builder: Builder, node: onnx.NodeProto) -> None:
    dtype = ELEMENT_TYPES.get(attribute(node, "to", 0))
    source = builder.read(node.input[0])
    if dtype is None:
        builder.call(aten.alias.default, source, out=node.output[0])
    else:
        builder.call(aten.to.dtype, source, dtype, out=node.output[0])


def _slice(builder: Builder, node: onnx.NodeProto) -> None:
    current = builder.read(node.input[0])
    source_shape = builder.shape(node.input[0])
    if len(node.input) == 1:  # opset 1
        starts, ends = list(attribute(node, "starts")), list(attribute(node, "ends"))
        axes: list[int] | None = list(attribute(node, "axes", range(len(starts))))
        steps: list[int] | None = [1] * len(starts)
    else:
        given = [builder.numbers(name) if name else None for name in (*node.input[1:], "", "")]
        starts, ends = given[0] or [], given[1] or []
        axes = given[2] if len(node.input) > 3 and node.input[3] else list(range(len(starts)))
        steps = given[3] if len(node.input) > 4 and node.input[4] else [1] * len(starts)
    is_known = starts and len(starts) == len(ends) and axes is not None and steps is not None and source_shape is not None
    if not is_known or any(step < 1 for step in steps or ()):
        builder.call(content_free("slice_unknown"), current, out=node.output[0])
        return
    assert axes is not None
    assert steps is not None
    assert source_shape is not None
    shape = list(source_shape)
    for index, (axis, start, end, step) in enumerate(zip(axes, starts, ends, steps, strict=True)):
        bounds = slice(start, end, step).indices(shape[axis])
        shape[axis] = len(range(*bounds))
        is_last = index + 1 == len(starts)
        current = builder.call(
            aten.slice.Tensor, current, axis, bounds[0], bounds[1], step, out=node.output[0] if is_last else "", shape=shape
        )


def _split(builder: Builder, node: onnx.NodeProto) -> None:
    axis = attribute(node, "axis", 0)
    shapes = [builder.shape(name) for name in node.output]
    source = builder.read(node.input[0])
    if any(shape is None for shape in shapes):
        _opaque(builder, node)
        return
    sizes = [shape[axis] for shape in shapes if shape is not None]
    parts = builder.call(aten.split_with_sizes.default, source, sizes, axis)
    for index, name in enumerate(node.output):
        builder.call(operator.getitem, parts, index, out=name)


def _gather(builder: Builder, node: onnx.NodeProto) -> None:
    table, index = builder.read(node.input[0]), builder.read(node.input[1])
    axis, known = attribute(node, "axis", 0), builder.numbers(node.input[1])
    out = node.output[0]
    if known is not None and len(known) == 1 and builder.shape(node.input[1]) == () and index.op == "get_attr":
        builder.call(aten.select.int, table, axis, known[0], out=out)
    elif builder.is_stored(table) and axis == 0 and len(builder.shape(node.input[0]) or ()) == 2:
        builder.call(aten.embedding.default, table, index, out=out)
    else:
        builder.call(aten.index_select.default, table, axis, index, out=out)


def _scatter_nd(builder: Builder, node: onnx.NodeProto) -> None:
    data, index, updates = _operands(builder, node)
    builder.call(aten.index_put.default, data, [index], updates, out=node.output[0])


def _scatter(builder: Builder, node: onnx.NodeProto) -> None:
    data, index, updates = _operands(builder, node)
    builder.call(aten.scatter.src, data, attribute(node, "axis", 0), index, updates, out=node.output[0])


def _gather_elements(builder: Builder, node: onnx.NodeProto) -> None:
    data, index = _operands(builder, node)
    builder.call(aten.gather.default, data, attribute(node, "axis", 0), index, out=node.output[0])


def _gather_nd(builder: Builder, node: onnx.NodeProto) -> None:
    data, index = _operands(builder, node)
    builder.call(aten.index.Tensor, data, [index], out=node.output[0])


def _concat(builder: Builder, node: onnx.NodeProto) -> None:
    builder.call(aten.cat.default, _operands(builder, node), attribute(node, "axis", 0), out=node.output[0])


def _softmax(builder: Builder, node: onnx.NodeProto) -> None:
    builder.call(aten.softmax.int, builder.read(node.input[0]), attribute(node, "axis", -1), out=node.output[0])


def _branch(builder: Builder, node: onnx.NodeProto) -> None:
    """If, Loop and Scan as one operator of all that their bodies read; what decides only steers."""
    _opaque(builder, node, start={"If": 1, "Loop": 2}.get(node.op_type, 0))


def _attention(builder: Builder, node: onnx.NodeProto) -> None:
    """An attention of projected queries, keys and values; where there is one operand it holds all three."""
    given = [builder.read(name) for name in node.input[:3] if name]
    query, key, value = (given * 3)[:3] if len(given) == 1 else (*given, given[-1])[:3]
    result = builder.call(aten.scaled_dot_product_attention.default, query, key, value, out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(content_free("present"), key, value, result, out=name)


def _fused_attention(builder: Builder, node: onnx.NodeProto) -> None:
    """Projection and attention in one: input (batch, length, in), weight (in, queries + keys + values)."""
    activation, weight = builder.read(node.input[0]), builder.read(node.input[1])
    sizes = list(attribute(node, "qkv_hidden_sizes", [])) or [(builder.shape(node.input[1]) or (0, 3))[1] // 3] * 3
    leading = list((builder.shape(node.input[0]) or (1, 1, 1))[:-1])
    projected = _multiply(builder, activation, weight, "", [*leading, sum(sizes)])
    edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    parts = [
        builder.call(aten.slice.Tensor, projected, -1, start, stop, shape=[*leading, stop - start])
        for start, stop in zip(edges, edges[1:], strict=False)
    ]
    result = builder.call(aten.scaled_dot_product_attention.default, *parts, out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(content_free("present"), *parts[1:], result, out=name)


def _skip_norm(builder: Builder, node: onnx.NodeProto) -> None:
    """Residual sum and norm in one; the fourth output is the sum."""
    operands = _operands(builder, node)
    shape = builder.shape(node.input[0])
    has_sum = len(node.output) > 3 and node.output[3]
    total = builder.call(aten.add.Tensor, *operands[:2], out=node.output[3] if has_sum else "", shape=shape)
    builder.call(aten.layer_norm.default, total, list(shape or ())[-1:], *operands[2:4], out=node.output[0])
    for name in node.output[1:3]:
        if name:
            builder.call(content_free("norm_statistics"), total, out=name)


def _embed_norm(builder: Builder, node: onnx.NodeProto) -> None:
    """Look-ups of words, positions and types, summed and normed."""
    words = builder.call(
        aten.embedding.default, builder.read(node.input[2]), builder.read(node.input[0]), shape=builder.shape(node.output[0])
    )
    builder.call(aten.layer_norm.default, words, [], out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(content_free("embedding_statistics"), words, out=name)


def _where(builder: Builder, node: onnx.NodeProto) -> None:
    condition, _, other = _operands(builder, node)
    if condition.target is content_free("isnan") and condition.args[0] is other:
        # A softmax over nothing but masked places is put to zero; it is the same softmax.
        builder.call(aten.nan_to_num.default, other, out=node.output[0])
        return
    builder.call(aten.where.self, *_operands(builder, node), out=node.output[0])


def _layer_norm(builder: Builder, node: onnx.NodeProto) -> None:
    operands = _operands(builder, node)
    shape = builder.shape(node.input[0]) or (0,)
    result = builder.call(aten.layer_norm.default, operands[0], [shape[-1]], *operands[1:], out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(content_free("norm_statistics"), result, out=name)


_ELEMENTWISE = {
    "Add": aten.add.Tensor, "Sub": aten.sub.Tensor, "Mul": aten.mul.Tensor, "Div": aten.div.Tensor,
    "Pow": aten.pow.Tensor_Tensor, "Sqrt": aten.sqrt.default, "Erf": aten.erf.default, "Tanh": aten.tanh.default,
    "Sigmoid": aten.sigmoid.default, "Relu": aten.relu.default, "Gelu": aten.gelu.default, "Neg": aten.neg.default,
    "Exp": aten.exp.default, "Log": aten.log.default, "Abs": aten.abs.default, "Sin": aten.sin.default,
    "Cos": aten.cos.default, "Reciprocal": aten.reciprocal.default, "Clip": aten.clamp.default,
    "Min": aten.minimum.default, "Max": aten.maximum.default, "Sum": aten.add.Tensor, "CumSum": aten.cumsum.default,
}  # fmt: skip

_TRUTHS = {
    "Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge", "Not": "logical_not",
    "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor", "IsNaN": "isnan", "IsInf": "isinf",
    "NonZero": "nonzero", "Shape": "size", "Size": "numel", "ConstantOfShape": "full", "Range": "arange",
    "EyeLike": "eye", "RandomNormalLike": "randn_like", "RandomUniformLike": "rand_like", "Bernoulli": "bernoulli",
}  # fmt: skip

_REDUCTIONS = {
    "ReduceSum": aten.sum.dim_IntList, "ReduceMean": aten.mean.dim, "ReduceMax": aten.amax.default,
    "ReduceMin": aten.amin.default, "ArgMax": aten.argmax.default, "ArgMin": aten.argmin.default,
    "ReduceL2": aten.linalg_vector_norm.default, "LogSoftmax": aten.log_softmax.int, "Tile": aten.repeat.default,
    "Pad": aten.constant_pad_nd.default, "Identity": aten.alias.default, "Dropout": aten.alias.default,
}  # fmt: skip

_RULES: dict[tuple[str, str], Rule] = {
    **{("", name): _plain(target) for name, target in _ELEMENTWISE.items()},
    **{("", name): _constant(target) for name, target in _TRUTHS.items()},
    **{("", name): _first(target) for name, target in _REDUCTIONS.items()},
    **{("", name): _reshape for name in ("Reshape", "Squeeze", "Unsqueeze", "Flatten")},
    **{("", name): _branch for name in ("If", "Loop", "Scan")},
    **{(domain, name): _matmul for domain in ("", MICROSOFT) for name in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")},
    **{(MICROSOFT, name): _attention for name in ("MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention")},
    **{(MICROSOFT, name): _skip_norm for name in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")},
    **{
        (domain, name): _layer_norm
        for domain in ("", MICROSOFT)
        for name in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    },
    **{(MICROSOFT, name): _plain(aten.gelu.default) for name in ("Gelu", "FastGelu", "BiasGelu", "QuickGelu")},
    (MICROSOFT, "Attention"): _fused_attention,
    (MICROSOFT, "EmbedLayerNormalization"): _embed_norm,
    ("", "Attention"): _attention,
    ("", "Einsum"): _einsum,
    ("", "Conv"): _conv,
    ("", "Expand"): _expand,
    ("", "Transpose"): _transpose,
    ("", "Cast"): _cast,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Gather"): _gather,
    ("", "GatherElements"): _gather_elements,
    ("", "GatherND"): _gather_nd,
    ("", "ScatterND"): _scatter_nd,
    ("", "ScatterElements"): _scatter,
    ("", "Concat"): _concat,
    ("", "Softmax"): _softmax,
    ("", "Where"): _where,
}
