"""Find every use of a stored linear weight in a graph, by following its views.

A parameter reaches the operator that multiplies it through transposes, slices, splits and reshapes. These are run
on a meta tensor of the same shape; offset and strides of the result then tell which output rows are used and which
way round the weight is stored. Shapes alone cannot tell, and names are not asked.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mfcompile.graph import CapturedGraph, Diagnostic, module_stack
from mfcompile.passes.operators import CONTRACTIONS, argument, is_view, operator_name
from mfcompile.region import WeightUse

_KEEPS_LAYOUT = frozenset({"to", "contiguous", "clone", "detach", "alias", "lift_fresh", "_to_copy", "detach_"})
_SPLITS = frozenset({"split", "chunk", "unbind", "split_with_sizes", "tensor_split"})


@dataclass(frozen=True)
class OperandView:
    """How a 2-D operand lies in the parameter it is a view of.

    Attributes:
        rows: output rows, [start, stop).
        is_transposed: the parameter is stored (in_features, out_features).
    """

    rows: tuple[int, int]
    is_transposed: bool


def locate_operand(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, contracted: int, parameter_shape: tuple[int, ...]
) -> OperandView | None:
    """Which rows of a parameter a 2-D operand is.

    Args:
        shape, stride, offset: of the operand, offset counted from the start of the parameter.
        contracted: dimension of the operand that is summed over.
        parameter_shape: (out_features, in_features), or (in_features, out_features), of a contiguous parameter.

    Returns:
        None when the operand is no block of whole output rows.
    """
    if len(shape) != 2 or len(parameter_shape) != 2:
        return None
    height, width = parameter_shape
    inputs, outputs = shape[contracted], shape[1 - contracted]
    step_in, step_out = stride[contracted], stride[1 - contracted]
    # A dimension of size one may carry any stride.
    if inputs == width and (step_in == 1 or inputs == 1) and (step_out == width or outputs == 1) and offset % width == 0:
        start = offset // width
        return OperandView((start, start + outputs), is_transposed=False)
    if inputs == height and (step_in == width or inputs == 1) and (step_out == 1 or outputs == 1) and offset < width:
        return OperandView((offset, offset + outputs), is_transposed=True)
    return None


def operands(node: fx.Node) -> list[tuple[fx.Node, int, fx.Node, int]]:
    """(operand that may be a weight, its contracted dimension, the other operand, its contracted dimension from the end)."""
    name = operator_name(node)
    if name == "linear":
        pairs = [(argument(node, "weight", 1), 1, argument(node, "input", 0), -1)]
    elif name in {"mm", "matmul", "bmm"}:
        first = argument(node, "self", 0)
        second = argument(node, "mat2", 1, node.kwargs.get("other"))
        pairs = [(second, 0, first, -1), (first, 1, second, -2)]
    elif name == "addmm":
        first, second = argument(node, "mat1", 1), argument(node, "mat2", 2)
        pairs = [(second, 0, first, -1), (first, 1, second, -2)]
    elif name == "einsum":
        return _einsum_operands(node)
    else:
        return []
    return [(weight, dim, other, at) for weight, dim, other, at in pairs
            if isinstance(weight, fx.Node) and isinstance(other, fx.Node)]  # fmt: skip


def _einsum_operands(node: fx.Node) -> list[tuple[fx.Node, int, fx.Node, int]]:
    equation, tensors = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return []
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    found = []
    for weight, other in ((1, 0), (0, 1)):
        summed = [letter for letter in terms[weight] if letter in terms[other] and letter not in result]
        if len(terms[weight]) == 2 and len(summed) == 1 and isinstance(tensors[weight], fx.Node) and isinstance(tensors[other], fx.Node):
            position = terms[other].index(summed[0]) - len(terms[other])
            found.append((tensors[weight], terms[weight].index(summed[0]), tensors[other], position))
    return found


def find_weight_uses(captured: CapturedGraph) -> tuple[tuple[WeightUse, ...], tuple[Diagnostic, ...]]:
    """Every contraction of an activation with (rows of) a stored 2-D weight, in execution order.

    Returns:
        The uses (labels not yet filled in), and a diagnostic for every contraction with a parameter that could not
        be read as whole rows of a linear weight.
    """
    views = parameter_views(captured)
    uses: list[WeightUse] = []
    refused: list[Diagnostic] = []
    for node in captured.graph.nodes:
        if operator_name(node) not in CONTRACTIONS:
            continue
        for weight, contracted, other, feature_dim in operands(node):
            # Two parameters may meet in a product (learned queries times a weight): only "linear" says which is which.
            if weight not in views or (other in views and operator_name(node) != "linear"):
                continue
            fqn, view = views[weight]
            located = _locate(captured.parameter(fqn), view, contracted)
            if located is None:
                refused.append(Diagnostic(fqn, _refusal(node, captured.parameter(fqn), view)))
                continue
            uses.append(
                WeightUse(
                    node=node.name, fqn=fqn, rows=located.rows, is_transposed=located.is_transposed,
                    activation=other.name, feature_dim=feature_dim,
                    stack=tuple(call.path for call in module_stack(node)),
                )
            )  # fmt: skip
            break
    return tuple(uses), tuple(refused)


def _locate(parameter: Tensor, view: Tensor, contracted: int) -> OperandView | None:
    shape = tuple(view.shape)
    if view.ndim != 2:
        return None
    return locate_operand(shape, view.stride(), int(view.storage_offset()), contracted, tuple(parameter.shape))


def _refusal(node: fx.Node, parameter: Tensor, view: Tensor) -> str:
    if parameter.ndim != 2:
        return f"a {parameter.ndim}-D weight {tuple(parameter.shape)}, used by {node.name}: only 2-D linear weights are pruned"
    return f"{node.name} uses {tuple(view.shape)} of {tuple(parameter.shape)}, which is no block of whole output rows"


def parameter_views(captured: CapturedGraph) -> dict[fx.Node, tuple[str, Tensor]]:
    """Node -> (FQN, meta tensor) for every node that is a view of one stored parameter."""
    views: dict[fx.Node, tuple[str, Any]] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            fqn = captured.parameter_nodes.get(node.name)
            if fqn is not None and captured.parameter(fqn).is_floating_point():
                views[node] = (fqn, torch.empty(tuple(captured.parameter(fqn).shape), device="meta"))
        elif node.op == "call_function" and node.all_input_nodes:
            followed = _follow(node, views)
            if followed is not None:
                views[node] = followed
    return {node: (fqn, view) for node, (fqn, view) in views.items() if isinstance(view, Tensor)}


def _follow(node: fx.Node, views: Mapping[fx.Node, tuple[str, Any]]) -> tuple[str, Any] | None:
    """The view that a node takes of a followed parameter, None when it is something else than a view."""
    source = node.all_input_nodes[0]
    if source not in views or len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not source:
        return None
    fqn, view = views[source]
    if node.target is operator.getitem:
        return fqn, view[node.args[1]]
    name = operator_name(node)
    if name in _KEEPS_LAYOUT:
        return fqn, view
    if not (is_view(node) or name in _SPLITS) or not callable(node.target):
        return None
    result = node.target(view, *node.args[1:], **node.kwargs)
    shares = all(part.untyped_storage()._cdata == view.untyped_storage()._cdata for part in _parts(result))
    return (fqn, result) if shares else None


def _parts(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
