"""One pruning: what is asked for, what is known, and the way from scores to masks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.errors import CalibrationError, InputError, MfcompileError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.masks import MaskSet, PackedMask, fingerprint
from mfcompile.passes.allocation import Budget, Request, Sparsity, allocate, check_sparsity
from mfcompile.passes.criteria.base import Criterion, Need, SiteData
from mfcompile.passes.criteria.magnitude import Magnitude
from mfcompile.passes.dense_facts import DenseFacts
from mfcompile.passes.mask_packing import kept_bits_by_site, packed_mask
from mfcompile.passes.mask_selection import check_fixed_sparsity, parameter_mask, pruned_by_row, site_weight
from mfcompile.passes.pieces import Values
from mfcompile.passes.selection import at_most, kept_bits, smallest
from mfcompile.passes.sparsity_patterns import NOfM, Pattern, Unstructured
from mfcompile.region import PruneSite, RegionMap
from mfcompile.statistics import CalibrationStatistics

if TYPE_CHECKING:
    from mfcompile.passes.gradients import Gradients

LossFn = Callable[[Any, Any], Any]
"""``loss_fn(module, batch)``: a scalar tensor, or an object with ``.loss``."""

Batches = Callable[[], Iterable[Any]]
"""Gives the calibration batches afresh at every call."""


@dataclass(frozen=True)
class PruningRun:
    """What a pruner is given.

    Attributes:
        captured: the captured model; its weights are read, never written.
        regions: its regions and sites.
        sparsity: the fraction removed, or region -> its own.
        allocation: name of an allocation, or site name -> sparsity; None for the one that the pruner was published with.
        pattern: the shape in which weights are removed.
        rounding: "exact" or "official".
        seed: of everything random.
        statistics: what calibration saw; None where there was none.
        batches: gives the calibration batches; None where there are none.
        loss_fn: the loss of a batch; None where there is none.
        progress: called with (done, total or None) while masks are chosen.
        known: what other prunings of the model share with this one; None keeps nothing for them.
    """

    captured: CapturedGraph
    regions: RegionMap
    sparsity: Sparsity
    allocation: str | Mapping[str, float] | None = None
    pattern: Pattern = field(default_factory=Unstructured)
    rounding: str = "exact"
    seed: int = 0
    statistics: CalibrationStatistics | None = None
    batches: Batches | None = None
    loss_fn: LossFn | None = None
    progress: Callable[[int, int | None], None] | None = None
    known: DenseFacts | None = None

    @cached_property
    def sites_by_fqn(self) -> dict[str, list[PruneSite]]:
        """FQN -> its pruned sites, in ``named_parameters`` order."""
        grouped: dict[str, list[PruneSite]] = {}
        for site in self.regions.pruned_sites:
            grouped.setdefault(site.fqn, []).append(site)
        return grouped

    @cached_property
    def model_fingerprint(self) -> str:
        """Fingerprint of the dense model."""
        found = (self.known.fingerprint if self.known else None) or fingerprint(self.captured.module)
        if self.known is not None:
            self.known.fingerprint = found
        return found

    def at_sparsity(self, factor: Callable[[float], float]) -> PruningRun:
        """The same run at another sparsity: ``factor`` of each that was asked for, by region or by layer too."""

        def scaled(given: Any) -> Any:
            return {key: factor(value) for key, value in given.items()} if isinstance(given, Mapping) else factor(given)

        allocation = scaled(self.allocation) if isinstance(self.allocation, Mapping) else self.allocation
        other = replace(self, sparsity=scaled(self.sparsity), allocation=allocation)
        vars(other)["model_fingerprint"] = self.model_fingerprint  # the same model: do not hash it again
        return other

    def gradients(self) -> Gradients:
        """Mean gradient of the dense model's loss over the calibration batches, of every parameter that is pruned."""
        from mfcompile.passes.gradients import accumulate_gradients

        if self.known is not None and self.known.gradients is not None:
            return self.known.gradients
        assert self.batches is not None
        assert self.loss_fn is not None
        found = accumulate_gradients(
            self.captured.module, self.batches(), self.loss_fn, tuple(self.sites_by_fqn), seed=self.seed
        )
        if self.known is not None:
            self.known.gradients = found
        return found

    def site_data(self, needs: frozenset[Need], gradients: Mapping[str, Tensor] | None) -> Iterator[tuple[PruneSite, SiteData]]:
        """Every site with what a criterion of these needs may see of it."""
        for site in self.regions.pruned_sites:
            yield site, self.data_of(site, needs, gradients)

    def data_of(self, site: PruneSite, needs: frozenset[Need], gradients: Mapping[str, Tensor] | None) -> SiteData:
        """What a criterion of these needs may see of a site.

        Raises:
            CalibrationError: the statistics are of other sites.
        """
        data = SiteData(site.name, site.region, site_weight(self.captured, site).cpu())
        if Need.STATISTICS in needs:
            assert self.statistics is not None
            if site.name not in self.statistics.sites:
                raise CalibrationError(
                    f"the statistics hold nothing about {site.name}: they were made for other sites. Calibrate again"
                )
            seen = self.statistics.sites[site.name]
            norm = seen.input_norm() if seen.token_count else None
            data = replace(data, input_norm=norm, token_count=seen.token_count, sample_count=seen.sample_count)
        if gradients is not None:
            gradient = site.matrix(site.layout.matrices(gradients[site.fqn]))
            data = replace(data, gradient=gradient.cpu())
        return data

    def select(
        self, criterion: Criterion, *, gradients: Mapping[str, Tensor] | None = None, pruned: Mapping[str, Tensor] | None = None
    ) -> MaskSet:
        """Budgets by the allocation, then the best scores of every site in the shape of the pattern (Eq. 7 and 8).

        Scores are computed for one site at a time and are not kept; ties are broken by position. From the same
        statistics, a higher sparsity keeps a subset of what a lower one keeps.

        Args:
            criterion: what scores the weights.
            gradients: FQN -> gradient, for criteria that need them.
            pruned: FQN -> bool of the weights that are gone already and must not return; in the layout of the parameter.
        """
        with _blamed(criterion):
            criterion.begin((data for _, data in self.site_data(criterion.needs, gradients)), self.seed)
        ranker = _Ranker(self, criterion, gradients, pruned)
        if isinstance(self.pattern, NOfM):
            budget = Budget({}, {})
        else:
            budget = allocate(self._allocation(criterion), self._request(criterion, ranker))
        return self.mask_set(self._packed(ranker, budget))

    def _packed(self, ranker: _Ranker, budget: Budget) -> dict[str, PackedMask]:
        """FQN -> mask: in threads where scores are computed piece by piece, else parameter by parameter."""
        groups = self.sites_by_fqn
        if isinstance(self.pattern, Unstructured) and not budget.by_row and ranker.has_values:
            bits = kept_bits_by_site(
                groups,
                lambda site: self._kept_bits(site, ranker, budget),
                self.progress,
                meanwhile=lambda: self.model_fingerprint,  # it takes as long as half of the masks, on one thread
            )
            return {fqn: packed_mask(self.captured, group, bits) for fqn, group in groups.items()}
        packed: dict[str, PackedMask] = {}
        for index, (fqn, group) in enumerate(groups.items()):
            packed[fqn] = PackedMask.pack(
                parameter_mask(self.captured, group, lambda site: ~self._removed(site, ranker, budget))
            )
            if self.progress is not None:
                self.progress(index + 1, len(groups))
        return packed

    def _kept_bits(self, site: PruneSite, ranker: _Ranker, budget: Budget) -> NDArray[np.uint8]:
        """(ceil(n / 8),) bits of what a site keeps."""
        values = ranker.values(site)
        ranking = ranker.ranking(site) if values is None else values
        return kept_bits(ranking, budget.pruned[site.name], take_ties=self.rounding != "exact")

    def mask_set(self, packed: Mapping[str, PackedMask], values: Mapping[str, Tensor] | None = None) -> MaskSet:
        """Masks (and new values of kept weights) with what is known of them."""
        regions = {fqn: self.regions.weights[fqn] for fqn in packed}
        return MaskSet(
            packed, regions, self.model_fingerprint, self.sparsity, values or {}, diagnostics=tuple(self._remainders())
        )

    def _allocation(self, criterion: Criterion) -> str | Mapping[str, float]:
        if self.allocation is not None:
            return self.allocation
        published = criterion.allocation
        return published.replace("-global", "-per-region") if isinstance(self.sparsity, Mapping) else published

    def _request(self, criterion: Criterion, ranker: _Ranker) -> Request:
        return Request(
            self.regions.pruned_sites,
            self.sparsity,
            self._magnitude,
            ranker.comparable,
            self.pattern,
            self.rounding,
            is_budget=not isinstance(criterion, Magnitude),
        )

    def _magnitude(self, site: PruneSite) -> Tensor:
        weight = site_weight(self.captured, site)
        return weight if isinstance(self.pattern, Unstructured) else weight.abs().cpu()

    def _removed(self, site: PruneSite, ranker: _Ranker, budget: Budget) -> Tensor:
        """(out_features, in_features) bool: what a site loses."""
        ranking = ranker.ranking(site)
        if isinstance(self.pattern, NOfM):
            return self.pattern.smallest(ranking)
        units = self.pattern.unit_scores(ranking)
        if site.name in budget.by_row:
            removed = pruned_by_row(units, budget.by_row[site.name])
        else:
            removed = (smallest if self.rounding == "exact" else at_most)(units, budget.pruned[site.name])
        return self.pattern.pruned_weights(removed, (site.out_features, site.in_features))

    def _remainders(self) -> Iterator[Diagnostic]:
        for site in self.regions.pruned_sites:
            left = self.pattern.remainder(site.out_features, site.in_features)
            if left is not None:
                yield Diagnostic(site.name, left)


