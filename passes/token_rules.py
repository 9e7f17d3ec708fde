"""Which axes of its operands an operator ties to each other and to its result: one rule per operator, no guess.

A rule lists groups of axes. All axes of a group run over the same things: where one is cut, all must be. An operator
without a rule has none, and whoever follows an axis stops there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mfcompile.passes.operators import CONVOLUTIONS, SOFTMAXES, argument, operator_name
from mfcompile.passes.token_places import node_sizes
from mfcompile.passes.token_shape_rules import (
    along,
    concatenation,
    expansion,
    gathering,
    indexing,
    item_taking,
    padding,
    permutation,
    placing,
    removing,
    repetition,
    size_reading,
    slicing,
    squeezing,
    stacking,
    table_lookup,
    transposition,
    unsqueezing,
)
from mfcompile.passes.token_ties import (
    Group,
    Rule,
    Tie,
    aligned,
    axis_of,
    mapped,
    node_argument,
    operands_of,
    rank_of,
    source_of,
)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a node's operator, None where there is none (views have their own: see ``token_places``).

    Axes of operands that the rule does not speak of (weights, statistics) cannot be followed.
    """
    rule = _own_rule(node)
    if rule is None:
        return None
    listed = {member for group in rule.groups for member in group.members}
    left = [(item, axis) for item in operands_of(node) for axis in range(rank_of(item)) if (item, axis) not in listed]
    return Rule((*rule.groups, *(Group((member,), None, Tie.STOP) for member in left)), rule.rank)


def _own_rule(node: fx.Node) -> Rule | None:
    if node.target is operator.getitem:
        return item_taking(node)
    name = operator_name(node)
    if name in _RULES:
        return _RULES[name](node)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or name in _SAME_SHAPE:
        return aligned(node)
    if name in _VALUES_UNREAD:
        groups = [Group(((item, axis),), None, Tie.IGNORE) for item in operands_of(node) for axis in range(rank_of(item))]
        return Rule(tuple(groups), 0)
    return None


def _linear(node: fx.Node) -> Rule:
    source = source_of(node)
    last = rank_of(source) - 1
    groups = [Group(((source, axis),), axis) for axis in range(last)]
    groups.append(Group(((source, last),), None, Tie.STOP))
    return Rule(tuple(groups), last + 1)


def _product(first: int) -> Callable[[fx.Node], Rule | None]:
    """matmul, bmm, mm (first = 0), and those with a summand in front (first = 1)."""

    def rule(node: fx.Node) -> Rule | None:
        left, right = (item for item in node.args[first : first + 2])
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        rows, columns, rank = rank_of(left), rank_of(right), rank_of(node)
        if min(rows, columns) < 2:
            return None
        summand = source_of(node) if first else None

        def aligned(axis: int, *operands: fx.Node | None) -> tuple[tuple[fx.Node, int], ...]:
            given = [item for item in operands if item is not None]
            return tuple((item, axis - rank + rank_of(item)) for item in given if axis - rank + rank_of(item) >= 0)

        groups = [Group(aligned(axis, left, right, summand), axis) for axis in range(rank - 2)]
        groups.append(Group(((left, rows - 2), *aligned(rank - 2, summand)), rank - 2))
        groups.append(Group(((right, columns - 1), *aligned(rank - 1, summand)), rank - 1))
        groups.append(Group(((left, rows - 1), (right, columns - 2)), None, Tie.SUM))
        return Rule(tuple(groups), rank)

    return rule


def _attention(node: fx.Node) -> Rule:
    query, key, value = (item for item in node.args[:3] if isinstance(item, fx.Node))
    mask = node_argument(node, "attn_mask", 3)
    rank = rank_of(query)

    def with_mask(axis: int, *members: tuple[fx.Node, int]) -> tuple[tuple[fx.Node, int], ...]:
        at = -1 if mask is None else axis - rank + rank_of(mask)
        return members if mask is None or at < 0 else (*members, (mask, at))

    groups = []
    for axis in range(rank - 2):
        shared = node_sizes(query)[axis] == node_sizes(key)[axis]  # not so for the heads of grouped queries
        others = ((key, axis), (value, axis)) if shared else ()
        groups.append(Group(with_mask(axis, (query, axis), *others), axis))
        groups += [] if shared else [Group(((key, axis), (value, axis)), None, Tie.STOP)]
    groups.append(Group(with_mask(rank - 2, (query, rank - 2)), rank - 2))
    groups.append(Group(with_mask(rank - 1, (key, rank - 2), (value, rank - 2)), None, Tie.SUM))
    groups.append(Group(((query, rank - 1), (key, rank - 1)), None, Tie.STOP))
    groups.append(Group(((value, rank - 1),), rank - 1))
    return Rule(tuple(groups), rank)


def _normalisation(node: fx.Node) -> Rule:
    source = source_of(node)
    count, rank = len(argument(node, "normalized_shape", 1, ())), rank_of(source)
    groups = [Group(((source, axis),), axis, Tie.KEEP if axis < rank - count else Tie.STOP) for axis in range(rank)]
    return Rule(tuple(groups), rank_of(source))


def _batch_norm(node: fx.Node) -> Rule | None:
    return None if argument(node, "training", 5, False) else mapped(source_of(node), {1: Tie.STOP}, {})


