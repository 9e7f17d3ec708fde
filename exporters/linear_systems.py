"""Systems of linear equations in ONNX: Gauss-Jordan elimination with row pivoting, unrolled over a static size."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18

op: Any = opset18  # its operators return unions of every type that they may have; here they are values of a graph


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


LARGEST_SYSTEM = 64
"""Equations; each takes about 15 operators."""


def linalg_solve(A: Any, B: Any, *, left: bool = True) -> Any:  # noqa: N803  # torch's names
    """A^-1 B, for A (..., n, n) and B (..., n, k) or (..., n)."""
    if not left:
        raise ValueError("solving from the right is not translated")
    is_vector = len(B.shape) == len(A.shape) - 1
    solution = _solve(A, _size(A), op.Unsqueeze(B, _ints(-1)) if is_vector else B)
    return op.Squeeze(solution, _ints(-1)) if is_vector else solution


def linalg_inv(A: Any) -> Any:  # noqa: N803
    """A^-1 for A (..., n, n)."""
    size = _size(A)
    unit = op.CastLike(op.EyeLike(op.ConstantOfShape(_ints(size, size))), A)
    return _solve(A, size, op.Expand(unit, op.Shape(A)))


def linalg_solve_triangular(
    self: Any,
    B: Any,  # noqa: N803
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Any:
    """A^-1 B for a triangular A; the other triangle, and with ``unitriangular`` the diagonal, are not looked at."""
    if not left:
        raise ValueError("solving from the right is not translated")
    size = _size(self)
    matrix = op.Trilu(self, op.Constant(value_int=0), upper=int(upper))
    if unitriangular:
        unit = op.CastLike(op.EyeLike(op.ConstantOfShape(_ints(size, size))), self)
        matrix = op.Add(op.Trilu(self, op.Constant(value_int=1 if upper else -1), upper=int(upper)), unit)
    return _solve(matrix, size, B)


def _size(matrix: Any) -> int:
    size = matrix.shape[-1] if matrix.shape is not None else None
    if not isinstance(size, int):
        raise ValueError(f"the size of the system must be static, it is {size}")
    if size > LARGEST_SYSTEM:
        raise ValueError(f"a system of {size} equations is too large to unroll (at most {LARGEST_SYSTEM})")
    return size


def _solve(matrix: Any, size: int, right: Any) -> Any:
    both = op.Concat(matrix, right, axis=-1)
    numbers = _ints(*range(size))
    for column in range(size):
        both = _eliminate(both, column, numbers)
    return op.Slice(both, _ints(size), _ints(2**31), _ints(-1))


def _eliminate(both: Any, column: int, numbers: Any) -> Any:
    """One step of Gauss-Jordan: the largest pivot comes up, its row is scaled, the column becomes a unit vector."""
    at = op.Slice(both, _ints(column), _ints(column + 1), _ints(-1))  # (..., row, 1)
    below = op.Unsqueeze(op.Less(numbers, _ints(column)), _ints(-1))
    size = op.Where(below, op.CastLike(op.Constant(value_float=-1.0), both), op.Abs(at))
    pivot = op.ArgMax(size, axis=-2, keepdims=1)  # (..., 1, 1)
    rows = op.Unsqueeze(numbers, _ints(-1))
    is_pivot, is_target = op.Equal(rows, pivot), op.Equal(rows, _ints(column))
    zero = op.CastLike(op.Constant(value_float=0.0), both)
    pivot_row = op.ReduceSum(op.Where(is_pivot, both, zero), _ints(-2), keepdims=1)
    target_row = op.Slice(both, _ints(column), _ints(column + 1), _ints(-2))
    swapped = op.Where(is_target, pivot_row, op.Where(is_pivot, target_row, both))
    scaled = op.Div(pivot_row, op.Slice(pivot_row, _ints(column), _ints(column + 1), _ints(-1)))
    factors = op.Slice(swapped, _ints(column), _ints(column + 1), _ints(-1))
    return op.Where(is_target, scaled, op.Sub(swapped, op.Mul(factors, scaled)))
