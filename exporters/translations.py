"""ONNX translations of torch operators that torch.onnx lacks, or has wrong.

Each function takes what the aten operator takes: tensors are values of the ONNX graph under construction, with dtype and
(where static) shape; everything else is a Python value. ``TRANSLATIONS`` goes to torch.onnx as its
``custom_translation_table``; an operator in it is not decomposed first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

import mfcompile.operators  # noqa: F401  # registers our own operators
from mfcompile.exporters.linear_systems import linalg_inv, linalg_solve, linalg_solve_triangular

__all__ = ["TRANSLATIONS"]

aten = torch.ops.aten
op: Any = opset18  # its operators return unions of every type that they may have; here they are values of a graph
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT16, ir.DataType.INT8, ir.DataType.UINT8)


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


def _static(value: Any, dimension: int, what: str) -> int:
    size = value.shape[dimension] if value.shape is not None else None
    if not isinstance(size, int):
        raise ValueError(f"{what} must be static, it is {size}")
    return size


def grouped_mm(rows: Any, weights: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows (row, in) sorted by group, weights (group, in, out): each group's rows times its matrix, one after the other.

    Every row is multiplied once, whatever the routing: groups are ranges of rows whose ends are known at run time.
    """
    if len(rows.shape) != 2 or len(weights.shape) != 3 or bias is not None:
        raise ValueError("only rows (row, in) and weights (group, in, out) without bias are translated")
    groups = _static(weights, 0, "the number of groups")
    ends = op.Cast(ends, to=INT64)
    begin, parts = _ints(0), []
    for group in range(groups):
        end = op.Shape(rows, start=0, end=1) if group == groups - 1 else op.Gather(ends, _ints(group), axis=0)
        matrix = op.Gather(weights, op.Constant(value_int=group), axis=0)
        parts.append(op.MatMul(op.Slice(rows, begin, end, _ints(0)), matrix))
        begin = end
    return parts[0] if groups == 1 else op.Concat(*parts, axis=0)


def nonzero_static(self: Any, *, size: int, fill_value: int = -1) -> Any:
    """Places (size, rank) of what is not zero; as many as the graph was made for, as index operators downstream expect."""
    found = op.Transpose(op.NonZero(self), perm=[1, 0])
    rank = len(self.shape)
    padding = op.Expand(op.Constant(value_int=fill_value), _ints(size, rank))
    return op.Slice(op.Concat(found, padding, axis=0), _ints(0), _ints(size), _ints(0))


def rsub(self: Any, other: Any, alpha: float = 1) -> Any:
    """other - alpha self; torch.onnx would make it a subtraction from a Python number, which its types refuse."""
    if isinstance(other, float) and self.dtype in INTEGERS:
        self = op.Cast(self, to=FLOAT)
    scaled = self if alpha == 1 else op.Mul(self, op.CastLike(op.Constant(value_float=float(alpha)), self))
    other = op.Constant(value_float=float(other)) if isinstance(other, (int, float)) else other
    return op.Sub(op.CastLike(other, self), scaled)


def multinomial(self: Any, num_samples: int, replacement: bool = False, generator: Any = None) -> Any:
    """Draws by the Gumbel trick: the largest of log p + Gumbel noise are a draw without replacement.

    ONNX's Multinomial draws with replacement only.
    """
    weights = op.Cast(self, to=FLOAT)
    if replacement and num_samples != 1:
        raise ValueError("drawing several samples with replacement is not translated")
    uniform = op.RandomUniformLike(weights, low=1e-7, high=1.0 - 1e-7)
    noise = op.Neg(op.Log(op.Neg(op.Log(uniform))))
    _, places = op.TopK(op.Add(op.Log(weights), noise), _ints(num_samples), axis=-1)
    return places


