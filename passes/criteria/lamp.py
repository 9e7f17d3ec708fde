"""LAMP: layer-adaptive magnitudes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, SiteData


@dataclass(frozen=True)
class Lamp(Criterion):
    """Layer-adaptive magnitude pruning (Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021).

    One threshold over the scores of all layers. The largest weight of a layer scores about one, so that no layer
    collapses.
    """

    name: ClassVar[str] = "lamp"

    def score(self, site: SiteData) -> Tensor:
        """w^2 over the sum of the squares that are not smaller, Eq. 5 of LAMP, in float32; equal weights in their order."""
        squares = site.weight.detach().float().square().reshape(-1)
        ordered, order = squares.sort(stable=True)
        # The sum of all minus those before; float32 as in the published code, so that scores agree to the last bit.
        before = torch.zeros_like(ordered)
        before[1:] = ordered.cumsum(0)[:-1]
        left = ordered.sum() - before
        # Rounding can take the last differences to zero or below: such a weight is the largest of its layer, or as good.
        scores = torch.where(left > 0, ordered / left, torch.ones_like(ordered))
        return torch.empty_like(squares).scatter_(0, order, scores).reshape(site.weight.shape)