class _Ranker:
    """Scores of one site at a time."""

    def __init__(
        self,
        run: PruningRun,
        criterion: Criterion,
        gradients: Mapping[str, Tensor] | None,
        pruned: Mapping[str, Tensor] | None,
    ) -> None:
        self._run, self._criterion, self._gradients, self._pruned = run, criterion, gradients, pruned

    @property
    def has_values(self) -> bool:
        """The criterion computes scores piece by piece; not one that inherits how and has scores of its own."""
        definers = [next(kind for kind in type(self._criterion).__mro__ if name in vars(kind)) for name in ("values", "score")]
        return self._pruned is None and definers[0] is definers[1]

    def values(self, site: PruneSite) -> Values | None:
        """The ranking, computed where it is read; None where ``ranking`` is to be asked."""
        data = self._data(site)
        if self._ranks_by_magnitude(data):
            return None
        with _blamed(self._criterion, data):
            return self._criterion.values(data)

    def ranking(self, site: PruneSite) -> Tensor:
        """(out_features, in_features) float32, finite; the smallest are removed first. Comparable inside the site."""
        data = self._data(site)
        score = data.weight.detach().abs() if self._ranks_by_magnitude(data) else self._scored(data)
        return self._without_pruned(self._checked(score, data), site)

    def comparable(self, site: PruneSite) -> Tensor:
        """The ranking on one scale for all sites."""
        data = self._data(site)
        with _blamed(self._criterion, data):
            scale = 1.0 if self._ranks_by_magnitude(data) else float(self._criterion.scale(data))
        if not 0 < scale < math.inf:
            raise InputError(
                f"the criterion {self._criterion.name!r} gives {data.name} the scale {scale}; it must be a positive number"
            )
        ranking = self.ranking(site)
        return ranking if scale == 1.0 else self._without_pruned((ranking.double() * scale).float(), site)

    def _data(self, site: PruneSite) -> SiteData:
        return self._run.data_of(site, self._criterion.needs, self._gradients)

    def _without_pruned(self, score: Tensor, site: PruneSite) -> Tensor:
        """What is gone ranks below all that is left."""
        if self._pruned is None:
            return score
        return score.masked_fill(site.matrix(site.layout.matrices(self._pruned[site.fqn])), _GONE)

    def _ranks_by_magnitude(self, data: SiteData) -> bool:
        """No token ever reached the site, so that nothing but its weights is known of it."""
        return Need.STATISTICS in self._criterion.needs and data.input_norm is None

    def _scored(self, data: SiteData) -> Tensor:
        """What the criterion says.

        Raises:
            InputError: it fails, or gives no float tensor of the weight's shape.
        """
        with _blamed(self._criterion, data):
            score = self._criterion.score(data)
        if not isinstance(score, Tensor) or score.shape != data.weight.shape or not score.dtype.is_floating_point:
            got = f"{tuple(score.shape)} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
            raise InputError(
                f"the criterion {self._criterion.name!r} scored {data.name} with {got}; a score is a float tensor of the "
                f"weight's shape {tuple(data.weight.shape)}"
            )
        return score.detach()

    def _checked(self, score: Tensor, data: SiteData) -> Tensor:
        """The score as float32 on the CPU.

        Raises:
            InputError: it, or the weight, holds NaN or infinity.
        """
        score = score.float().cpu()
        if not score.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(score))).all()):
            return score
        broken = int((~torch.isfinite(data.weight)).sum())
        if broken:
            raise InputError(f"{data.name} holds {broken} NaN or infinite values: it cannot be ranked. Check the checkpoint")
        broken = int((~torch.isfinite(score)).sum())
        raise InputError(
            f"the criterion {self._criterion.name!r} gave {broken} of the {score.numel()} weights of {data.name} a score that "
            f"is NaN or infinite as float32: they cannot be ranked. Give finite scores"
        )