def _extreme_so_far(self: Any, dim: int, *, largest: bool) -> tuple[Any, Any]:
    """Running maximum (minimum) and where it is, last place first among equals: a doubling scan over a static length.

    After step k every place knows the extreme of the 2^k places that end in it.
    """
    rank = len(self.shape)
    axis = dim % rank
    length = _static(self, axis, "the length")
    values = self
    places = _along(length, rank, axis, self)
    step = 1
    while step < length:
        earlier, tail = _shifted(values, step, axis), op.Slice(values, _ints(step), _ints(length), _ints(axis))
        better = op.Less(tail, earlier) if largest else op.Greater(tail, earlier)
        earlier_at, tail_at = _shifted(places, step, axis), op.Slice(places, _ints(step), _ints(length), _ints(axis))
        head = op.Slice(values, _ints(0), _ints(step), _ints(axis))
        head_at = op.Slice(places, _ints(0), _ints(step), _ints(axis))
        values = op.Concat(head, op.Where(better, earlier, tail), axis=axis)
        places = op.Concat(head_at, op.Where(better, earlier_at, tail_at), axis=axis)
        step *= 2
    return values, places


def cumprod(self: Any, dim: int, dtype: Any = None) -> Any:
    """Running product: after step k every place holds the product of the 2^k places that end in it."""
    axis = dim % len(self.shape)
    length = _static(self, axis, "the length")
    step = 1
    while step < length:
        tail = op.Slice(self, _ints(step), _ints(length), _ints(axis))
        head = op.Slice(self, _ints(0), _ints(step), _ints(axis))
        self = op.Concat(head, op.Mul(_shifted(self, step, axis), tail), axis=axis)
        step *= 2
    return self


def _shifted(value: Any, step: int, axis: int) -> Any:
    """Everything but the last ``step`` places."""
    return op.Slice(value, _ints(0), _ints(-step), _ints(axis))


def _along(length: int, rank: int, axis: int, like: Any) -> Any:
    """0, 1, 2, ... along an axis, in the shape of ``like``."""
    shape = [1] * rank
    shape[axis] = length
    return op.Expand(op.Reshape(_ints(*range(length)), _ints(*shape)), op.Shape(like))


def cummax(self: Any, dim: int) -> tuple[Any, Any]:
    """Running maximum and its places."""
    return _extreme_so_far(self, dim, largest=True)


def cummin(self: Any, dim: int) -> tuple[Any, Any]:
    """Running minimum and its places."""
    return _extreme_so_far(self, dim, largest=False)