def _group_norm(node: fx.Node) -> Rule:
    source = source_of(node)
    return mapped(source, dict.fromkeys(range(1, rank_of(source)), Tie.STOP), {})


def _reduction(tie: Tie, position: int = 1) -> Callable[[fx.Node], Rule]:
    def rule(node: fx.Node) -> Rule:
        source = source_of(node)
        rank = rank_of(source)
        given = argument(node, "dim", position)
        listed = list(range(rank)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
        reduced = {axis_of(dim, rank) for dim in listed}
        kept = [axis for axis in range(rank) if axis not in reduced]
        is_same_rank = rank_of(node) == rank
        outs: dict[int, int | None] = {axis: axis if is_same_rank else kept.index(axis) for axis in kept}
        return mapped(source, dict.fromkeys(reduced, tie), outs)

    return rule


def _convolution(node: fx.Node) -> Rule | None:
    source, weight = source_of(node), node_argument(node, "weight", 1)
    if weight is None:
        return None
    places = rank_of(weight) - 2
    channels = rank_of(source) - places - 1
    plain = _each(argument(node, "stride", 3, 1), 1) and _each(argument(node, "padding", 4, 0), 0)
    ties = {channels: Tie.STOP}
    for axis in range(places):
        if node_sizes(weight)[2 + axis] != 1 or not plain:
            ties[channels + 1 + axis] = Tie.STOP
    return mapped(source, ties, {})


def _each(value: Any, wanted: int) -> bool:
    return all(item == wanted for item in value) if isinstance(value, (list, tuple)) else bool(value == wanted)


def _einsum(node: fx.Node) -> Rule | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or "." in equation or "->" not in equation or not isinstance(operands, (list, tuple)):
        return None
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    groups = []
    for letter in dict.fromkeys(left.replace(",", "")):
        members = [
            (item, term.index(letter))
            for item, term in zip(operands, terms, strict=True)
            if isinstance(item, fx.Node) and letter in term
        ]
        groups.append(Group(tuple(members), right.index(letter), Tie.KEEP) if letter in right else _summed(members))
    return Rule(tuple(groups), len(right)) if all(len(set(term)) == len(term) for term in terms) else None


def _summed(members: list[tuple[fx.Node, int]]) -> Group:
    return Group(tuple(members), None, Tie.SUM if len(members) > 1 else Tie.REDUCE)


_SAME_SHAPE = SOFTMAXES | frozenset(
    {
        "log_softmax", "_log_softmax", "to", "_to_copy", "clone", "contiguous", "alias", "detach", "detach_", "dropout",
        "type_as", "lift_fresh", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "empty_like", "masked_fill",
        "nan_to_num", "silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "hardtanh", "hardswish", "hardsigmoid", "softplus",
        "feature_dropout", "mish", "selu", "celu", "where", "__and__", "__or__", "__xor__", "prelu", "pin_memory",
        "_conj", "logical_and", "logical_or", "logical_not", "float", "clamp", "rsub", "expand_as",
    }
)  # fmt: skip
"""Operators on each element alone (softmax along an axis of its own) that torch does not mark as such."""

_VALUES_UNREAD = frozenset({"_assert_tensor_metadata", "new_ones", "new_zeros", "new_full", "new_empty", "sym_storage_offset"})
"""Operators that look at dtype and device, and take their sizes from arguments."""

_RULES: dict[str, Callable[[fx.Node], Rule | None]] = {
    "linear": _linear,
    "matmul": _product(0), "bmm": _product(0), "mm": _product(0), "baddbmm": _product(1), "addmm": _product(1),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "layer_norm": _normalisation, "rms_norm": _normalisation, "_fused_rms_norm": _normalisation,
    "batch_norm": _batch_norm, "group_norm": _group_norm,
    "permute": permutation,
    **dict.fromkeys(("transpose", "t", "numpy_T", "adjoint", "mT", "swapaxes", "swapdims"), transposition),
    "unsqueeze": unsqueezing, "squeeze": squeezing, "select": removing(Tie.READ), "unbind": removing(Tie.READ),
    "slice": slicing, "cat": concatenation, "concat": concatenation, "stack": stacking,
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split"), along(2, Tie.READ, 0)
    ),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "any", "all", "var", "std", "logsumexp", "prod"), _reduction(Tie.REDUCE)),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _reduction(Tie.REDUCE, 2)),
    **dict.fromkeys(("argmax", "argmin"), _reduction(Tie.STOP)),
    **dict.fromkeys(("cumsum", "cumprod", "glu", "sort", "argsort", "logcumsumexp"), along(1, Tie.STOP)),
    "narrow": along(1, Tie.READ, 0),
    "topk": along(2, Tie.STOP),
    "embedding": table_lookup, "index": indexing, "gather": gathering, "index_select": along(1, Tie.READ),
    "masked_scatter": placing("source", 2), "index_put": placing("values", 2), "scatter": placing("src", 3),
    **dict.fromkeys(CONVOLUTIONS - {"convolution", "_convolution"}, _convolution),
    **dict.fromkeys(("pad", "constant_pad_nd"), padding),
    "expand": expansion, "broadcast_to": expansion, "repeat": repetition,
    "sym_size": size_reading,
}  # fmt: skip
