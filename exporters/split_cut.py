"""Where to cut a graph so that as few bytes as possible pass from the modalities' parts to the fusion.

What the fusion needs of a modality can be handed over as it is, or computed there from an earlier value, as long as
nothing expensive is done twice: a transposed copy, a cast, an expanded or a normalised value need not be handed over
beside the value that it comes from. The choice is a minimum vertex cut: values weigh their bytes, an operator that
holds weights or multiplies matrices cannot be repeated, and of equal cuts the last one wins, which leaves most of the
work in the part that runs once.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping

import networkx as nx
import onnx_ir as ir

# Operators whose work is more than one pass over their operands, or whose result is not a function of these alone.
EXPENSIVE = frozenset(
    {
        *("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "Einsum", "Conv", "ConvInteger", "ConvTranspose", "QLinearConv"),
        *("DeformConv", "Attention", "RNN", "LSTM", "GRU", "Loop", "If", "Scan", "Det", "DFT", "STFT"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"),
    }
)

TENSOR_BYTES = 64
"""What one more tensor between two parts costs, beside its content: a name, a copy, a line in the caller's code."""

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

UNKNOWN_SIZE = 1024
"""A dimension of unknown size is taken for a large one: nobody wants to hand it over unless it must be."""


def tensor_bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """Bytes of a value at the example's sizes.

    Args:
        value: shape and dtype may be unknown; an unknown dimension counts as ``UNKNOWN_SIZE``, a dtype as 8 bytes.
        sizes: name of a dimension -> its size.
    """
    count = 1
    for dim in value.shape if value.shape is not None else (None, None):
        count *= dim if isinstance(dim, int) else _size_of(dim, sizes)
    width = value.dtype.itemsize if value.dtype is not None else 8
    return int(count * width)


def _size_of(dim: ir.SymbolicDim | None, sizes: Mapping[str, int]) -> int:
    if dim is None or dim.value is None:
        return UNKNOWN_SIZE
    try:
        return _evaluate(ast.parse(dim.value, mode="eval").body, sizes)
    except (SyntaxError, KeyError, ArithmeticError):
        return UNKNOWN_SIZE


def _evaluate(term: ast.expr, sizes: Mapping[str, int]) -> int:
    """An expression of named dimensions, such as "batch*sequence + 1".

    Raises:
        KeyError: it holds a name or an operation that is not known.
    """
    if isinstance(term, ast.Constant) and isinstance(term.value, int):
        return term.value
    if isinstance(term, ast.Name):
        return sizes[term.id]
    if isinstance(term, ast.BinOp):
        left, right = _evaluate(term.left, sizes), _evaluate(term.right, sizes)
        return _OPERATIONS[type(term.op)](left, right)
    raise KeyError(type(term).__name__)


def narrowest_cut(
    wanted: Iterable[ir.Value],
    rebuild: Callable[[ir.Value], list[ir.Value] | None],
    cost: Callable[[ir.Value], int],
) -> list[ir.Value]:
    """The cheapest set of values from which every wanted value can be computed again.

    Args:
        wanted: values that the other side reads.
        rebuild: the values that one is computed from where that may be repeated, None where it may not.
        cost: of handing a value over, positive.

    Returns:
        The values to hand over, in the order in which they are found backwards from the wanted ones.
    """
    network = nx.DiGraph()
    order: list[ir.Value] = []
    seen: set[ir.Value] = set()
    pending = list(dict.fromkeys(wanted))
    sinks = set(pending)
    while pending:
        value = pending.pop(0)
        if value in seen:
            continue
        seen.add(value)
        order.append(value)
        network.add_edge((value, "before"), (value, "after"), capacity=max(1, cost(value)))
        if value in sinks:
            network.add_edge((value, "after"), "wanted")
        sources = rebuild(value)
        if sources is None:
            network.add_edge("given", (value, "before"))
            continue
        for source in sources:
            network.add_edge((source, "after"), (value, "before"))
            pending.append(source)
    if "given" not in network:  # nothing is wanted, or all of it can be computed from nothing
        return []
    # networkx puts on the far side only what can still reach the end: of equal cuts, the last.
    _, (_, far) = nx.minimum_cut(network, "given", "wanted")
    return [value for value in order if (value, "after") in far and (value, "before") not in far]
