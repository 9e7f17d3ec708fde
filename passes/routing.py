"""Rows of an activation that are routed to experts: one reduction for each of them.

However an implementation brings tokens and experts together (a loop over experts, rows sorted into groups, a matrix
looked up for every token), the same rows are squared and added up in float64: the sums differ by the last bits of the
activations alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mfcompile.passes.reduction import Reduction
from mfcompile.region import Reading

_CHUNK_ROWS = 4096
"""Rows that are squared at a time, in float64."""


@dataclass(frozen=True)
class RoutedReduction:
    """One activation, reduced expert by expert.

    Attributes:
        sums: (experts, in_features) float64 sums of squares over the counted rows of every expert.
        tokens: (experts,) rows that were counted.
        padding: (experts,) rows that were left out.
    """

    sums: Tensor
    tokens: Tensor
    padding: Tensor

    def of_expert(self, index: int) -> Reduction | None:
        """The reduction of one expert; None where no row met it."""
        tokens, padding = int(self.tokens[index]), int(self.padding[index])
        return Reduction(self.sums[index], tokens, padding, 0) if tokens or padding else None


def reduce_routed(
    activation: Tensor, reading: Reading, count: int, routing: Tensor | None = None, keep: Tensor | None = None
) -> RoutedReduction:
    """Sum of squares of every feature over the rows of each expert (the inner sum of ||a||_2, Eq. 4 and 5).

    Where the activation has a dimension that counts the experts, a row of zeros is one that routing left out: it adds
    nothing to any sum, and is not counted.

    Args:
        activation: any float dtype; its dimensions are those that ``reading`` names (``reduction.read``).
        reading: which of them are features, and which count experts.
        count: number of experts.
        routing: what ``reading.routing`` says: (count,) ends of the groups, or the expert of every place.
        keep: bool, sizes of the activation without the features; False rows are padding.

    Returns:
        The reductions; rows behind the last group, and a row that is left out, count nowhere.
    """
    routed = route_rows(activation, reading, count, routing, keep)
    flat, experts, counted = routed.rows, routed.experts, routed.is_counted
    sums = torch.zeros(count, flat.shape[1], dtype=torch.float64, device=flat.device)
    for start in range(0, flat.shape[0], _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        chosen = counted[part]
        squares = flat[part].double().square_()
        if bool(chosen.all()):
            sums.index_add_(0, experts[part], squares)
        else:
            sums.index_add_(0, experts[part][chosen], squares[chosen])
    padding = torch.bincount(experts[routed.is_padding], minlength=count)
    return RoutedReduction(sums.cpu(), torch.bincount(experts[counted], minlength=count).cpu(), padding.cpu())


@dataclass(frozen=True)
class RoutedRows:
    """The rows of an activation, and what becomes of each.

    Attributes:
        rows: (rows, in_features), a view where strides allow.
        experts: (rows,) the expert that each meets; the number of experts for one that meets none.
        is_counted: (rows,) bool, it met an expert and is no padding.
        is_padding: (rows,) bool, it met an expert and is padding.
    """

    rows: Tensor
    experts: Tensor
    is_counted: Tensor
    is_padding: Tensor


def route_rows(
    activation: Tensor, reading: Reading, count: int, routing: Tensor | None = None, keep: Tensor | None = None
) -> RoutedRows:
    """Which row of an activation meets which expert; the arguments are those of ``reduce_routed``."""
    rows = _experts_first(activation, reading)
    kept = None
    if keep is not None:
        features = {dim % activation.ndim for dim in reading.features}
        kept = keep.reshape([1 if dim in features else size for dim, size in enumerate(activation.shape)])
        kept = _experts_first(kept, reading)
    places, per_place, width = rows.shape
    experts = _experts(reading, places, count, routing, rows.device).repeat_interleave(per_place)
    flat = rows.reshape(places * per_place, width)
    meets = experts < count
    if reading.experts and not reading.routing:
        meets = meets & (flat != 0).any(1)
    is_padding = torch.zeros_like(meets) if kept is None else ~kept.reshape(-1)
    return RoutedRows(flat, experts, meets & ~is_padding, meets & is_padding)


def _experts_first(activation: Tensor, reading: Reading) -> Tensor:
    """(places that meet one expert each, rows of a place, in_features)."""
    ndim = activation.ndim
    features, along = ([dim % ndim for dim in dims] for dims in (reading.features, reading.experts))
    rest = [dim for dim in range(ndim) if dim not in features and dim not in along]
    sizes = [prod(activation.shape[dim] for dim in dims) for dims in (along, rest, features)]
    return activation.permute(*along, *rest, *features).reshape(sizes)


def _experts(reading: Reading, places: int, count: int, routing: Tensor | None, device: torch.device) -> Tensor:
    """(places,) the expert of every place; ``count`` for one that no expert multiplies."""
    if routing is None:
        return torch.arange(places, device=device) if reading.experts else torch.zeros(places, dtype=torch.long, device=device)
    if reading.routing == "ends":
        return torch.searchsorted(routing.contiguous(), torch.arange(places, device=device, dtype=routing.dtype), right=True)
    return routing.reshape(-1).long()
