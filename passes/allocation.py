"""Allocation: how many weights every site loses, from one sparsity, one per region, or one per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes.apportionment import apportion
from mfcompile.passes.selection import Threshold, magnitude_threshold, score_threshold
from mfcompile.passes.sparsity_patterns import Pattern, Unstructured
from mfcompile.recipe import ROUNDINGS
from mfcompile.region import PruneSite

ALLOCATIONS = (
    "magnitude-per-region",
    "magnitude-global",
    "score-per-region",
    "score-global",
    "uniform",
    "uniform-rows",
    "erk",
)
"""By the magnitudes or the scores of a region or of the whole model, the same in every layer or output row, or by shape."""

EVERYTHING = "all"
"""Name of the group that holds every site."""

Sparsity = float | Mapping[str, float]
"""The fraction removed: one for all, or region -> its own."""

WeightOf = Callable[[PruneSite], Tensor]
"""Gives (out_features, in_features) of a site, as a view where the layout allows it; or what else is ranked of it."""


@dataclass(frozen=True)
class Budget:
    """What to remove per site, in units of the pattern (single weights, or blocks).

    Attributes:
        pruned: site name -> units that are removed.
        thresholds: group -> the value at which the group was cut (Eq. 7).
        by_row: site name -> units that each of its rows loses; only where the allocation decides that.
    """

    pruned: Mapping[str, int]
    thresholds: Mapping[str, float]
    by_row: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def check_sparsity(sparsity: float, what: str = "sparsity") -> float:
    """Return the sparsity as a float in [0, 1).

    Args:
        sparsity: what the user gave.
        what: what it is called in messages.

    Raises:
        InputError: it is no number in [0, 1); a percentage gets a hint.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):  # NumPy's numbers too
        raise InputError(f"{what} must be a number in [0, 1), the fraction of weights removed; got {sparsity!r}")
    if not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise InputError(f"{what} must be in [0, 1), the fraction of weights removed; got {sparsity:g}{hint}")
    return float(sparsity)


@dataclass(frozen=True)
class Request:
    """What is to be allocated.

    Attributes:
        sites: the sites that are pruned, in ``named_parameters`` order.
        sparsity: one for all, or region -> its own.
        magnitude_of: gives the weights of a site; their magnitudes are ranked.
        score_of: gives scores that can be compared between sites, of any sign.
        pattern: the shape in which weights are removed.
        rounding: "exact" gives integers that sum to int(sparsity * N) of every group, ties broken by position;
            "official" repeats the published code: all that ties at a threshold goes, Eq. 7 truncates a float64 quotient per
            layer, which can lose one weight per layer, and layers and rows of a uniform allocation are truncated each on its
            own. It knows single weights only.
        is_budget: the magnitudes give budgets for other scores (Eq. 7); False where they are the scores, and published code
            takes what is not above the threshold, with nothing to truncate in between.
    """

    sites: Sequence[PruneSite]
    sparsity: Sparsity
    magnitude_of: WeightOf
    score_of: WeightOf
    pattern: Pattern = field(default_factory=Unstructured)
    rounding: str = "exact"
    is_budget: bool = True

    def units(self, site: PruneSite) -> int:
        """Units that a site is made of."""
        rows, columns = self.pattern.unit_grid(site.out_features, site.in_features)
        return rows * columns

    def unit_scores(self, values: WeightOf, site: PruneSite) -> Tensor:
        """One value per unit of a site."""
        if isinstance(self.pattern, Unstructured):
            return values(site)
        return self.pattern.unit_scores(values(site).float())

    def groups(self) -> dict[str, list[PruneSite]]:
        """Region -> its sites."""
        grouped: dict[str, list[PruneSite]] = {}
        for site in self.sites:
            grouped.setdefault(site.region, []).append(site)
        return grouped

    def sparsity_of(self, group: str) -> float:
        """The fraction that a region loses, or everything."""
        return self.sparsity if isinstance(self.sparsity, float) else self.sparsity[group]

    def units_to_prune(self, group: str, sites: Sequence[PruneSite]) -> int:
        """int(sparsity * N) of a group, rounded down to whole units.

        Raises:
            InputError: the sites do not hold as many whole units.
        """
        sparsity = self.sparsity_of(group)
        wanted = int(sparsity * sum(site.weight_count for site in sites)) // self.pattern.unit_weights
        there = sum(self.units(site) for site in sites)
        if wanted > there:
            raise InputError(
                f"sparsity {sparsity:g} of {'the model' if group == EVERYTHING else group} takes {wanted:,} blocks of "
                f"{self.pattern.unit_weights} weights, but its layers hold {there:,} whole ones. Ask for less, or leave layers "
                f"with few outputs out with ignore"
            )
        return wanted


