"""Mask selection: criterion x allocation, streamed site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet, PackedMask, fingerprint
from mfcompile.passes.allocation import Budget, allocate_by_magnitude, check_sparsity
from mfcompile.passes.scores import score_scale, score_weights
from mfcompile.passes.selection import at_most, magnitude_threshold, smallest
from mfcompile.region import PruneSite, RegionMap
from mfcompile.statistics import CalibrationStatistics, SiteStatistics

CRITERIA = ("multiflow", "multiflow-inverted", "magnitude")
ALLOCATIONS = ("magnitude-per-region", "magnitude-global", "score-global")


@dataclass(frozen=True)
class SelectionOptions:
    """How weights are chosen.

    Attributes:
        sparsity: fraction removed, in [0, 1).
        criterion: "multiflow" (Eq. 6), "multiflow-inverted" (keeps the lowest scores: the paper's ablation), or
            "magnitude".
        allocation: "magnitude-per-region" (Eq. 7), "magnitude-global" (the ablation without multimodality), or
            "score-global" (the ablation without distribution).
        rounding: "exact" or "official".
    """

    sparsity: float = 0.63
    criterion: str = "multiflow"
    allocation: str = "magnitude-per-region"
    rounding: str = "exact"


def select_masks(
    captured: CapturedGraph,
    regions: RegionMap,
    statistics: CalibrationStatistics | None,
    options: SelectionOptions,
    progress: Callable[[int, int | None], None] | None = None,
) -> MaskSet:
    """Choose the weights that stay: budgets by Eq. 7, then the best scores of every site by Eq. 8.

    Scores are computed for one site at a time and are not kept; ties are broken by position. From the same statistics, a
    higher sparsity keeps a subset of what a lower one keeps.

    Args:
        captured: the captured model; its weights are read, never written.
        regions: its regions and sites.
        statistics: what calibration saw; None for criteria that need none.
        options: what to choose by.
        progress: called with (weight tensors done, weight tensors in all).

    Raises:
        InputError: an option is not valid, there is nothing to prune, or a weight holds NaN or infinity.
        CalibrationError: the criterion needs statistics that are missing.
    """
    options = replace(options, sparsity=check_sparsity(options.sparsity))
    _check_options(options)
    sites = regions.pruned_sites
    if not sites:
        raise InputError(
            "no weight is to be pruned: no linear weight lies inside a repeated block, or targets and ignore leave none. "
            "See `mfcompile inspect` for the reason of every weight, and choose weights with targets"
        )
    scorer = _Scorer(captured, statistics, options.criterion)
    pick = smallest if options.rounding == "exact" else at_most
    if options.allocation == "score-global":
        budget = _allocate_by_score(sites, scorer, options.sparsity)
    else:
        groups = regions.by_region() if options.allocation == "magnitude-per-region" else {"all": sites}
        # The published truncation lies between budget and scores; published magnitude pruning has no such step.
        rounding = "exact" if options.criterion == "magnitude" else options.rounding
        budget = allocate_by_magnitude(groups, lambda site: site_weight(captured, site), options.sparsity, rounding)
    packed: dict[str, PackedMask] = {}
    by_fqn: dict[str, list[PruneSite]] = {}
    for site in sites:
        by_fqn.setdefault(site.fqn, []).append(site)
    for index, (fqn, group) in enumerate(by_fqn.items()):
        packed[fqn] = PackedMask.pack(
            _mask_of(captured, group, lambda site: ~pick(scorer.ranking(site), budget.pruned[site.name]))
        )
        if progress is not None:
            progress(index + 1, len(by_fqn))
    kept_regions = {fqn: regions.weights[fqn] for fqn in packed}
    return MaskSet(packed, kept_regions, fingerprint(captured.module), options.sparsity)


def _mask_of(captured: CapturedGraph, sites: Sequence[PruneSite], kept: Callable[[PruneSite], Tensor]) -> Tensor:
    """The mask of one parameter, in its own layout, from the masks of its sites; rows of no site are kept."""
    shape, layout = tuple(captured.parameter(sites[0].fqn).shape), sites[0].layout
    if len(sites) == 1 and sites[0].weight_count == prod(shape):
        return layout.stored(kept(sites[0]), shape)
    masks = torch.ones(layout.sizes(shape), dtype=torch.bool)
    for site in sites:
        site.matrix(masks).copy_(kept(site))
    return layout.stored(masks, shape)


def site_weight(captured: CapturedGraph, site: PruneSite) -> Tensor:
    """The weight of a site as (out_features, in_features): a view of the parameter where its strides allow one."""
    return site.matrix(site.layout.matrices(captured.parameter(site.fqn).detach()))


class _Scorer:
    """Scores of one site at a time."""

    def __init__(self, captured: CapturedGraph, statistics: CalibrationStatistics | None, criterion: str) -> None:
        if criterion.startswith("multiflow") and statistics is None:
            raise CalibrationError(f"the criterion {criterion!r} needs calibration statistics; run calibrate() first")
        self._captured, self._statistics, self._criterion = captured, statistics, criterion

    def ranking(self, site: PruneSite) -> Tensor:
        """(out_features, in_features) float32; the smallest are removed first. Comparable inside the site."""
        weight = site_weight(self._captured, site)
        norm = self._norm(site)
        if norm is None:
            return weight.abs().float()
        score = score_weights(weight, norm)
        return -score if self._criterion == "multiflow-inverted" else score

    def comparable(self, site: PruneSite) -> Tensor:
        """The ranking on one scale for all sites: norms are per sample, Eq. 6 is not rescaled."""
        weight = site_weight(self._captured, site)
        norm = self._norm(site)
        if norm is None:
            return weight.abs().float()
        seen = self._site_statistics(site)
        norm = norm / max(seen.sample_count, 1) ** 0.5
        return (score_weights(weight, norm).double() * score_scale(weight, norm)).float()

    def _norm(self, site: PruneSite) -> Tensor | None:
        """Input norm of a site; None where magnitude ranks: by the criterion, or since the site saw no token."""
        if self._criterion == "magnitude" or self._statistics is None:
            return None
        seen = self._site_statistics(site)
        return seen.input_norm() if seen.token_count else None

    def _site_statistics(self, site: PruneSite) -> SiteStatistics:
        assert self._statistics is not None
        if site.name not in self._statistics.sites:
            raise CalibrationError(
                f"the statistics hold nothing about {site.name}: they were made for other sites. Calibrate again"
            )
        return self._statistics.sites[site.name]


def _allocate_by_score(sites: tuple[PruneSite, ...], scorer: _Scorer, sparsity: float) -> Budget:
    """One threshold over the scores of all sites (the paper's ablation without distribution)."""
    k = int(sparsity * sum(site.weight_count for site in sites))
    if k < 1:
        return Budget({site.name: 0 for site in sites}, {})
    found = magnitude_threshold(
        [lambda site=site: scorer.comparable(site) for site in sites],  # type: ignore[misc]
        k,
        [f"the score of {site.name}" for site in sites],
    )
    counts = found.pruned_counts(k)
    return Budget({site.name: count for site, count in zip(sites, counts, strict=True)}, {"all": found.value})


def _check_options(options: SelectionOptions) -> None:
    known: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "criterion": (options.criterion, CRITERIA),
        "allocation": (options.allocation, ALLOCATIONS),
        "rounding": (options.rounding, ("exact", "official")),
    }
    for name, (value, choices) in known.items():
        if value not in choices:
            raise InputError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
