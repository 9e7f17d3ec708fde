"""Operators of our own: stand-ins for torch operators that cannot be traced as they are."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mfcompile::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Every row times the matrix of its group, as ``aten._grouped_mm`` computes it, for every float dtype.

    torch's operator runs in float32, but its shape function refuses anything except bfloat16, so that no graph which
    holds it can be traced again.

    Args:
        rows: (row, in), sorted by group.
        weights: (group, in, out).
        ends: (group,) where the rows of each group end, ascending; rows behind the last end belong to the last group.

    Returns:
        (row, out).
    """
    result = rows.new_empty(rows.shape[0], weights.shape[2])
    begin = 0
    for group, end in enumerate(ends.tolist()):
        stop = rows.shape[0] if group == weights.shape[0] - 1 else end
        result[begin:stop] = rows[begin:stop] @ weights[group]
        begin = stop
    return result


@grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])