def stable_sort(self: Any, *, stable: Any = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """Sorted values and where they were; onnxruntime's TopK keeps the order of equals."""
    size = op.Slice(op.Shape(self), _ints(dim % len(self.shape)), _ints(dim % len(self.shape) + 1), _ints(0))
    if self.dtype == ir.DataType.BOOL:
        values, places = op.TopK(op.Cast(self, to=INT64), size, axis=dim, largest=int(descending))
        return op.Cast(values, to=ir.DataType.BOOL), places
    values, places = op.TopK(self, size, axis=dim, largest=int(descending))
    return values, places


def searchsorted(
    sorted_sequence: Any, self: Any, *, out_int32: bool = False, right: bool = False, side: Any = None, sorter: Any = None
) -> Any:
    """How many of the boundaries lie below (below or at, with ``right``) each value: (..., boundary) and (..., value)."""
    if sorter is not None:
        raise ValueError("a sorter is not translated")
    if len(sorted_sequence.shape) == 1:
        boundaries, values = sorted_sequence, op.Unsqueeze(self, _ints(-1))
    else:
        boundaries, values = op.Unsqueeze(sorted_sequence, _ints(-2)), op.Unsqueeze(self, _ints(-1))
    boundaries = op.CastLike(boundaries, values)
    below = op.LessOrEqual(boundaries, values) if right or side == "right" else op.Less(boundaries, values)
    counts = op.ReduceSum(op.Cast(below, to=INT64), _ints(-1), keepdims=0)
    return op.Cast(counts, to=ir.DataType.INT32) if out_int32 else counts


def bucketize(self: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """Which bucket each value falls into."""
    return searchsorted(boundaries, self, out_int32=out_int32, right=right)


def masked_fill(self: Any, mask: Any, value: Any) -> Any:
    """Value where the mask is true; onnxruntime has no Where for bool."""
    if self.dtype == ir.DataType.BOOL:
        filled = op.Cast(value, to=ir.DataType.BOOL)
        return op.Or(op.And(self, op.Not(mask)), op.And(mask, filled))
    return op.Where(mask, op.CastLike(value, self), self)


def where(condition: Any, self: Any, other: Any) -> Any:
    """A choice between bools by logic, which onnxruntime has kernels for; other types as they are."""
    if self.dtype == ir.DataType.BOOL and other.dtype == ir.DataType.BOOL:
        return op.Or(op.And(condition, self), op.And(op.Not(condition), other))
    return op.Where(condition, self, other)


def squeeze_dim(self: Any, dim: int) -> Any:
    """Without this dimension where its size is 1; else as it is, as torch has it, where ONNX's Squeeze fails."""
    return squeeze_dims(self, [dim])


def squeeze_dims(self: Any, dim: Sequence[int]) -> Any:
    """Without those of the dimensions whose size is 1 (or not known, which torch's own export takes for 1)."""
    sizes = list(self.shape)
    dropped = [axis for axis in dim if sizes and not (isinstance(sizes[axis], int) and sizes[axis] != 1)]
    return op.Squeeze(self, _ints(*dropped)) if dropped else op.Identity(self)


def cdist_forward(x1: Any, x2: Any, p: float, compute_mode: Any = None) -> Any:
    """Distances between all rows: x1 (..., n, d), x2 (..., m, d) -> (..., n, m)."""
    difference = op.Abs(op.Sub(op.Unsqueeze(x1, _ints(-2)), op.Unsqueeze(x2, _ints(-3))))
    if p == 1:
        return op.ReduceSum(difference, _ints(-1), keepdims=0)
    if p != 2:
        raise ValueError(f"the distance of order {p} is not translated")
    return op.Sqrt(op.ReduceSum(op.Mul(difference, difference), _ints(-1), keepdims=0))


def gelu(self: Any, *, approximate: str = "none") -> Any:
    """x times the normal distribution, its operations in the order in which onnxruntime knows them as one kernel.

    torch.onnx writes x (0.5 (1 + erf)), which onnxruntime runs as it stands, one pass over the activations for each operator.
    """
    if approximate == "tanh":
        cubic = op.Add(self, op.Mul(op.Pow(self, _like(3.0, self)), _like(0.044715, self)))
        tangent = op.Tanh(op.Mul(cubic, _like(math.sqrt(2 / math.pi), self)))
        return op.Mul(op.Mul(self, _like(0.5, self)), op.Add(tangent, _like(1.0, self)))
    twice = op.Add(op.Erf(op.Div(self, _like(math.sqrt(2), self))), _like(1.0, self))
    return op.Mul(op.Mul(self, twice), _like(0.5, self))


def _like(number: float, value: Any) -> Any:
    return op.CastLike(op.Constant(value_float=number), value)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.mfcompile.grouped_mm.default: grouped_mm,
    aten.nonzero_static.default: nonzero_static,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: rsub,
    aten.multinomial.default: multinomial,
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
    aten.sort.stable: stable_sort,
    aten.searchsorted.Tensor: searchsorted,
    aten.bucketize.Tensor: bucketize,
    aten.linalg_solve.default: linalg_solve,
    aten.linalg_inv.default: linalg_inv,
    aten.linalg_solve_triangular.default: linalg_solve_triangular,
    aten._cdist_forward.default: cdist_forward,
    aten.cumprod.default: cumprod,
    aten.gelu.default: gelu,
    aten.where.self: where,
    aten.squeeze.dim: squeeze_dim,
    aten.squeeze.dims: squeeze_dims,
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
}