def allocate(allocation: str | Mapping[str, float], request: Request) -> Budget:
    """Budgets of every site.

    Args:
        allocation: one of ALLOCATIONS, or site name -> the sparsity of that site.
        request: sites, sparsity, and what they are ranked by.

    Raises:
        InputError: the allocation or the sparsity is not valid, or a weight holds NaN or infinity.
    """
    if request.rounding not in ROUNDINGS:
        raise InputError(f"rounding={request.rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
    if not isinstance(allocation, str):
        return _explicit(allocation, request)
    if allocation not in ALLOCATIONS:
        raise InputError(
            f"allocation={allocation!r} is unknown; choose one of {', '.join(ALLOCATIONS)}, or give sparsities by layer"
        )
    groups = groups_of(allocation, request)
    if allocation.startswith("magnitude"):
        return _by_magnitude(groups, request)
    if allocation.startswith("score"):
        return _by_score(groups, request)
    pruned: dict[str, int] = {}
    for group, sites in groups.items():
        total = request.units_to_prune(group, sites)
        pruned.update(_erk(total, sites, request) if allocation == "erk" else _uniform(total, group, sites, request))
    by_row = (
        {site.name: _rows(pruned[site.name], site, request) for site in request.sites} if allocation == "uniform-rows" else {}
    )
    return Budget({name: sum(by_row.get(name, (count,))) for name, count in pruned.items()}, {}, by_row)


def groups_of(allocation: str, request: Request) -> dict[str, list[PruneSite]]:
    """Group -> its sites: the groups that lose a fraction of their own (``Request.sparsity_of``).

    Raises:
        InputError: the allocation knows no regions, and every region was given its own sparsity.
    """
    if isinstance(request.sparsity, float) and not allocation.endswith("-per-region"):
        return {EVERYTHING: list(request.sites)}
    check_scope(allocation, request.sparsity)
    return request.groups()


def check_scope(allocation: str | Mapping[str, float] | None, sparsity: Sparsity | None) -> None:
    """Refuse an allocation over the whole model where every region has a sparsity of its own.

    Args:
        allocation: by name, or by layer; None for the criterion's own, which follows the regions.
        sparsity: what was asked for.

    Raises:
        InputError: names the allocation that would do.
    """
    if isinstance(allocation, str) and allocation.endswith("-global") and isinstance(sparsity, Mapping):
        raise InputError(
            f"allocation={allocation!r} sets one threshold for the whole model, but every region was given its own sparsity. "
            f"Use {allocation.replace('-global', '-per-region')!r}, or one sparsity"
        )


def _by_magnitude(groups: Mapping[str, Sequence[PruneSite]], request: Request) -> Budget:
    """Every group loses its fraction, its sites what their magnitudes earn: Eq. 7 of MULTIFLOW (CVPR 2024).

    In a group of N weights the int(sparsity * N) smallest magnitudes are counted site by site. Nothing is removed here:
    the counts are the budgets.
    """
    pruned: dict[str, int] = {}
    thresholds: dict[str, float] = {}
    for group, sites in groups.items():
        k = request.units_to_prune(group, sites)
        if not any(request.units(site) for site in sites):
            pruned.update({site.name: 0 for site in sites})
            continue
        found = magnitude_threshold(*_ranked(sites, request, request.magnitude_of, max(k, 1), "{}"))
        counts = _counts(found, k, sites, request)
        if request.rounding == "official" and request.is_budget:
            counts = [_truncated(count, request.units(site)) for count, site in zip(counts, sites, strict=True)]
        pruned.update({site.name: count for site, count in zip(sites, counts, strict=True)})
        if k:
            thresholds[group] = found.value
    return Budget(pruned, thresholds)


def _counts(found: Threshold, k: int, sites: Sequence[PruneSite], request: Request) -> Sequence[int]:
    """What every site loses to a threshold that k units are to stay under."""
    if k < 1:
        return [0] * len(sites)
    if request.rounding == "exact":
        return found.pruned_counts(k)
    return [below + ties for below, ties in zip(found.below, found.ties, strict=True)]


def _truncated(pruned: int, weights: int) -> int:
    """int(f * n) with f = 1 - kept / n in float64: the published arithmetic, which may fall one short of ``pruned``."""
    if not weights:
        return 0
    fraction = 1 - (weights - pruned) / weights
    return int(fraction * weights)


def _by_score(groups: Mapping[str, Sequence[PruneSite]], request: Request) -> Budget:
    """One threshold over the scores of all sites of a group."""
    pruned: dict[str, int] = {}
    thresholds: dict[str, float] = {}
    for group, sites in groups.items():
        k = request.units_to_prune(group, sites)
        if k < 1:
            pruned.update({site.name: 0 for site in sites})
            continue
        found = score_threshold(*_ranked(sites, request, request.score_of, k, "the score of {}"))
        pruned.update({site.name: count for site, count in zip(sites, _counts(found, k, sites, request), strict=True)})
        thresholds[group] = found.value
    return Budget(pruned, thresholds)


def _ranked(
    sites: Sequence[PruneSite], request: Request, values: WeightOf, k: int, what: str
) -> tuple[list[Callable[[], Tensor]], int, list[str]]:
    def of(site: PruneSite) -> Callable[[], Tensor]:
        return lambda: request.unit_scores(values, site)

    return [of(site) for site in sites], k, [what.format(site.name) for site in sites]


def _uniform(total: int, group: str, sites: Sequence[PruneSite], request: Request) -> dict[str, int]:
    """The same fraction of every site; whole numbers that sum to the total."""
    units = [request.units(site) for site in sites]
    if request.rounding == "official":
        shares = tuple(int(request.sparsity_of(group) * count) for count in units)
    else:
        shares = apportion(total, units, units)
    return {site.name: share for site, share in zip(sites, shares, strict=True)}


def _rows(pruned: int, site: PruneSite, request: Request) -> tuple[int, ...]:
    """The same number of every row of a site; where it does not divide, the first rows lose one more."""
    rows, columns = request.pattern.unit_grid(site.out_features, site.in_features)
    if not rows:
        return ()
    if request.rounding == "official":
        return (int(columns * request.sparsity_of(site.region)),) * rows
    share, left = divmod(pruned, rows)
    return tuple(share + (row < left) for row in range(rows))


def _erk(total: int, sites: Sequence[PruneSite], request: Request) -> dict[str, int]:
    """Erdős–Rényi–Kernel densities: a layer keeps in proportion to (out + in), at most all (Evci et al., RigL, ICML 2020).

    What full layers cannot take is shared out among the others, by the same proportion.
    """
    units = [request.units(site) for site in sites]
    kept = apportion(sum(units) - total, [site.out_features + site.in_features for site in sites], units)
    return {site.name: count - share for site, count, share in zip(sites, units, kept, strict=True)}


def _explicit(sparsities: Mapping[str, float], request: Request) -> Budget:
    """Every site the fraction that it was given."""
    missing = [site.name for site in request.sites if site.name not in sparsities]
    if missing:
        raise InputError(f"the sparsities by layer say nothing about {missing[0]}; name every layer")
    pruned = {}
    for site in request.sites:
        sparsity = check_sparsity(sparsities[site.name], f"the sparsity of {site.name}")
        wanted = int(sparsity * site.weight_count) // request.pattern.unit_weights
        if wanted > request.units(site):
            raise InputError(
                f"sparsity {sparsity:g} of {site.name} takes {wanted:,} blocks of {request.pattern.unit_weights} weights, but "
                f"it holds {request.units(site):,} whole ones. Ask for less, or leave it out with "
                f"ignore"
            )
        pruned[site.name] = wanted
    return Budget(pruned, {})


def allocate_by_magnitude(
    groups: Mapping[str, Sequence[PruneSite]], weight_of: WeightOf, sparsity: float, rounding: str = "exact"
) -> Budget:
    """Eq. 7 of MULTIFLOW (CVPR 2024) for single weights: every group loses the same fraction.

    Args:
        groups: group name (a region) -> its sites.
        weight_of: gives the weight of a site.
        sparsity: fraction removed, in [0, 1).
        rounding: see ``Request``.

    Raises:
        InputError: the sparsity or the rounding is not valid, or a weight holds NaN or infinity.
    """
    sites = [site for members in groups.values() for site in members]
    request = Request(sites, check_sparsity(sparsity), weight_of, weight_of, rounding=rounding)
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding={rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
    return _by_magnitude(groups, request)
