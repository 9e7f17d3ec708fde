"""Rewrites of an exported program's graph that are clearer in torch's operators than in ONNX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import mfcompile.operators  # noqa: F401  # registers our own operators

aten = torch.ops.aten

CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout})
"""Operators that give their operand itself where there is nothing to cast."""


def rewrite(graph: fx.Graph) -> None:
    """Apply every rewrite, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            for rule in RULES:
                if rule(node):
                    break


def _skip_idle_cast(node: fx.Node) -> bool:
    """Skip a cast to the dtype that is there: as an output it makes torch's decomposition lose the output's name.

    ::

        x --> to(x, float32) --> ...      ==>      x --> ...
    """
    if node.target not in CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if (before.dtype, before.device, before.layout) != (after.dtype, after.device, after.layout):
        return False
    if node.args[0].op == "placeholder" and any(user.op == "output" for user in node.users):
        return False
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)
    return True


def _name_grouped_mm(node: fx.Node) -> bool:
    """One operator for grouped products; torch's own cannot be traced again in float32 (see ``mfcompile.operators``)."""
    if node.target is not aten._grouped_mm.default and str(node.target) != "transformers.grouped_mm_fallback.default":
        return False
    rows, weights, ends, *rest = [*node.args, node.kwargs.get("offs")][:3]
    bias = node.kwargs.get("bias", node.args[3] if len(node.args) > 3 else None)
    shapes = [getattr(item.meta.get("val"), "ndim", 0) for item in (rows, weights) if isinstance(item, fx.Node)]
    if rest or bias is not None or not isinstance(ends, fx.Node) or shapes != [2, 3]:
        return False
    node.target = torch.ops.mfcompile.grouped_mm.default
    node.args, node.kwargs = (rows, weights, ends), {}
    return True


def _zero_unattended(node: fx.Node) -> bool:
    """Attention of a query that may look at nothing is zero in torch; written out in ONNX it would be NaN or a mean.

    ::

        sdpa(q, k, v, mask)      ==>      where(any(mask), sdpa(q, k, v, mask), 0)
    """
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if not isinstance(mask, fx.Node):
        return False
    value = mask.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    graph = node.graph
    readers = list(node.users)
    with graph.inserting_after(node):
        seen = mask
        if value.dtype != torch.bool:
            seen = _insert(graph, node, aten.gt.Scalar, (mask, float("-inf")))
        attended = _insert(graph, seen if seen is not mask else node, aten.any.dim, (seen, -1, True))
        zero = _insert(graph, attended, aten.zeros_like.default, (node,))
        chosen = _insert(graph, zero, aten.where.self, (attended, node, zero))
    chosen.meta.update(node.meta)
    for reader in readers:
        reader.replace_input_with(node, chosen)
    return True


def _insert(graph: fx.Graph, after: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_after(after):
        node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda source: source.meta["val"])
    fake = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))
    with fake:
        node.meta["val"] = target(*values)
    return node


RULES: tuple[Callable[[fx.Node], bool], ...] = (_skip_idle_cast, _name_grouped_mm, _zero_unattended)
"""Each takes a node and says whether it rewrote it."""
