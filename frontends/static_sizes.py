"""Operators whose results are as long as their values say, as operators of a given length.

A recording knows every length. Under torch.export such a length is an unknown number, which few models survive, so a
recorded graph is exported with the recorded one. Each rewrite takes the recorded value (a TensorValue, or several) and
the operator's arguments, and returns what the operator returned on the example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfcompile.graph import TensorValue
from mfcompile.operators import grouped_mm

aten: Any = torch.ops.aten


def _index(recorded: TensorValue, values: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """x[mask]: a mask is as many columns of positions as it has dimensions."""
    if not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return aten.index.Tensor(values, indices)
    columns: list[Tensor | None] = []
    count = recorded.shape[_indexed_dimension(indices)]
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            columns += aten.nonzero_static.default(index, size=count).unbind(1)
        else:
            columns.append(index)
    return aten.index.Tensor(values, columns)


def _indexed_dimension(indices: Sequence[Tensor | None]) -> int:
    """Where the dimension of the positions stands: first when indices stand apart, else in place of the first."""
    given = [position for position, index in enumerate(indices) if index is not None]
    return given[0] if given == list(range(given[0], given[-1] + 1)) else 0


def _index_put(
    _: TensorValue, values: Tensor, indices: Sequence[Tensor | None], source: Tensor, accumulate: bool = False
) -> Any:
    """x[:, mask] = y or x[:, places] = y: a choice per element where y is one row for all, else rows at places.

    The indexed dimensions come first, as ONNX needs them.
    """
    position, given = _adjacent(indices)
    is_mask = len(given) == 1 and given[0].dtype == torch.bool
    if not given or (any(index.dtype == torch.bool for index in given) and not is_mask):
        return aten.index_put.default(values, indices, source, accumulate)
    ndim = given[0].ndim if is_mask else len(given)  # dimensions of x that are indexed
    behind = values.ndim - position - ndim
    columns = given
    if is_mask:
        count = source.shape[source.ndim - behind - 1] if source.ndim > behind else 1
        if count == 1 and not accumulate:
            return _choose(values, given[0], source, behind)
        columns = list(aten.nonzero_static.default(given[0], size=count).unbind(1))
    elif position == 0:
        return aten.index_put.default(values, indices, source, accumulate)
    order = [*range(position, position + ndim), *range(position), *range(position + ndim, values.ndim)]
    back = [order.index(dim) for dim in range(values.ndim)]
    places = torch.broadcast_shapes(*(column.shape for column in columns))  # type: ignore[no-untyped-call]
    wide = source.expand(*values.shape[:position], *places, *values.shape[position + ndim :])
    front = [*range(position, position + len(places)), *range(position), *range(position + len(places), wide.ndim)]
    return aten.index_put.default(values.permute(order), columns, wide.permute(front), accumulate).permute(back)


def _adjacent(indices: Sequence[Tensor | None]) -> tuple[int, list[Tensor]]:
    """Where the indices begin, and the indices; none where they stand apart."""
    given = [(position, index) for position, index in enumerate(indices) if index is not None]
    if not given or given[-1][0] - given[0][0] != len(given) - 1:
        return 0, []
    return given[0][0], [index for _, index in given]


def _choose(values: Tensor, mask: Tensor, source: Tensor, behind: int) -> Tensor:
    """One row for every place of the mask; ``behind`` dimensions follow the masked ones."""
    if source.ndim > behind:
        front = source.shape[: source.ndim - behind - 1]
        source = source.reshape(*front, *(1,) * mask.ndim, *source.shape[source.ndim - behind :])
    return torch.where(mask.reshape(*mask.shape, *(1,) * behind), source.to(values.dtype), values)


def _index_put_(
    recorded: TensorValue, values: Tensor, indices: Sequence[Tensor | None], source: Tensor, accumulate: bool = False
) -> Tensor:
    return values.copy_(_index_put(recorded, values, indices, source, accumulate))


def _nonzero(recorded: TensorValue, values: Tensor) -> Tensor:
    found: Tensor = aten.nonzero_static.default(values, size=recorded.shape[0])
    return found


def _nonzero_numpy(recorded: Sequence[TensorValue], values: Tensor) -> list[Tensor]:
    return list(_nonzero(recorded[0], values).unbind(1))


def _masked_select(recorded: TensorValue, values: Tensor, mask: Tensor) -> Tensor:
    values, mask = torch.broadcast_tensors(values, mask)  # type: ignore[no-untyped-call]
    places = aten.nonzero_static.default(mask.reshape(-1), size=recorded.shape[0]).squeeze(1)
    return values.reshape(-1).index_select(0, places)


def _repeats(recorded: TensorValue, repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    """repeat_interleave(repeats): which element every place of the result shows."""
    ends = repeats.cumsum(0)
    places = torch.arange(recorded.shape[0], device=repeats.device, dtype=repeats.dtype)
    return (places.unsqueeze(1) >= ends.unsqueeze(0)).sum(1).to(repeats.dtype)


def _repeat_interleave(
    recorded: TensorValue, values: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    if dim is None:
        values, dim = values.reshape(-1), 0
    if repeats.numel() == 1:
        repeats = repeats.reshape(1).expand(values.shape[dim])
    length = TensorValue((recorded.shape[dim],), repeats.dtype)
    return values.index_select(dim, _repeats(length, repeats).long())


def _bincount(recorded: TensorValue, values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    bins = torch.arange(recorded.shape[0], device=values.device, dtype=values.dtype)
    hits = values.unsqueeze(1) == bins.unsqueeze(0)
    if weights is None:
        return hits.sum(0)
    return torch.where(hits, weights.unsqueeze(1), 0).sum(0).to(recorded.dtype)


def _grouped_mm(
    recorded: TensorValue,
    rows: Tensor,
    weights: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    if rows.ndim != 2 or weights.ndim != 3 or offs is None or bias is not None:
        return aten._grouped_mm.default(rows, weights, offs, bias, out_dtype)
    return grouped_mm(rows, weights, offs).to(recorded.dtype)


REWRITES: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put_,
    aten.nonzero.default: _nonzero,
    aten.nonzero_numpy.default: _nonzero_numpy,
    aten.masked_select.default: _masked_select,
    aten.repeat_interleave.Tensor: _repeats,
    aten.repeat_interleave.self_Tensor: _repeat_interleave,
    aten.bincount.default: _bincount,
    aten._grouped_mm.default: _grouped_mm,
}
"""Operator -> what replaces it: called with the recorded value and the operator's arguments."""
