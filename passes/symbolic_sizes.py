"""Sizes of an exported program as numbers: those of the example, also where only values decide them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

Values = Mapping[Any, int]
"""A symbol of a size (of sympy) -> its value."""


def number_of(size: Any, values: Values | None = None, stand_in: Callable[[int], int] = lambda _: 2) -> Any:
    """A size as a number.

    Args:
        size: of a tensor, or a number that a program computes; anything that is not free is given back.
        values: of symbols that no size of an input decides, such as how many images of a batch are none.
        stand_in: the place among the free symbols of a size -> the value of one that is in neither.
    """
    if not isinstance(size, torch.SymInt):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    free = sorted(size.node.expr.free_symbols, key=str)
    known = values or {}
    return int(size.node.expr.subs({symbol: known.get(symbol, stand_in(index)) for index, symbol in enumerate(free)}))


def values_in_example(program: ExportedProgram) -> dict[Any, int]:
    """Values that free symbols without a size of an input behind them have for the program's example; runs it where it has any.

    Args:
        program: with its example inputs.
    """
    if not any(_is_open(size) for node in program.graph.nodes for size in _sizes(node.meta.get("val"))):
        return {}
    assert program.example_inputs is not None  # torch.export keeps them
    runner = _Recorder(program.module(check_guards=False))
    arguments, keywords = program.example_inputs
    flat = pytree.tree_leaves((arguments, keywords))
    with torch.no_grad():
        runner.run(*flat)
    return runner.found


class _Recorder(fx.Interpreter):
    """Notes what sizes without a hint come to."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.found: dict[Any, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        known = _sizes(n.meta.get("val"))
        for size, value in zip(known, _sizes(result) if known else [], strict=True):
            if _is_open(size) and size.node.expr.is_symbol:
                self.found[size.node.expr] = int(value)
        return result


def _sizes(value: Any) -> list[Any]:
    """Sizes of a tensor, or of all of a list; a number is its own."""
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (list, tuple)):
        return [size for item in value for size in _sizes(item)]
    return [value] if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else []


def _is_open(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.hint is None
