"""Where a followed axis lies in a tensor, and where a view of the tensor has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

Size = Any
"""A size as an int, or as a sympy expression where it is free."""


@dataclass(frozen=True)
class Place:
    """A factor of one axis of a tensor: all of it, or what is between an outer and an inner factor that share the axis.

    Attributes:
        axis: counted from the front.
        outer: product of the factors of that axis before this one.
        inner: product of the factors after it.
    """

    axis: int
    outer: Size = 1
    inner: Size = 1

    @property
    def is_whole(self) -> bool:
        """The axis is this factor and nothing else."""
        return bool(self.outer == 1 and self.inner == 1)


def sizes(value: Any) -> tuple[Size, ...]:
    """Sizes of a tensor (of the first one of a list), as ints where they are fixed."""
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, Tensor)), None)
    return tuple(size_of(size) for size in value.shape) if isinstance(value, Tensor) else ()


def node_sizes(node: fx.Node) -> tuple[Size, ...]:
    """Sizes of the tensor that a node computes."""
    return sizes(node.meta.get("val"))


def size_of(size: Any) -> Size:
    """One size as an int, or as a sympy expression."""
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return size.node.expr if known is None else known
    return int(size)


def place_in_view(before: Sequence[Size], after: Sequence[Size], place: Place, size: Size) -> Place | None:
    """Where a view of other sizes has a factor of an axis: after the same product of sizes, never by its own size.

    A view keeps the order of elements, so that a factor of ``size`` that comes after factors of a product P still comes
    after a product P. This holds where several axes have one size.

    Args:
        before: sizes of the tensor.
        after: sizes of its view.
        place: of the factor in the tensor.
        size: of the factor.

    Returns:
        Its place in the view; None where the view cuts it into several axes.
    """
    leading = _product(before[: place.axis]) * place.outer
    for axis in range(len(after)):
        outer = _quotient(leading, _product(after[:axis]))
        inner = None if outer is None else _quotient(after[axis], outer * size)
        if outer is not None and inner is not None:
            return Place(axis, outer, inner)
    return None


def _product(factors: Sequence[Size]) -> Size:
    return prod(factors) if factors else 1


def _quotient(whole: Size, part: Size) -> Size | None:
    """whole / part where it is a whole number whatever the free sizes are; None otherwise."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 and whole >= part else None
    return _symbolic_quotient(whole, part)


@lru_cache(maxsize=4096)
def _symbolic_quotient(whole: Size, part: Size) -> Size | None:
    """As ``_quotient``; a program has few different sizes, and asks for their ratios again and again."""
    ratio = sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))
    if ratio.is_Integer:
        return int(ratio) if ratio > 0 else None
    denominator = sympy.fraction(ratio)[1]
    return ratio if denominator == 1 and all(factor.q == 1 for factor in ratio.atoms(sympy.Rational)) else None
