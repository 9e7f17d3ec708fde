"""How an operator relates positions of its tensors to each other, for axes of features and heads.

``token_rules`` says which axes run over the same things, for activations alone. Here the weights take part: what a linear
layer sums over is an axis of its weight, and what it gives is another. Operators that cut, join and repeat an axis say
position by position where it goes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from mfcompile.passes.operators import CONVOLUTIONS, SOFTMAXES, argument, operator_name
from mfcompile.passes.symbolic_sizes import number_of
from mfcompile.passes.token_rules import rule_of
from mfcompile.passes.token_spread import VIEWS
from mfcompile.passes.token_ties import Group, Rule, Tie, axis_of, node_argument, operands_of, source_of

SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "unbind"})
"""Operators that give a list; what they do is said of each item."""

CREATIONS = frozenset({"full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty"})
"""Operators that give one value at every position of sizes that they list."""

EXPANSIONS = frozenset({"expand", "broadcast_to", "repeat"})
"""Operators that copy what they have along new axes and along axes of size one."""


@dataclass(frozen=True)
class Link:
    """Two tensors of which one is made of positions of the other; all axes that are not listed are unrelated.

    Attributes:
        source: the tensor that is read.
        result: the tensor that is made.
        axes: axis of the source -> axis of the result, None where a single position is taken.
        moved: the axis of the source whose positions move, None where all stay.
        positions: of the source along ``moved``, one for each position of the result along its axis (or the one taken).
    """

    source: fx.Node
    result: fx.Node
    axes: tuple[tuple[int, int | None], ...]
    moved: int | None = None
    positions: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class View:
    """The result is the source with other sizes."""

    source: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class Unknown:
    """The operator has no rule."""


Relation = Rule | Link | View | Unknown


def dims(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a node's tensor as numbers: free ones as they are in the example."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, Tensor)), None)
    return tuple(number_of(size, stand_in=_unlikely) for size in value.shape) if isinstance(value, Tensor) else ()


def _unlikely(index: int) -> int:
    """Of sizes that only values decide: no other size is equal to one, or divides it."""
    return 7919 + 2 * index


def relations_of(node: fx.Node) -> list[Relation]:
    """What the node's result has to do with its operands; none for operators that give a list (their items have it)."""
    if node.op != "call_function" or operator_name(node) in SPLITS:
        return []
    if node.target is operator.getitem:
        return _item(node)
    name = operator_name(node)
    if name in VIEWS:
        source = node.args[0]
        return [View(source, node)] if isinstance(source, fx.Node) else [Unknown()]
    if name in _LINKS:
        return _LINKS[name](node)
    rule = _FEATURE_RULES[name](node) if name in _FEATURE_RULES else rule_of(node)
    return [Unknown()] if rule is None else [rule]


def _sliced(node: fx.Node, source: fx.Node, axis: int, positions: Sequence[int] | NDArray[np.int64]) -> Link:
    """Every axis stays, along one of them positions are chosen."""
    axes = tuple((index, index) for index in range(len(dims(source))))
    return Link(source, node, axes, axis, np.asarray(positions, dtype=np.int64))


def _item(node: fx.Node) -> list[Relation]:
    """One item of what a splitting operator gives."""
    made, index = node.args[0], node.args[1]
    if not isinstance(made, fx.Node) or not isinstance(index, int) or operator_name(made) not in SPLITS:
        return [Unknown()]
    source = source_of(made)
    name = operator_name(made)
    position = 1 if name == "unbind" else 2
    axis = axis_of(argument(made, "dim", position, 0), len(dims(source)))
    if name == "unbind":
        return [_taken(node, source, axis, index)]
    sizes = [int(item.shape[axis]) for item in made.meta["val"]] if _is_fixed(made, axis) else None
    if sizes is None:
        return [Unknown()]
    start = sum(sizes[:index])
    return [_sliced(node, source, axis, range(start, start + sizes[index]))]


def _is_fixed(made: fx.Node, axis: int) -> bool:
    return all(isinstance(item.shape[axis], int) or item.shape[axis].node.hint is not None for item in made.meta["val"])


def _taken(node: fx.Node, source: fx.Node, axis: int, index: int) -> Link:
    """One position along an axis, which goes."""
    rank = len(dims(source))
    axes = tuple((item, None if item == axis else item - (item > axis)) for item in range(rank))
    return Link(source, node, axes, axis, np.asarray([index % dims(source)[axis]]))


def _select(node: fx.Node) -> list[Relation]:
    source = source_of(node)
    axis, index = axis_of(argument(node, "dim", 1, 0), len(dims(source))), argument(node, "index", 2)
    return [_taken(node, source, axis, index)] if isinstance(index, int) else [rule_of(node) or Unknown()]


