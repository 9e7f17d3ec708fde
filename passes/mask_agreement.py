"""How far two pruners agree about which weights stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfcompile.masks import PackedMask
from mfcompile.region import PruneSite

Masks = Mapping[str, PackedMask]
"""FQN -> packed mask."""


@dataclass(frozen=True)
class PairAgreement:
    """Two sets of kept weights, A and B, of the same N weights.

    Attributes:
        kept: weights in A, and in B.
        shared: weights in both.
        weights: N.
    """

    kept: tuple[int, int]
    shared: int
    weights: int

    @property
    def kappa(self) -> float:
        """Agreement beyond chance, Cohen's kappa: 1 for the same masks, 0 for what chance gives, below 0 for less.

        (p - q) / (1 - q), with p the fraction of weights about which both decide alike, and q what p would be were the same
        numbers of weights kept at random (Cohen, A coefficient of agreement for nominal scales, 1960). It is
        ``shared_fraction`` on a scale from chance to all.
        """
        total, (one, other) = self.weights, self.kept
        alike = total - one - other + 2 * self.shared
        by_chance = (one * other + (total - one) * (total - other)) / total if total else 0.0
        return (alike - by_chance) / (total - by_chance) if total > by_chance else 1.0

    @property
    def shared_fraction(self) -> float:
        """|A and B| over the mean of |A| and |B|: of the weights that one keeps, how many the other keeps too."""
        return 2 * self.shared / sum(self.kept) if any(self.kept) else 1.0

    @property
    def shared_by_chance(self) -> float:
        """What ``shared_fraction`` is on average for random masks that keep as many."""
        one, other = self.kept
        return 2 * one * other / (self.weights * (one + other)) if one + other else 1.0

    @property
    def jaccard_kept(self) -> float:
        """|A and B| / |A or B|."""
        union = sum(self.kept) - self.shared
        return self.shared / union if union else 1.0

    @property
    def jaccard_pruned(self) -> float:
        """The same of the weights that are removed."""
        union = self.weights - self.shared
        return (self.weights - sum(self.kept) + self.shared) / union if union else 1.0


@dataclass(frozen=True)
class Agreement:
    """Every pruner against every other, at one sparsity.

    Attributes:
        labels: the pruners.
        pairs: row by row, (pruners, pruners); symmetric.
    """

    labels: tuple[str, ...]
    pairs: tuple[tuple[PairAgreement, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """The matrices, row by row."""
        measures = ("kappa", "shared_fraction", "shared_by_chance", "jaccard_kept", "jaccard_pruned")
        return {
            "pruners": list(self.labels),
            **{name: [[round(getattr(pair, name), 6) for pair in row] for row in self.pairs] for name in measures},
        }


def agreement(masks: Mapping[str, Masks], sites: Sequence[PruneSite]) -> Agreement:
    """Agreement of several sets of masks of one model.

    Args:
        masks: pruner -> its masks, packed; of the same parameters.
        sites: the weights that were to be pruned. What else a masked parameter holds is kept by all, and not counted.
    """
    weights = sum(site.weight_count for site in sites)
    own = {label: sum(mask.kept_count for mask in found.values()) for label, found in masks.items()}
    anyone: Masks = next(iter(masks.values()), {})
    outside = sum(mask.weight_count for mask in anyone.values()) - weights
    pairs = {}
    for index, (one, first) in enumerate(masks.items()):
        for other, second in list(masks.items())[index:]:
            kept = (own[one] - outside, own[other] - outside)
            shared = kept[0] if one == other else _shared(first, second) - outside
            pairs[one, other] = PairAgreement(kept, shared, weights)
            pairs[other, one] = PairAgreement(kept[::-1], shared, weights)
    return Agreement(tuple(masks), tuple(tuple(pairs[one, other] for other in masks) for one in masks))


def _shared(first: Masks, second: Masks) -> int:
    """Weights that both keep; the bits that fill up the last byte are 0."""
    return sum(int(np.bitwise_count(mask.bits & second[fqn].bits).sum()) for fqn, mask in first.items())
