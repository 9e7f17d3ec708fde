"""ONNX operators as the aten operators of the same meaning, for passes that read graphs.

The graph is read, not run: operands and what they do with one another are right, numbers that no pass asks for are left
out. Only views of stored tensors can be run, on meta tensors, which is how weights are followed. An operator without an
entry is one opaque node of its operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import fx

from mfcompile.frontends.onnx_fused import attention, embed_norm, fused_attention, skip_norm
from mfcompile.frontends.onnx_rules import Builder, attribute, multiply, operands, stand_in, swap
from mfcompile.onnx_file import ELEMENT_TYPES

aten = torch.ops.aten

MICROSOFT = "com.microsoft"


Rule = Callable[[Builder, onnx.NodeProto], None]


def emit(builder: Builder, node: onnx.NodeProto) -> None:
    """Add the nodes that one ONNX node stands for."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = _RULES.get((domain, node.op_type))
    if rule is None or not node.input:
        _opaque(builder, node)
    else:
        rule(builder, node)


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
        for body in (item.g,) if item.type == onnx.AttributeProto.GRAPH else item.graphs:
            visit(body, set())
    return list(found)


_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _opaque(builder: Builder, node: onnx.NodeProto, name: str = "", start: int = 0) -> None:
    """One node that reads all operands, and one item of it per output."""
    given = [*operands(builder, node, start), *(builder.read(item) for item in free_names(node))]
    _several(builder, node, builder.call(stand_in(name or node.op_type.lower()), *given, out=_only_output(node)))


def _only_output(node: onnx.NodeProto) -> str:
    return node.output[0] if len(node.output) == 1 else ""


def _several(builder: Builder, node: onnx.NodeProto, result: fx.Node) -> None:
    if len(node.output) > 1:
        for index, name in enumerate(node.output):
            if name:
                builder.call(operator.getitem, result, index, out=name)


def _plain(target: Any) -> Rule:
    """All operands, in order."""
    return lambda builder, node: _several(builder, node, builder.call(target, *operands(builder, node), out=_only_output(node)))


def _first(target: Any) -> Rule:
    """The first operand; the others say how."""
    return lambda builder, node: _several(
        builder, node, builder.call(target, builder.read(node.input[0]), out=_only_output(node))
    )


def _constant(name: str) -> Rule:
    """An operator whose result carries no content."""
    return _plain(stand_in(name))


def _matmul(builder: Builder, node: onnx.NodeProto) -> None:
    first, second = builder.read(node.input[0]), builder.read(node.input[1])
    first = swap(builder, first) if attribute(node, "transA", 0) else first
    second = swap(builder, second) if attribute(node, "transB", 0) else second
    extra = [builder.read(name) for name in node.input[2:3] if name]
    shape = builder.shape(node.output[0])
    product = multiply(builder, first, second, "" if extra else node.output[0], shape)
    if extra:
        builder.call(aten.add.Tensor, product, *extra, out=node.output[0])


def _einsum(builder: Builder, node: onnx.NodeProto) -> None:
    equation = attribute(node, "equation", b"").decode()
    builder.call(aten.einsum.default, equation, operands(builder, node), out=node.output[0])


def _conv(builder: Builder, node: onnx.NodeProto) -> None:
    shape = builder.shape(node.input[1])
    rank = len(shape) - 2 if shape else 2
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}.get(rank, aten.conv2d.default)
    given = operands(builder, node)
    bias = given[2] if len(given) > 2 else None
    padding = list(attribute(node, "pads", [0] * rank))[:rank]
    steps = [list(attribute(node, key, [1] * rank)) for key in ("strides", "dilations")]
    builder.call(target, *given[:2], bias, steps[0], padding, steps[1], attribute(node, "group", 1), out=node.output[0])


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
        builder.call(stand_in("slice_unknown"), current, out=node.output[0])
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
    data, index, updates = operands(builder, node)
    builder.call(aten.index_put.default, data, [index], updates, out=node.output[0])


def _scatter(builder: Builder, node: onnx.NodeProto) -> None:
    data, index, updates = operands(builder, node)
    builder.call(aten.scatter.src, data, attribute(node, "axis", 0), index, updates, out=node.output[0])


def _gather_elements(builder: Builder, node: onnx.NodeProto) -> None:
    data, index = operands(builder, node)
    builder.call(aten.gather.default, data, attribute(node, "axis", 0), index, out=node.output[0])


def _gather_nd(builder: Builder, node: onnx.NodeProto) -> None:
    data, index = operands(builder, node)
    builder.call(aten.index.Tensor, data, [index], out=node.output[0])


def _concat(builder: Builder, node: onnx.NodeProto) -> None:
    builder.call(aten.cat.default, operands(builder, node), attribute(node, "axis", 0), out=node.output[0])


def _softmax(builder: Builder, node: onnx.NodeProto) -> None:
    builder.call(aten.softmax.int, builder.read(node.input[0]), attribute(node, "axis", -1), out=node.output[0])


def _branch(builder: Builder, node: onnx.NodeProto) -> None:
    """If, Loop and Scan as one operator of all that their bodies read; what decides only steers."""
    _opaque(builder, node, start={"If": 1, "Loop": 2}.get(node.op_type, 0))


def _where(builder: Builder, node: onnx.NodeProto) -> None:
    condition, one, other = operands(builder, node)
    if condition.target is stand_in("isnan") and condition.args[0] is other:
        # A softmax over nothing but masked places is put to zero; it is the same softmax.
        builder.call(aten.nan_to_num.default, other, out=node.output[0])
        return
    # Constants at masked places: what a module has as masked_fill (whichever way round the condition is).
    if builder.is_constant(one) is not builder.is_constant(other):
        content, filler = (other, one) if builder.is_constant(one) else (one, other)
        builder.call(aten.masked_fill.Tensor, content, condition, filler, out=node.output[0])
        return
    builder.call(aten.where.self, condition, one, other, out=node.output[0])


def _layer_norm(builder: Builder, node: onnx.NodeProto) -> None:
    given = operands(builder, node)
    shape = builder.shape(node.input[0]) or (0,)
    result = builder.call(aten.layer_norm.default, given[0], [shape[-1]], *given[1:], out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(stand_in("norm_statistics"), result, out=name)


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
    **{(MICROSOFT, name): attention for name in ("MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention")},
    **{(MICROSOFT, name): skip_norm for name in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")},
    **{
        (domain, name): _layer_norm
        for domain in ("", MICROSOFT)
        for name in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    },
    **{(MICROSOFT, name): _plain(aten.gelu.default) for name in ("Gelu", "FastGelu", "BiasGelu", "QuickGelu")},
    (MICROSOFT, "Attention"): fused_attention,
    (MICROSOFT, "EmbedLayerNormalization"): embed_norm,
    ("", "Attention"): attention,
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
