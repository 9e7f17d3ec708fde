"""SNIP: the loss's sensitivity to a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, Need, SiteData


@dataclass(frozen=True)
class Snip(Criterion):
    """Connection sensitivity (Lee et al., "SNIP: Single-shot Network Pruning", ICLR 2019), one threshold over all layers.

    The published code also divides by the sum over all weights, which changes no ranking.
    """

    name: ClassVar[str] = "snip"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENTS})

    def score(self, site: SiteData) -> Tensor:
        """|g w| with the gradient averaged over the batches, Eq. 6 of SNIP."""
        assert site.gradient is not None
        return (site.gradient.detach().float() * site.weight.detach().float()).abs()
