"""Magnitude pruning: OMP, and its layer-normalised form."""

from __future__ import annotations

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
        magnitude = site.weight.detach().abs().float()
        norm = float(magnitude.norm())
        return magnitude / norm if norm else magnitude