def _slice(node: fx.Node) -> list[Relation]:
    source = source_of(node)
    axis = axis_of(argument(node, "dim", 1, 0), len(dims(source)))
    bounds = [argument(node, "start", 2), argument(node, "end", 3), argument(node, "step", 4, 1)]
    if not all(item is None or isinstance(item, int) for item in bounds):
        return [rule_of(node) or Unknown()]
    return [_sliced(node, source, axis, range(dims(source)[axis])[slice(*bounds)])]


def _narrow(node: fx.Node) -> list[Relation]:
    source = source_of(node)
    axis = axis_of(argument(node, "dim", 1), len(dims(source)))
    start, length = argument(node, "start", 2), argument(node, "length", 3)
    if not isinstance(start, int) or not isinstance(length, int):
        return [rule_of(node) or Unknown()]
    return [_sliced(node, source, axis, range(start, start + length))]


def _cat(node: fx.Node) -> list[Relation]:
    parts = [item for item in argument(node, "tensors", 0) if isinstance(item, fx.Node)]
    rank = len(dims(node))
    axis = axis_of(argument(node, "dim", 1, 0), rank)
    found: list[Relation] = []
    start = 0
    for part in parts:
        if len(dims(part)) != rank:
            return [Unknown()]
        size = dims(part)[axis]
        axes = tuple((index, index) for index in range(rank))
        # the part is what is read of the whole: positions of the whole, one for each position of the part
        found.append(Link(node, part, axes, axis, np.arange(start, start + size)))
        start += size
    return found


def _flip(node: fx.Node) -> list[Relation]:
    source, rank = source_of(node), len(dims(node))
    flipped = [axis_of(dim, rank) for dim in argument(node, "dims", 1)]
    return [_sliced(node, source, flipped[0], range(dims(source)[flipped[0]])[::-1])] if len(flipped) == 1 else [Unknown()]


def _repeat_interleave(node: fx.Node) -> list[Relation]:
    source = source_of(node)
    times, dim = argument(node, "repeats", 1), argument(node, "dim", 2)
    if not isinstance(times, int) or dim is None:
        return [Unknown()]
    axis = axis_of(dim, len(dims(source)))
    return [_sliced(node, source, axis, np.arange(dims(source)[axis]).repeat(times))]


def _repeat(node: fx.Node) -> list[Relation]:
    """Copies along an axis: the rule of one axis that is repeated, all others being related as they are."""
    source, counts = source_of(node), list(argument(node, "repeats", 1))
    added = len(counts) - len(dims(source))
    repeated = [axis for axis in range(len(dims(source))) if counts[axis + added] != 1 and dims(source)[axis] != 1]
    axes = tuple((axis, axis + added) for axis in range(len(dims(source))))
    if len(repeated) > 1 or not all(isinstance(counts[axis + added], int) for axis in repeated):
        return [Unknown()]
    if not repeated:
        return [Link(source, node, axes)]
    size = dims(source)[repeated[0]]
    return [Link(source, node, axes, repeated[0], np.arange(size * counts[repeated[0] + added]) % size)]


def _glu(node: fx.Node) -> list[Relation]:
    source = source_of(node)
    axis = axis_of(argument(node, "dim", 1, -1), len(dims(source)))
    half = dims(source)[axis] // 2
    return [_sliced(node, source, axis, range(start, start + half)) for start in (0, half)]


def _attention(node: fx.Node) -> list[Relation]:
    """Heads of queries, keys and values are one axis; where keys have fewer, a run of query heads shares one."""
    query, key, value = (item for item in node.args[:3] if isinstance(item, fx.Node))
    rank = len(dims(query))
    rule = rule_of(node)
    heads = rank - 3
    if rule is None or rank < 4 or dims(query)[heads] == dims(key)[heads]:
        return [Unknown() if rule is None else rule]
    shared = np.arange(dims(query)[heads]) // (dims(query)[heads] // dims(key)[heads])
    leading = tuple((axis, axis) for axis in range(rank - 2))
    links = [Link(key, node, leading, heads, shared), Link(value, node, (*leading, (rank - 1, rank - 1)), heads, shared)]
    linked = {(key, axis) for axis in range(rank - 2)} | {(value, axis) for axis in (*range(rank - 2), rank - 1)}
    groups = [Group((member,), None, Tie.IGNORE) for member in linked]
    for group in rule.groups:
        members = tuple(member for member in group.members if member not in linked)
        if members or group.out is not None:
            groups.append(Group(members, group.out, group.tie))
    return [Rule(tuple(groups), rule.rank), *links]


def _linear(node: fx.Node) -> Rule | None:
    source, weight, bias = source_of(node), node_argument(node, "weight", 1), node_argument(node, "bias", 2)
    if weight is None or len(dims(weight)) != 2:
        return None
    last = len(dims(source)) - 1
    groups = [Group(((source, axis),), axis) for axis in range(last)]
    groups.append(Group(((source, last), (weight, 1)), None, Tie.SUM))
    groups.append(Group(((weight, 0), *(((bias, 0),) if bias is not None else ())), last))
    return Rule(tuple(groups), last + 1)


