"""The words of rules about axes: which axes an operator ties to each other, and what it does along them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, fx

from mfcompile.passes.operators import argument
from mfcompile.passes.token_places import node_sizes


class Tie(Enum):
    """What an operator does with an axis."""

    KEEP = "keeps it"
    SUM = "sums products over it"
    REDUCE = "reduces it"
    READ = "reads positions of it"
    STOP = "computes across it"
    IGNORE = "reads nothing of the values"


@dataclass(frozen=True)
class Group:
    """Axes that run over the same things.

    Attributes:
        members: operands and the axis of each; an axis of size one is broadcast.
        out: the axis of the result, None where it has none.
        tie: what happens along it.
    """

    members: tuple[tuple[fx.Node, int], ...]
    out: int | None
    tie: Tie = Tie.KEEP


@dataclass(frozen=True)
class Rule:
    """The groups of an operator's axes.

    Attributes:
        groups: every axis of every operand is in at least one.
        rank: operands of fewer axes are aligned to this many from the right.
    """

    groups: tuple[Group, ...]
    rank: int


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Operands that are tensors, or lists of them."""
    return [item for item in node.all_input_nodes if isinstance(_first(item.meta.get("val")), Tensor)]


def _first(value: Any) -> Any:
    return next((item for item in value if isinstance(item, Tensor)), None) if isinstance(value, (list, tuple)) else value


def rank_of(node: fx.Node) -> int:
    """Number of axes of a result."""
    return len(node_sizes(node))


def axis_of(dim: Any, rank: int) -> int:
    """An axis counted from the front."""
    return int(dim) % max(rank, 1)


def node_argument(node: fx.Node, name: str, position: int) -> fx.Node | None:
    """An argument that is a node."""
    value = argument(node, name, position)
    return value if isinstance(value, fx.Node) else None


def aligned(node: fx.Node) -> Rule:
    """Axes are aligned from the right, as in broadcasting."""
    operands = operands_of(node)
    rank = max([rank_of(item) for item in operands], default=0)
    groups = []
    for axis in range(rank):
        members = tuple((item, axis - rank + rank_of(item)) for item in operands if axis - rank + rank_of(item) >= 0)
        groups.append(Group(members, axis))
    return Rule(tuple(groups), rank)


def mapped(source: fx.Node, ties: dict[int, Tie], outs: dict[int, int | None]) -> Rule:
    """One operand; ``ties`` for axes that are not kept, ``outs`` for axes that move."""
    rank = rank_of(source)
    groups = [
        Group(((source, axis),), None if axis in ties else outs.get(axis, axis), ties.get(axis, Tie.KEEP))
        for axis in range(rank)
    ]
    return Rule(tuple(groups), rank)


def source_of(node: fx.Node) -> fx.Node:
    """The first operand."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
