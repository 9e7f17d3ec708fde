"""Find every use of a stored linear weight in a graph, by following its views.

A parameter reaches the operator that multiplies it through transposes, slices, splits and reshapes. These are run
on a meta tensor of the same shape; offset and strides of the result then tell which output rows are used and which
way round the weight is stored. Shapes alone cannot tell, and names are not asked.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mfcompile.graph import CapturedGraph, Diagnostic, module_stack
from mfcompile.passes.operators import CONTRACTIONS, is_view, operator_name
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


def locate_operand(operand: Tensor, contracted: int, parameter: Tensor) -> OperandView | None:
    """Which output rows of a parameter an operand is, judged by offset and strides in their common storage.

    Args:
        operand: the tensor that is multiplied; its other dimensions are outputs (heads and their width, say), or
            copies for each sample.
        contracted: dimension of the operand that is summed over, counted from the end.
        parameter: (out_features, in_features) or (in_features, out_features); shares its storage with the operand.

    Returns:
        None when the operand is no block of whole output rows.
    """
    if operand.ndim < max(2, -contracted) or parameter.ndim != 2:
        return None
    (height, width), (row_step, column_step) = parameter.shape, parameter.stride()
    offset = int(operand.storage_offset()) - int(parameter.storage_offset())
    inputs, step_in = operand.shape[contracted], operand.stride(contracted)
    merged = _merge(operand, contracted % operand.ndim)
    if merged is None:
        return None
    outputs, step_out = merged

    def fits(length: int, along: int, across: int, limit: int) -> OperandView | None:
        """``along``: step of the input dimension in the parameter; ``across``: step of its output dimension."""
        # A dimension of size one may carry any stride.
        lies = inputs == length and (step_in == along or inputs == 1) and (step_out == across or outputs == 1)
        start = offset // across
        if not lies or offset % across or start + outputs > limit:
            return None
        return OperandView((start, start + outputs), is_transposed=along == row_step and along != column_step)

    return fits(width, column_step, row_step, height) or fits(height, row_step, column_step, width)


def _merge(operand: Tensor, contracted: int) -> tuple[int, int] | None:
    """Size and step of all dimensions but one, as one; None when they do not lie at one step. Copies do not count."""
    size, step = 1, 1
    for dim in reversed(range(operand.ndim)):
        if dim == contracted or operand.shape[dim] == 1 or operand.stride(dim) == 0:
            continue
        if size == 1:
            step = operand.stride(dim)
        elif operand.stride(dim) != size * step:
            return None
        size *= operand.shape[dim]
    return size, step


def operand_pairs(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Any, int, Any, int]]:
    """What a contraction may multiply by what, for nodes and for tensors alike.

    Args:
        name: the operator, without namespace.
        args, kwargs: its arguments.

    Returns:
        (operand that may be the weight, its contracted dimension, the other operand, its contracted dimension),
        likelier weights first; dimensions are counted from the end.
    """

    def at(key: str, position: int) -> Any:
        return kwargs[key] if key in kwargs else args[position] if len(args) > position else None

    if name == "linear":
        return [(at("weight", 1), -1, at("input", 0), -1)]
    if name in {"mm", "matmul", "bmm"}:
        first, second = at("self", 0), at("other" if name == "matmul" else "mat2", 1)
        return [(second, -2, first, -1), (first, -1, second, -2)]
    if name == "addmm":
        first, second = at("mat1", 1), at("mat2", 2)
        return [(second, -2, first, -1), (first, -1, second, -2)]
    if name == "einsum":
        return _einsum_pairs(at("equation", 0), at("tensors", 1))
    return []


def _einsum_pairs(equation: Any, tensors: Any) -> list[tuple[Any, int, Any, int]]:
    if not isinstance(equation, str) or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return []
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in equation or len(terms) != 2:
        return []
    found: list[tuple[Any, int, Any, int]] = []
    for weight, other in ((1, 0), (0, 1)):
        common = set(terms[weight]) & set(terms[other])
        if len(common) == 1 and not common & set(result):
            (letter,) = common
            dims = [terms[index].index(letter) - len(terms[index]) for index in (weight, other)]
            found.append((tensors[weight], dims[0], tensors[other], dims[1]))
    return found


def find_weight_uses(captured: CapturedGraph) -> tuple[tuple[WeightUse, ...], tuple[Diagnostic, ...]]:
    """Every contraction of an activation with (rows of) a stored 2-D weight, in execution order.

    Returns:
        The uses (labels not yet filled in), and a diagnostic for every contraction with a parameter that could not
        be read as whole rows of a linear weight.
    """
    views = parameter_views(captured)
    changed = _changed_parameters(captured, views)
    uses: list[WeightUse] = []
    refused: list[Diagnostic] = []
    for node in captured.graph.nodes:
        if operator_name(node) not in CONTRACTIONS:
            continue
        use = _use_of(node, views, captured)
        if use is not None:
            uses.append(use)
            continue
        for source in node.all_input_nodes:
            if source in views and views[source][1].ndim > 1:
                refused.append(_refusal(node, *views[source], captured))
            elif source in changed:
                fqn, name = changed[source]
                refused.append(Diagnostic(fqn, f"its values are changed by {name} before {node.name} multiplies them"))
    return tuple(uses), tuple(refused)


def _changed_parameters(captured: CapturedGraph, views: Mapping[fx.Node, tuple[str, Tensor]]) -> dict[fx.Node, tuple[str, str]]:
    """Node that computes something from one stored 2-D weight and smaller parameters alone -> (FQN, first operator)."""
    changed: dict[fx.Node, tuple[str, str]] = {}
    constant: set[fx.Node] = set()
    for node in captured.graph.nodes:
        sources = node.all_input_nodes
        if node.op != "get_attr" and not (node.op == "call_function" and sources and constant.issuperset(sources)):
            continue
        if operator_name(node) in CONTRACTIONS or "norm" in operator_name(node).removeprefix("_weight_norm"):
            continue  # an activation that no input reaches (learned queries), not a weight any more
        constant.add(node)
        if node in views:
            continue
        for source in sources:
            if source in changed:
                changed.setdefault(node, changed[source])
            elif source in views and len(captured.parameter(views[source][0]).shape) == 2 and min(views[source][1].shape) > 1:
                changed.setdefault(node, (views[source][0], operator_name(node)))
    return changed


def _use_of(node: fx.Node, views: Mapping[fx.Node, tuple[str, Tensor]], captured: CapturedGraph) -> WeightUse | None:
    for weight, contracted, other, feature_dim in operand_pairs(operator_name(node), node.args, node.kwargs):
        if weight not in views or not isinstance(other, fx.Node):
            continue
        # Two parameters may meet in a product (learned queries times a weight): a bare product does not say which is which.
        if other in views and operator_name(node) != "linear" and captured.parameter(views[other][0]).ndim == 2:
            continue
        fqn, view = views[weight]
        located = locate_operand(view, contracted, _like(captured.parameter(fqn)))
        if located is not None:
            return WeightUse(
                node=node.name,
                fqn=fqn,
                rows=located.rows,
                is_transposed=located.is_transposed,
                activation=other.name,
                feature_dim=feature_dim,
                stack=tuple(call.path for call in module_stack(node)),
            )
    return None


def _like(parameter: Tensor) -> Tensor:
    """A contiguous tensor of the same shape without memory: what views of a parameter are followed on."""
    return torch.empty(tuple(parameter.shape), device="meta")


def _refusal(node: fx.Node, fqn: str, view: Tensor, captured: CapturedGraph) -> Diagnostic:
    shape = tuple(captured.parameter(fqn).shape)
    if len(shape) != 2:
        return Diagnostic(fqn, f"a {len(shape)}-D weight {shape}, used by {node.name}: only 2-D linear weights are pruned")
    return Diagnostic(
        fqn, f"{node.name} uses {tuple(view.shape)} of {shape} as no block of whole output rows of a linear layer"
    )


def parameter_views(captured: CapturedGraph) -> dict[fx.Node, tuple[str, Tensor]]:
    """Node -> (FQN, meta tensor) for every node that is a view of one stored parameter."""
    views: dict[fx.Node, tuple[str, Any]] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            fqn = captured.parameter_nodes.get(node.name)
            if fqn is not None and captured.parameter(fqn).is_floating_point():
                views[node] = (fqn, _like(captured.parameter(fqn)))
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
