"""Operators of onnxruntime's own that do the work of several: attentions with their projections, sums with their norms."""

from __future__ import annotations

from itertools import pairwise

import onnx
import torch

from mfcompile.frontends.onnx_rules import Builder, attribute, multiply, operands, stand_in

aten = torch.ops.aten


def attention(builder: Builder, node: onnx.NodeProto) -> None:
    """An attention of projected queries, keys and values; where there is one operand it holds all three."""
    given = [builder.read(name) for name in node.input[:3] if name]
    query, key, value = (given * 3)[:3] if len(given) == 1 else (*given, given[-1])[:3]
    result = builder.call(aten.scaled_dot_product_attention.default, query, key, value, out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(stand_in("present"), key, value, result, out=name)


def fused_attention(builder: Builder, node: onnx.NodeProto) -> None:
    """Projection and attention in one: input (batch, length, in), weight (in, queries + keys + values)."""
    activation, weight = builder.read(node.input[0]), builder.read(node.input[1])
    sizes = list(attribute(node, "qkv_hidden_sizes", [])) or [(builder.shape(node.input[1]) or (0, 3))[1] // 3] * 3
    leading = list((builder.shape(node.input[0]) or (1, 1, 1))[:-1])
    projected = multiply(builder, activation, weight, "", [*leading, sum(sizes)])
    edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    parts = [
        builder.call(aten.slice.Tensor, projected, -1, start, stop, shape=[*leading, stop - start])
        for start, stop in pairwise(edges)
    ]
    result = builder.call(aten.scaled_dot_product_attention.default, *parts, out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(stand_in("present"), *parts[1:], result, out=name)


def skip_norm(builder: Builder, node: onnx.NodeProto) -> None:
    """Residual sum and norm in one; the fourth output is the sum."""
    given = operands(builder, node)
    shape = builder.shape(node.input[0])
    has_sum = len(node.output) > 3 and node.output[3]
    total = builder.call(aten.add.Tensor, *given[:2], out=node.output[3] if has_sum else "", shape=shape)
    builder.call(aten.layer_norm.default, total, list(shape or ())[-1:], *given[2:4], out=node.output[0])
    for name in node.output[1:3]:
        if name:
            builder.call(stand_in("norm_statistics"), total, out=name)


def embed_norm(builder: Builder, node: onnx.NodeProto) -> None:
    """Look-ups of words, positions and types, summed and normed."""
    words = builder.call(
        aten.embedding.default, builder.read(node.input[2]), builder.read(node.input[0]), shape=builder.shape(node.output[0])
    )
    builder.call(aten.layer_norm.default, words, [], out=node.output[0])
    for name in node.output[1:]:
        if name:
            builder.call(stand_in("embedding_statistics"), words, out=name)
