"""Allocation: how many weights every site loses, from one sparsity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes.selection import magnitude_threshold
from mfcompile.region import PruneSite

ROUNDINGS = ("exact", "official")

WeightOf = Callable[[PruneSite], Tensor]
"""Gives (out_features, in_features) of a site, as a view where the layout allows it."""


@dataclass(frozen=True)
class Budget:
    """Weights to remove per site.

    Attributes:
        pruned: site name -> weights that are removed.
        thresholds: group -> the magnitude at which the group was cut (Eq. 7).
    """

    pruned: Mapping[str, int]
    thresholds: Mapping[str, float]


def check_sparsity(sparsity: float) -> float:
    """Return the sparsity as a float in [0, 1).

    Raises:
        InputError: it is no number in [0, 1); a percentage gets a hint.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):  # NumPy's numbers too
        raise InputError(f"sparsity must be a number in [0, 1), the fraction of weights removed; got {sparsity!r}")
    if not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise InputError(f"sparsity must be in [0, 1), the fraction of weights removed; got {sparsity:g}{hint}")
    return float(sparsity)


def allocate_by_magnitude(
    groups: Mapping[str, Sequence[PruneSite]], weight_of: WeightOf, sparsity: float, rounding: str = "exact"
) -> Budget:
    """Every group loses the same fraction, its sites what their magnitudes earn: Eq. 7 of MULTIFLOW (CVPR 2024).

    In a group of N weights the int(sparsity * N) smallest magnitudes are counted site by site. Nothing is removed
    here: the counts are the budgets.

    Args:
        groups: group name (a region) -> its sites.
        weight_of: gives the weight of a site.
        sparsity: fraction removed, in [0, 1).
        rounding: "exact" gives integer counts that sum to int(sparsity * N), ties broken by position; "official"
            truncates a float64 quotient per layer as the published code does, which can lose one weight per layer.

    Raises:
        InputError: the sparsity or the rounding is not valid, or a weight holds NaN or infinity.
    """
    sparsity = check_sparsity(sparsity)
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding={rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
    pruned: dict[str, int] = {}
    thresholds: dict[str, float] = {}
    for group, sites in groups.items():
        k = int(sparsity * sum(site.weight_count for site in sites))
        found = magnitude_threshold(
            [lambda site=site: weight_of(site) for site in sites],  # type: ignore[misc]
            max(k, 1),
            [site.name for site in sites],
        )
        if k < 1:
            counts: Sequence[int] = [0] * len(sites)
        elif rounding == "exact":
            counts = found.pruned_counts(k)
            thresholds[group] = found.value
        else:
            not_above = [below + ties for below, ties in zip(found.below, found.ties, strict=True)]
            counts = [_truncated(count, site.weight_count) for count, site in zip(not_above, sites, strict=True)]
            thresholds[group] = found.value
        pruned.update({site.name: count for site, count in zip(sites, counts, strict=True)})
    return Budget(pruned, thresholds)


def _truncated(pruned: int, weights: int) -> int:
    """int(f * n) with f = 1 - kept / n in float64: the published arithmetic, which may fall one short of ``pruned``."""
    fraction = 1 - (weights - pruned) / weights
    return int(fraction * weights)
