"""Wanda: magnitude times activation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, Need, SiteData


@dataclass(frozen=True)
class Wanda(Criterion):
    """Pruning by weights and activations (Sun et al., ICLR 2024): every output row loses the same fraction."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    allocation: ClassVar[str] = "uniform-rows"

    def score(self, site: SiteData) -> Tensor:
        """|w_ij| ||x_j||, Eq. 1 of Wanda; the norm is scaled to a maximum of one, so that nothing leaves float32."""
        assert site.input_norm is not None
        return site.weight.detach().abs().float() * (site.input_norm / _peak(site.input_norm)).float()

    def scale(self, site: SiteData) -> float:
        """The factor that ``score`` takes out, with norms per sample."""
        assert site.input_norm is not None
        return _peak(site.input_norm) / math.sqrt(max(site.sample_count, 1))


def _peak(norm: Tensor) -> float:
    peak = float(norm.max())
    return peak or 1.0