@contextlib.contextmanager
def _blamed(criterion: Criterion, data: SiteData | None = None) -> Iterator[None]:
    """Name the criterion, which may be of anyone's making, and the layer in what goes wrong."""
    try:
        yield
    except MfcompileError:
        raise
    except Exception as error:
        where = "" if data is None else f" on {data.name} of shape {tuple(data.weight.shape)}"
        raise InputError(
            f"the criterion {criterion.name!r} failed{where} ({type(error).__name__}: {error}). Correct the class "
            f"{type(criterion).__name__}"
        ) from error


_GONE = -1e30
"""Below every score; finite, also when a block of them is added up."""


def sparsity_of(
    sparsity: Sparsity | None, pattern: Pattern, regions: RegionMap, allocation: str | Mapping[str, float] | None = None
) -> Sparsity:
    """The sparsity that is meant.

    Args:
        sparsity: a fraction, region -> fraction, or None for what the allocation or the pattern sets, and 0.63 where neither
            does.
        pattern: the pattern.
        regions: the regions of the model.
        allocation: site name -> its sparsity, where every site has one.

    Raises:
        InputError: a fraction is not valid, a region is missing or unknown, or the pattern sets another sparsity.
    """
    if isinstance(sparsity, Mapping):
        sparsity = _by_region(sparsity, regions)
    if pattern.fixed_sparsity is not None:
        check_fixed_sparsity(sparsity, pattern)
        return pattern.fixed_sparsity
    if isinstance(allocation, Mapping):
        sites = regions.pruned_sites
        return sum(allocation[site.name] * site.weight_count for site in sites) / sum(site.weight_count for site in sites)
    if sparsity is None:
        return 0.63
    return sparsity if isinstance(sparsity, Mapping) else check_sparsity(sparsity)


def _by_region(sparsity: Mapping[str, float], regions: RegionMap) -> dict[str, float]:
    known = tuple(regions.by_region())
    unknown = [region for region in sparsity if region not in known]
    missing = [region for region in known if region not in sparsity]
    if unknown or missing:
        what = f"there is no region {unknown[0]!r}" if unknown else f"the region {missing[0]!r} has none"
        raise InputError(
            f"sparsity per region: {what}; this model's regions are {', '.join(known)}. Give each of them one; 0 keeps it dense"
        )
    return {region: check_sparsity(sparsity[region], f"the sparsity of {region}") for region in known}