def _convolution(node: fx.Node) -> Rule | None:
    """Channels of a convolution: of a plain one as of a linear layer, of one that treats each channel alone as they are."""
    source, weight, bias = source_of(node), node_argument(node, "weight", 1), node_argument(node, "bias", 2)
    if weight is None:
        return None
    rank, channels = len(dims(source)), len(dims(source)) - len(dims(weight)) + 1
    groups = [Group(((source, axis),), axis) for axis in range(channels)]
    groups += [Group(((source, axis),), axis, Tie.STOP) for axis in range(channels + 1, rank)]
    groups += [Group(((weight, axis),), None, Tie.STOP) for axis in range(2, len(dims(weight)))]
    biases = ((bias, 0),) if bias is not None else ()
    count = int(argument(node, "groups", 6, 1))
    if count == 1:
        groups.append(Group(((source, channels), (weight, 1)), None, Tie.SUM))
        groups.append(Group(((weight, 0), *biases), channels))
    elif count == dims(source)[channels] == dims(weight)[0]:
        groups.append(Group(((source, channels), (weight, 0), *biases), channels))
    else:
        return None
    return Rule(tuple(groups), rank)


def _softmax(node: fx.Node) -> Rule:
    source = source_of(node)
    rank = len(dims(source))
    across = axis_of(argument(node, "dim", 1), rank)
    return Rule(tuple(Group(((source, axis),), axis, Tie.STOP if axis == across else Tie.KEEP) for axis in range(rank)), rank)


def _batch_norm(node: fx.Node) -> Rule | None:
    source = source_of(node)
    if argument(node, "training", 5, False):
        return None
    tensors = tuple((item, 0) for item in node.args[1:5] if isinstance(item, fx.Node))
    groups = [Group(((source, axis), *(tensors if axis == 1 else ())), axis) for axis in range(len(dims(source)))]
    return Rule(tuple(groups), len(dims(source)))


def _prelu(node: fx.Node) -> Rule:
    source, weight = source_of(node), node_argument(node, "weight", 1)
    channels = 1 if len(dims(source)) > 1 else 0
    own = ((weight, 0),) if weight is not None and dims(weight) != (1,) else ()
    groups = [Group(((source, axis), *(own if axis == channels else ())), axis) for axis in range(len(dims(source)))]
    return Rule(tuple(groups), len(dims(source)))


def _embedding(node: fx.Node) -> Rule | None:
    table, index = source_of(node), node_argument(node, "indices", 1)
    if index is None:
        return None
    rank = len(dims(index))
    groups = [Group(((index, axis),), axis) for axis in range(rank)]
    groups += [Group(((table, 0),), None, Tie.READ), Group(((table, 1),), rank)]
    return Rule(tuple(groups), rank + 1)


def _gather(node: fx.Node) -> Rule | None:
    """gather: reads positions along one axis; along the others, source, index and result run together."""
    source, index = source_of(node), node_argument(node, "index", 2)
    if index is None or len(dims(source)) != len(dims(index)):
        return None
    rank = len(dims(source))
    read = axis_of(argument(node, "dim", 1), rank)
    groups = [Group(((source, axis), (index, axis)), axis) for axis in range(rank) if axis != read]
    groups += [Group(((source, read),), None, Tie.READ), Group(((index, read),), read)]
    fits = all(dims(source)[axis] == dims(index)[axis] for axis in range(rank) if axis != read)
    return Rule(tuple(groups), rank) if fits else None


def _creation(node: fx.Node) -> Rule:
    groups = [Group(((item, axis),), None, Tie.IGNORE) for item in operands_of(node) for axis in range(len(dims(item)))]
    return Rule(tuple(groups), len(dims(node)))


_LINKS: dict[str, Callable[[fx.Node], list[Relation]]] = {
    "select": _select, "slice": _slice, "narrow": _narrow, "cat": _cat, "concat": _cat, "flip": _flip,
    "repeat": _repeat, "repeat_interleave": _repeat_interleave, "glu": _glu,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip

_FEATURE_RULES: dict[str, Callable[[fx.Node], Rule | None]] = {
    "linear": _linear,
    **dict.fromkeys(CONVOLUTIONS - {"convolution", "_convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"},
                    _convolution),
    **dict.fromkeys((*SOFTMAXES, "log_softmax", "_log_softmax"), _softmax),
    "batch_norm": _batch_norm, "prelu": _prelu, "embedding": _embedding, "gather": _gather,
    **dict.fromkeys(CREATIONS, _creation),
}  # fmt: skip
