"""LAMP: layer-adaptive magnitudes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, SiteData
from mfcompile.passes.criteria.magnitude import scaled_to_one


@dataclass(frozen=True)
class Lamp(Criterion):
    """Layer-adaptive magnitude pruning (Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021).

    One threshold over the scores of all layers. The largest weight of a layer scores about one, so that no layer
    collapses.
    """

    name: ClassVar[str] = "lamp"

    def score(self, site: SiteData) -> Tensor:
        """w^2 over the sum of the squares that are not smaller, Eq. 5 of LAMP, in float32; equal weights in their order."""
        squares = scaled_to_one(site.weight.detach().float()).square().reshape(-1)
        if not squares.numel():
            return squares.reshape(site.weight.shape)
        ordered, order = _sorted(squares)
        # The published arithmetic, so that scores agree to the last bit: the float32 sum of all, less a cumulative sum.
        before = torch.zeros_like(ordered)
        before[1:] = ordered.cumsum(0)[:-1]
        left = _sum(squares) - before
        # Rounding can take the last differences to zero or below: such a weight is the largest of its layer, or as good; a
        # zero is not. NaN is not below anything, and stays.
        scores = torch.where(left <= 0, (ordered > 0).float(), ordered / left)
        return torch.empty_like(squares).scatter_(0, order, scores).reshape(site.weight.shape)


def _sorted(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative numbers in order, and where they were; equal ones in their order. Twice as fast as a stable sort.

    The bits of non-negative floats are ordered as the floats are; with the position behind them, all keys are different.
    """
    keys = squares.numpy().view(np.uint32).astype(np.int64)
    keys <<= 32
    keys |= np.arange(keys.size)
    keys.sort()
    ordered = (keys >> 32).astype(np.uint32).view(np.float32)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(ordered), torch.from_numpy(keys)


def _sum(numbers: Tensor) -> Tensor:
    """The float32 sum that one thread makes, whatever the number of threads: of two sums, each is made by one thread."""
    return numbers.expand(2, -1).sum(1)[0]
