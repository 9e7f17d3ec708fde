"""Magnitude pruning: OMP, and its layer-normalised form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, SiteData


@dataclass(frozen=True)
class Magnitude(Criterion):
    """|w|: one-shot magnitude pruning (OMP), one threshold over all layers."""

    name: ClassVar[str] = "magnitude"
    allocation: ClassVar[str] = "magnitude-global"

    def score(self, site: SiteData) -> Tensor:
        """|w|."""
        return site.weight.detach().abs().float()


@dataclass(frozen=True)
class L2(Criterion):
    """|w| over the Frobenius norm of its layer, one threshold over all layers; in the published code, not in the paper."""

    name: ClassVar[str] = "l2"

    def score(self, site: SiteData) -> Tensor:
        """|w| / ||W||_F in float32; an all-zero layer scores zero."""
        # Contiguous: the norm adds up in the order of memory, which must not depend on how the weight is stored.
        magnitude = scaled_to_one(site.weight.detach().float()).abs().contiguous()
        norm = float(magnitude.norm())
        return magnitude / norm if norm else magnitude


def scaled_to_one(weight: Tensor) -> Tensor:
    """A float32 weight times a power of two, its largest magnitude about one: squares lose no bits and leave no range."""
    peak = float(weight.abs().max()) if weight.numel() else 0.0
    if not 0 < peak < math.inf:
        return weight
    exponent = -math.frexp(peak)[1]
    half = exponent // 2  # in two steps: what takes the smallest float32 to one is itself too large for one
    return weight * 2.0**half * 2.0 ** (exponent - half)
