"""Rules of operators that move, cut, join and look up axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mfcompile.passes.operators import argument, operator_name
from mfcompile.passes.token_places import node_sizes
from mfcompile.passes.token_ties import Group, Rule, Tie, axis_of, mapped, node_argument, operands_of, rank_of, source_of


def whole_axis(node: fx.Node) -> bool:
    """A slice takes the whole axis."""
    axis = axis_of(argument(node, "dim", 1, 0), rank_of(node))
    source = node.args[0]
    assert isinstance(source, fx.Node)  # by the schema
    return bool(node_sizes(source)[axis] == node_sizes(node)[axis])


def along(position: int, tie: Tie, default: Any = -1, name: str = "dim") -> Callable[[fx.Node], Rule]:
    """Operators that keep all axes but one, which their argument names."""

    def rule(node: fx.Node) -> Rule:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return mapped(source, {axis_of(argument(node, name, position, default), rank_of(source)): tie}, {})

    return rule


def permutation(node: fx.Node) -> Rule:
    """permute."""
    source = source_of(node)
    order = [axis_of(dim, rank_of(source)) for dim in argument(node, "dims", 1)]
    return mapped(source, {}, {axis: out for out, axis in enumerate(order)})


def transposition(node: fx.Node) -> Rule:
    """transpose, t, mT, swapaxes."""
    source = source_of(node)
    rank = rank_of(source)
    if operator_name(node) in {"t", "numpy_T", "adjoint", "mT"}:
        first, second = max(rank - 2, 0), rank - 1
    else:
        first, second = axis_of(node.args[1], rank), axis_of(node.args[2], rank)
    return mapped(source, {}, {first: second, second: first})


def unsqueezing(node: fx.Node) -> Rule:
    """unsqueeze: axes behind the new one move down."""
    source = source_of(node)
    new = axis_of(argument(node, "dim", 1), rank_of(source) + 1)
    return mapped(source, {}, {axis: axis + (axis >= new) for axis in range(rank_of(source))})


def squeezing(node: fx.Node) -> Rule:
    """squeeze: axes of size one go."""
    source = source_of(node)
    given = argument(node, "dim", 1)
    listed = range(rank_of(source)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    gone = {axis_of(dim, rank_of(source)) for dim in listed}
    gone = {axis for axis in gone if node_sizes(source)[axis] == 1}
    kept = [axis for axis in range(rank_of(source)) if axis not in gone]
    return mapped(source, dict.fromkeys(gone, Tie.REDUCE), {axis: out for out, axis in enumerate(kept)})


def removing(tie: Tie, default: Any = 0) -> Callable[[fx.Node], Rule]:
    """select and unbind: one axis goes, those after it move up."""

    def rule(node: fx.Node) -> Rule:
        source = source_of(node)
        gone = axis_of(argument(node, "dim", 1, default), rank_of(source))
        return mapped(source, {gone: tie}, {axis: axis - (axis > gone) for axis in range(rank_of(source))})

    return rule


def slicing(node: fx.Node) -> Rule:
    """slice: reads positions, but where it takes all."""
    source = source_of(node)
    axis = axis_of(argument(node, "dim", 1, 0), rank_of(source))
    return mapped(source, {} if whole_axis(node) else {axis: Tie.READ}, {})


def concatenation(node: fx.Node) -> Rule:
    """cat: the joined axis of the result is another one than those of its parts."""
    operands = operands_of(node)
    rank = rank_of(operands[0])
    joined = axis_of(argument(node, "dim", 1, 0), rank)
    groups = [Group(tuple((item, axis) for item in operands), axis) for axis in range(rank) if axis != joined]
    groups += [Group(((item, joined),), None, Tie.READ) for item in operands]
    return Rule(tuple(groups), rank)


def stacking(node: fx.Node) -> Rule:
    """stack: a new axis."""
    operands = operands_of(node)
    rank = rank_of(operands[0])
    new = axis_of(argument(node, "dim", 1, 0), rank + 1)
    groups = [Group(tuple((item, axis) for item in operands), axis + (axis >= new)) for axis in range(rank)]
    return Rule(tuple(groups), rank)


def item_taking(node: fx.Node) -> Rule | None:
    """An item of a list of results."""
    source = source_of(node)
    shapes = {node_sizes(source)} if isinstance(source.meta.get("val"), Tensor) else _ranks(source)
    return None if len(shapes) != 1 else mapped(source, {}, {})


def _ranks(node: fx.Node) -> set[Any]:
    return {item.ndim for item in node.meta.get("val") or () if isinstance(item, Tensor)}


def table_lookup(node: fx.Node) -> Rule:
    """embedding: the axes of the indices."""
    table, index = source_of(node), node_argument(node, "indices", 1)
    assert index is not None
    groups = [Group(((index, axis),), axis) for axis in range(rank_of(index))]
    groups += [Group(((table, axis),), None, Tie.STOP) for axis in range(rank_of(table))]
    return Rule(tuple(groups), rank_of(index))


def indexing(node: fx.Node) -> Rule:
    """x[i, j, :]: indexed axes are read; those behind them keep their order behind the axes of the indices."""
    source, indices = source_of(node), [*(argument(node, "indices", 1) or ())]
    indexed = [axis for axis, item in enumerate(indices) if item is not None]
    given = [item for item in indices if isinstance(item, fx.Node)]
    rank = max([rank_of(item) for item in given], default=0)
    is_adjacent = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    is_mask = any(getattr(item.meta.get("val"), "dtype", None) == torch.bool for item in given)
    groups = []
    for axis in range(rank_of(source)):
        if axis in indexed or not is_adjacent or is_mask:
            groups.append(Group(((source, axis),), None, Tie.READ if not is_mask else Tie.STOP))
        else:
            groups.append(Group(((source, axis),), axis if axis < indexed[0] else axis - len(indexed) + rank))
    for axis in range(rank):
        members = tuple((item, axis - rank + rank_of(item)) for item in given if axis - rank + rank_of(item) >= 0)
        is_kept = is_adjacent and not is_mask
        groups.append(Group(members, indexed[0] + axis if is_kept else None, Tie.KEEP if is_kept else Tie.STOP))
    return Rule(tuple(groups), rank_of(node))


def placing(values: str, position: int) -> Callable[[fx.Node], Rule]:
    """Operators that write values into a tensor: the values are read as they stand, the tensor may not change its sizes."""

    def rule(node: fx.Node) -> Rule:
        written = node_argument(node, values, position)
        groups = [
            Group(((item, axis),), None, Tie.READ if item is written else Tie.STOP)
            for item in operands_of(node)
            for axis in range(rank_of(item))
        ]
        return Rule(tuple(groups), rank_of(node))

    return rule


def gathering(node: fx.Node) -> Rule:
    """gather: reads positions along every axis of the source."""
    source = source_of(node)
    groups = [Group(((source, axis),), None, Tie.READ) for axis in range(rank_of(source))]
    groups += [Group(((item, axis),), None, Tie.STOP) for item in operands_of(node)[1:] for axis in range(rank_of(item))]
    return Rule(tuple(groups), rank_of(source))


def padding(node: fx.Node) -> Rule:
    """pad: padded axes are read."""
    source, widths = source_of(node), list(argument(node, "pad", 1))
    rank = rank_of(source)
    padded = {rank - 1 - index // 2 for index, width in enumerate(widths) if width != 0}
    return mapped(source, dict.fromkeys(padded, Tie.READ), {})


def expansion(node: fx.Node) -> Rule:
    """expand: axes of size one grow."""
    source = source_of(node)
    added = rank_of(node) - rank_of(source)
    grown = {axis: Tie.REDUCE for axis, size in enumerate(node_sizes(source)) if size != node_sizes(node)[axis + added]}
    return mapped(source, grown, {axis: axis + added for axis in range(rank_of(source))})


def repetition(node: fx.Node) -> Rule:
    """repeat: repeated axes cannot be followed. A count that is a number of the graph may be one for all sizes."""
    source, counts = source_of(node), list(argument(node, "repeats", 1))
    added = len(counts) - rank_of(source)
    before, after = node_sizes(source), node_sizes(node)[added:]
    grown = {axis: Tie.STOP for axis in range(rank_of(source)) if before[axis] != after[axis]}
    return mapped(source, grown, {axis: axis + added for axis in range(rank_of(source))})


def size_reading(node: fx.Node) -> Rule:
    """sym_size: the number of tokens as a number cannot be followed, other sizes do not matter."""
    source = source_of(node)
    asked = axis_of(argument(node, "dim", 1, 0), rank_of(source))
    groups = [Group(((source, axis),), None, Tie.STOP if axis == asked else Tie.IGNORE) for axis in range(rank_of(source))]
    return Rule(tuple(groups), 0)
