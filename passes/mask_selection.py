"""Mask selection: from options to masks, and the places of masks in a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import prod
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet
from mfcompile.passes.allocation import ALLOCATIONS, Sparsity, check_scope, check_sparsity
from mfcompile.passes.criteria.base import Need, Pruner
from mfcompile.passes.criteria.registry import pruner
from mfcompile.passes.sparsity_patterns import NOfM, Pattern, Unstructured, parse_pattern
from mfcompile.patterns import select as match_patterns
from mfcompile.patterns import weight_names
from mfcompile.recipe import ROUNDINGS
from mfcompile.region import PruneSite, RegionMap
from mfcompile.statistics import CalibrationStatistics

if TYPE_CHECKING:
    from mfcompile.passes.dense_facts import DenseFacts
    from mfcompile.passes.pruning_run import Batches, LossFn


@dataclass(frozen=True)
class SelectionOptions:
    """How weights are chosen.

    Attributes:
        sparsity: fraction removed, in [0, 1); region -> fraction; None for 0.63, or what the pattern sets.
        criterion: name of a criterion, or an object of a user's own class.
        criterion_options: options of the criterion, where it was named.
        allocation: name of an allocation; pattern of weights -> sparsity of these layers; None for what the criterion was
            published with.
        pattern: "unstructured", "N:M", "1x4", "4x1" or "16x1".
        update: "sparsegpt" or "least-squares" rewrites the kept weights once the masks are chosen, "gradual" chooses anew in
            every layer as well; None leaves them.
        rounding: "exact" or "official".
        seed: of random scores, and of what a loss draws.
        update_options: options of the update.
    """

    sparsity: Sparsity | None = None
    criterion: str | Pruner = "multiflow"
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str | Mapping[str, float] | None = None
    pattern: str = "unstructured"
    update: str | None = None
    rounding: str = "exact"
    seed: int = 0
    update_options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The options but for the sparsity, as JSON knows them; of a criterion object its name and its fields."""
        named = self.criterion if isinstance(self.criterion, str) else self.criterion.name
        options = dict(self.criterion_options) if isinstance(self.criterion, str) else _fields(self.criterion)
        return {
            "criterion": named,
            "criterion_options": {key: value for key, value in options.items() if value is not None},
            "allocation": self.allocation
            if self.allocation is None or isinstance(self.allocation, str)
            else dict(self.allocation),
            "pattern": self.pattern,
            "update": self.update,
            "update_options": {key: value for key, value in self.update_options.items() if value is not None},
            "rounding": self.rounding,
            "seed": self.seed,
        }


def _fields(criterion: Pruner) -> dict[str, Any]:
    """The options of a criterion object that JSON can hold."""
    if not is_dataclass(criterion):
        return {}
    values = {item.name: getattr(criterion, item.name) for item in fields(criterion) if item.init}
    return {name: value for name, value in values.items() if isinstance(value, (str, int, float, bool))}


def select_masks(
    captured: CapturedGraph,
    regions: RegionMap,
    statistics: CalibrationStatistics | None,
    options: SelectionOptions,
    progress: Callable[[int, int | None], None] | None = None,
    *,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    known: DenseFacts | None = None,
    update_progress: Callable[[int, int | None], None] | None = None,
) -> MaskSet:
    """Choose the weights that stay: criterion x allocation x pattern.

    Args:
        captured: the captured model; its weights are read, never written.
        regions: its regions and sites.
        statistics: what calibration saw; None for criteria that need none.
        options: what to choose by.
        progress: called with (weight tensors done, weight tensors in all).
        batches: gives the calibration batches, for criteria that need gradients.
        loss_fn: the loss of a batch, for criteria that need gradients.
        known: what several prunings of the model share, its gradients say; None finds it out anew.
        update_progress: called with (passes over the batches done, passes in all) by a weight update; None calls progress.

    Raises:
        InputError: an option is not valid, there is nothing to prune, or a weight holds NaN or infinity.
        CalibrationError: the criterion needs what is missing.
    """
    from mfcompile.passes.pruning_run import PruningRun, sparsity_of

    chosen, pattern = check_options(options), parse_pattern(options.pattern)
    if not regions.pruned_sites:
        raise InputError(
            "no weight is to be pruned: no linear weight lies inside a repeated block, or targets and ignore leave none. "
            "See `mfcompile inspect` for the reason of every weight, and choose weights with targets"
        )
    check_needs(chosen, statistics, batches, loss_fn)
    if options.update is not None and batches is None:
        raise CalibrationError(f"update={options.update!r} runs the model: give calibration batches")
    allocation = allocation_by_site(options.allocation, captured, regions)
    run = PruningRun(
        captured,
        regions,
        sparsity_of(options.sparsity, pattern, regions, allocation),
        allocation,
        pattern,
        options.rounding,
        options.seed,
        statistics,
        batches,
        loss_fn,
        progress,
        known,
    )
    masks = chosen.choose(run)
    if options.update is None:
        return masks
    from mfcompile.passes.updates import update_options
    from mfcompile.passes.weight_update import update_weights

    updating = run if update_progress is None else replace(run, progress=update_progress)
    return update_weights(updating, masks, update_options(options.update, options.update_options))


