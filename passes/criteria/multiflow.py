"""MULTIFLOW's score, and the paper's ablation of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, Need, SiteData
from mfcompile.passes.scores import WeightScores, score_scale, score_weights


@dataclass(frozen=True)
class Multiflow(Criterion):
    """The information that flows through a weight: Eq. 4 to 6 of MULTIFLOW (Farina et al., CVPR 2024).

    Its budgets are those that magnitudes earn within their modality (Eq. 7).
    """

    name: ClassVar[str] = "multiflow"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    allocation: ClassVar[str] = "magnitude-per-region"

    def score(self, site: SiteData) -> Tensor:
        """S(l) |w_rl| S(r), up to a factor of the layer."""
        assert site.input_norm is not None
        return score_weights(site.weight, site.input_norm)

    def values(self, site: SiteData) -> WeightScores | None:
        """The same, computed where it is read; None where weights are not finite, which ``score`` leads to a message."""
        assert site.input_norm is not None
        scores = WeightScores(site.weight, site.input_norm)
        return scores if scores.is_finite else None

    def scale(self, site: SiteData) -> float:
        """That factor, with norms per sample: layers may have seen different numbers of them."""
        assert site.input_norm is not None
        return score_scale(site.weight, site.input_norm / max(site.sample_count, 1) ** 0.5)


@dataclass(frozen=True)
class InvertedMultiflow(Multiflow):
    """The lowest scores of MULTIFLOW stay: the paper's ablation (Tab. 3), with the budgets of Eq. 7."""

    name: ClassVar[str] = "multiflow-inverted"

    def score(self, site: SiteData) -> Tensor:
        """The negative score; defined where the score is zero, unlike its inverse."""
        return -super().score(site)

    def values(self, site: SiteData) -> WeightScores | None:
        """The same, computed where it is read."""
        assert site.input_norm is not None
        scores = WeightScores(site.weight, site.input_norm, is_inverted=True)
        return scores if scores.is_finite else None