def check_options(options: SelectionOptions) -> Pruner:
    """The pruner, after a look at every option that can be judged without a model.

    Raises:
        InputError: an option is not valid.
    """
    chosen = pruner(options.criterion, options.criterion_options)
    pattern = parse_pattern(options.pattern)
    if options.rounding not in ROUNDINGS:
        raise InputError(f"rounding={options.rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
    if isinstance(options.allocation, str) and options.allocation not in ALLOCATIONS:
        raise InputError(
            f"allocation={options.allocation!r} is unknown; choose one of {', '.join(ALLOCATIONS)}, or give sparsities by layer"
        )
    _check_update_options(options)
    if isinstance(options.seed, bool) or not isinstance(options.seed, int):
        raise InputError(f"seed must be an integer, got {options.seed!r}")
    if not -(2**63) <= options.seed < 2**64:
        raise InputError(f"seed must fit into 64 bits, as torch takes it, got {options.seed}")
    if isinstance(pattern, NOfM) and options.allocation is not None:
        raise InputError(
            f"the pattern {options.pattern} removes the same from every layer, so there is nothing to allocate: leave "
            f"allocation={options.allocation!r} out"
        )
    if options.rounding == "official" and not isinstance(pattern, Unstructured):
        raise InputError(
            f"rounding='official' repeats what the published code does, which knows single weights only: leave it out with the "
            f"pattern {options.pattern}"
        )
    if not isinstance(options.allocation, (str, Mapping, NoneType)) or options.allocation == {}:
        raise InputError(
            f"allocation must be a name, or pattern of weights -> sparsity, got {options.allocation!r}; names are "
            f"{', '.join(ALLOCATIONS)}"
        )
    check_fixed_sparsity(options.sparsity, pattern)
    check_scope(options.allocation, options.sparsity)
    chosen.check_pattern(pattern)
    if isinstance(options.allocation, Mapping) and options.sparsity is not None:
        raise InputError(
            f"the allocation gives every layer a sparsity of its own, and sparsity {options.sparsity} was asked for as well: "
            f"leave one of them out"
        )
    return chosen


def check_fixed_sparsity(sparsity: Sparsity | None, pattern: Pattern) -> None:
    """Refuse a sparsity that is not the one that the pattern sets.

    Args:
        sparsity: a fraction, region -> fraction, or None where none was asked for.
        pattern: the pattern.

    Raises:
        InputError: another one was asked for, or a fraction is not in [0, 1).
    """
    if pattern.fixed_sparsity is None or sparsity is None:
        return
    given = set(sparsity.values()) if isinstance(sparsity, Mapping) else {sparsity}
    if any(abs(check_sparsity(value) - pattern.fixed_sparsity) > 1e-9 for value in given):
        assert isinstance(pattern, NOfM)
        raise InputError(
            f"the pattern {pattern.kept}:{pattern.of} removes {pattern.fixed_sparsity:g} of every layer, but sparsity "
            f"{sparsity} was asked for. Leave the sparsity out, or choose another N:M"
        )


def _check_update_options(options: SelectionOptions) -> None:
    if options.update is not None:
        from mfcompile.passes.updates import update_options

        update_options(options.update, options.update_options)
    elif options.update_options:
        raise InputError(f"update_options={dict(options.update_options)} are options of a weight update, and none is asked for")


def check_needs(
    chosen: Pruner, statistics: CalibrationStatistics | None, batches: Batches | None, loss_fn: LossFn | None
) -> None:
    """Refuse a pruner whose needs are not met.

    Raises:
        CalibrationError: names what is missing and how to give it.
    """
    if Need.STATISTICS in chosen.needs and statistics is None:
        raise CalibrationError(f"the criterion {chosen.name!r} needs calibration statistics; run calibrate() first")
    if Need.GRADIENTS in chosen.needs and (loss_fn is None or batches is None):
        missing = "a loss_fn" if loss_fn is None else "calibration batches"
        raise CalibrationError(
            f"the criterion {chosen.name!r} needs gradients, and there is no way to them without {missing}. Define "
            f"`loss_fn(module, batch)`, which returns the loss of one batch, in model.py or as the argument loss_fn, and give "
            f"calibration batches that it can read; criteria that need no loss: multiflow, magnitude, lamp, wanda"
        )


def allocation_by_site(
    allocation: str | Mapping[str, float] | None, captured: CapturedGraph, regions: RegionMap
) -> str | Mapping[str, float] | None:
    """Sparsities by pattern of weights as sparsities by site; the most specific pattern wins.

    Args:
        allocation: pattern of weights -> sparsity; a name, or None, comes back as it is.
        captured: the captured model.
        regions: its regions and sites.

    Raises:
        InputError: a fraction is not in [0, 1), a pattern matches nothing, or a site has no sparsity.
    """
    if allocation is None or isinstance(allocation, str):
        return allocation
    for layers, sparsity in allocation.items():
        check_sparsity(sparsity, f"allocation: the sparsity of {layers!r}")
    sites = regions.pruned_sites
    named = {site.fqn: weight_names(captured.module, site.fqn, site.tied_with, site.region) for site in sites}
    chosen = match_patterns(tuple(allocation), named, what="allocation")
    left = [site.name for site in sites if site.fqn not in chosen]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(
            f"allocation: no pattern matches {left[0]}{more}. Every layer needs a sparsity: add '*' for the rest, say"
        )
    return {site.name: allocation[chosen[site.fqn]] for site in sites}


def parameter_mask(captured: CapturedGraph, sites: Sequence[PruneSite], kept: Callable[[PruneSite], Tensor]) -> Tensor:
    """The mask of one parameter, in its own layout, from the masks of its sites; rows of no site are kept."""
    shape, layout = tuple(captured.parameter(sites[0].fqn).shape), sites[0].layout
    if len(sites) == 1 and sites[0].weight_count == prod(shape):
        return layout.stored(kept(sites[0]), shape)
    masks = torch.ones(layout.sizes(shape), dtype=torch.bool, device="cpu")
    for site in sites:
        site.matrix(masks).copy_(kept(site))
    return layout.stored(masks, shape)


def site_weight(captured: CapturedGraph, site: PruneSite) -> Tensor:
    """The weight of a site as (out_features, in_features): a view of the parameter where its strides allow one."""
    return site.matrix(site.layout.matrices(captured.parameter(site.fqn).detach()))


def pruned_by_row(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Mark the smallest scores of every row, as many as its count; among equal scores the first.

    Args:
        scores: (rows, columns) float32.
        counts: how many of each row.

    Returns:
        bool tensor of the same shape.
    """
    marked = np.zeros(scores.shape, bool)
    if not scores.numel():
        return torch.from_numpy(marked)
    limits = np.asarray(counts)[:, None]
    for start in range(0, scores.shape[0], _ROWS):
        rows, limit = scores[start : start + _ROWS].numpy(), limits[start : start + _ROWS]
        last = np.maximum(limit - 1, 0)
        ordered = np.partition(rows, np.unique(last), axis=1)
        threshold = np.take_along_axis(ordered, last, axis=1)
        below, ties = rows < threshold, rows == threshold
        left = limit - below.sum(1, keepdims=True)
        marked[start : start + _ROWS] = below | (ties & (ties.cumsum(1) <= left))
        marked[start : start + _ROWS] &= limit > 0
    return torch.from_numpy(marked)


_ROWS = 256
"""Rows that are ranked at a time, so that no copy of the size of a weight is kept."""
