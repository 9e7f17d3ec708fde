"""Structured removal: hidden channels and attention heads taken out of a model, in the module and its ONNX file alike.

::

    captured = mfcompile.capture(model, example_inputs)
    print(mfcompile.find_units(captured))
    smaller = mfcompile.prune_structure(captured, {"region:vision": 0.3})
    mfcompile.export_onnx(smaller, "smaller.onnx")
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mfcompile.errors import ExportError, InputError
from mfcompile.frontends.capture import capture
from mfcompile.frontends.exporting import candidates
from mfcompile.frontends.program_module import program_module
from mfcompile.graph import CapturedGraph, ExportedModel
from mfcompile.inputs import as_function
from mfcompile.passes.base import run_transform
from mfcompile.passes.least_squares import LeastSquaresOptions
from mfcompile.passes.masking import ApplyMasks
from mfcompile.passes.structured_masks import masks_of_smaller
from mfcompile.passes.structured_refit import Refit, refit_outputs
from mfcompile.passes.structured_removal import RemoveUnits, kept_positions
from mfcompile.passes.structured_units import RefusedUnit, StructuralUnit, StructuralUnits, plan_units
from mfcompile.passes.unit_scores import UnitScorer, resolve_unit_scorer, scorer_weighting
from mfcompile.passes.weight_values import with_values
from mfcompile.region import RegionMap
from mfcompile.rewriting import example_of, functional, over_state
from mfcompile.statistics import CalibrationStatistics
from mfcompile.steps import infer_regions

__all__ = [
    "RefusedUnit", "StructuralUnit", "StructuralUnits", "find_units", "output_weights", "prune_structure", "remove_units",
    "unit_norms",
]  # fmt: skip

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""Calibration batches, or a function that gives them from the start at every call."""

_WITHOUT_CACHE = "torch.export without cache"
"""A cache is never exported: what a layer keeps is an output, and its heads the caller's."""


def find_units(captured: CapturedGraph, *, modalities: Mapping[str, str] | None = None) -> StructuralUnits:
    """Hidden channels and attention heads of which some can be removed, and why others cannot.

    Args:
        captured: what ``capture``, ``prune_tokens`` or ``remove_units`` gave.
        modalities: input name -> "vision", "text", any other modality, or "control", where inference needs help.

    Raises:
        ExportError: the model has no exported program, which is what they are removed from.
        RegionError: the modality of an input cannot be decided.
    """
    regions = infer_regions(captured, modalities=modalities)
    plans, refused = plan_units(_program(captured).program, regions.weights)
    return StructuralUnits(tuple(plan.unit for plan in plans), tuple(refused))


def remove_units(
    captured: CapturedGraph,
    remove: Mapping[str, Sequence[int]],
    *,
    refit: bool | Mapping[str, Any] = False,
    calibration: Batches | None = None,
    modalities: Mapping[str, str] | None = None,
) -> CapturedGraph:
    """Take elements of units out of the model: rows and columns of weights, biases, and every size that names them.

    The outputs are those of the given model with the columns of W_out that belong to the elements set to zero, unless W_out
    is refitted.

    Args:
        captured: what ``capture``, ``prune_tokens`` or ``remove_units`` gave; nothing of it is changed.
        remove: name of a unit -> its elements that go, by number; at least one of each unit stays. See ``find_units``.
        refit: give every W_out that loses inputs the values, by least squares, with which those that stay stand in for them;
            a mapping gives options of the update "least-squares" ({"damping": 0.1, "padding_mask": ...}).
        calibration: batches for ``refit``, run up to four times; None uses the example inputs.
        modalities: as in ``find_units``.

    Returns:
        A captured graph of a smaller trainable module with the same names; weights that lose nothing are shared. It can be
        calibrated, masked and exported like any other. ``specialised`` says what was removed. Masks that ``captured``
        applies are cut with their weights.

    Raises:
        InputError: a unit is unknown or refused (with node and reason), has no such element, or would lose all; or W_out
            cannot be refitted, because masks are in force or an option is not valid.
        CalibrationError: there is no calibration batch to refit on, or one that the model refuses.
        ExportError: the model has no exported program, which is what they are removed from.
        RegionError: the modality of an input cannot be decided.
    """
    if refit is not False:
        captured = replace(captured, exported=_program(captured))
        found = refit_removed(captured, remove, calibration, refit, modalities=modalities)
        smaller = remove_units(with_outputs(captured, found.values), remove, modalities=modalities)
        return replace(smaller, diagnostics=(*smaller.diagnostics, *found.diagnostics))
    if calibration is not None:
        raise InputError("calibration is what output weights are refitted on: give refit=True with it, or leave it out")
    exported = _program(captured)
    regions = infer_regions(captured, modalities=modalities)
    lifted = replace(captured, graph_module=exported.program.graph_module, exported=exported, masks=None)
    transform = RemoveUnits({name: tuple(items) for name, items in remove.items()}, regions.weights)
    result = run_transform(transform, lifted).graph
    assert result.exported is not None  # the transform made it
    removed = result.exported.notes[len(exported.notes) :]
    example = example_of(captured, exported)
    smaller = capture(program_module(result.exported.program), example)
    told = (*smaller.specialised, *removed)
    smaller = replace(smaller, exported=result.exported, specialised=told, diagnostics=captured.diagnostics)
    if captured.masks is None:
        return smaller
    masks = masks_of_smaller(captured.masks, captured.module, smaller.module, kept_positions(transform, exported.program))
    return run_transform(ApplyMasks(masks), smaller).graph


def refit_removed(
    captured: CapturedGraph,
    remove: Mapping[str, Sequence[int]],
    calibration: Batches | None = None,
    options: bool | Mapping[str, Any] = True,
    *,
    seen: CapturedGraph | None = None,
    modalities: Mapping[str, str] | None = None,
) -> Refit:
    """Values of output weights with which the elements that stay stand in for those that go; nothing is removed yet.

    Args:
        captured, remove, calibration, modalities: as in ``remove_units``.
        options: its ``refit``.
        seen: the model over the same parameters, with fewer tokens, that batches are run through; None for ``captured``.

    Raises:
        InputError, CalibrationError, ExportError, RegionError: see ``remove_units``.
    """
    if captured.masks is not None:
        raise InputError("the graph has masks in force, and a refit would rewrite what they keep: refit first, then mask")
    asked = LeastSquaresOptions.from_mapping(options if isinstance(options, Mapping) else {})
    batches = as_function([captured.example_inputs] if calibration is None else calibration)
    kept, units = kept_inputs(captured, remove, modalities=modalities)
    through = captured if seen is None else seen
    return refit_outputs(through, regions_of_units(through, units, modalities), kept, batches, asked)


def kept_inputs(
    captured: CapturedGraph, remove: Mapping[str, Sequence[int]], *, modalities: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], list[StructuralUnit]]:
    """What output weights lose: FQN of W_out -> bool in its shape, False where removed elements are read; and their units.

    Args:
        captured, remove, modalities: as in ``remove_units``.

    Raises:
        InputError, ExportError, RegionError: see ``remove_units``.
    """
    program, regions = _program(captured).program, infer_regions(captured, modalities=modalities)
    transform = RemoveUnits({name: tuple(items) for name, items in remove.items() if len(items)}, regions.weights)
    first_name = {name: fqn for fqn, names in captured.aliases.items() for name in names}
    cuts = {first_name.get(name, name): kept for name, kept in kept_positions(transform, program).items()}
    kept: dict[str, Tensor] = {}
    units = [plan.unit for plan, _ in transform.chosen(program)]
    sites = {site.fqn: site for site in regions.sites}
    for fqn in [first_name.get(unit.output_weight, unit.output_weight) for unit in units]:
        mask = torch.ones(captured.parameter(fqn).shape, dtype=torch.bool)
        for axis, positions in cuts.get(fqn, {}).items():
            if fqn not in sites or axis in sites[fqn].layout.inputs:  # rows go where another unit's elements are made
                shape = [-1 if dim == axis else 1 for dim in range(mask.ndim)]
                mask &= torch.from_numpy(positions).view(shape)
        kept[fqn] = mask
    return kept, units


def with_outputs(captured: CapturedGraph, values: Mapping[str, Tensor]) -> CapturedGraph:
    """The captured model, and its program, over other values of some parameters; the given one keeps its own.

    Args:
        captured: what ``capture`` and the like gave.
        values: FQN -> tensor of the parameter's sizes and dtype.

    Raises:
        InputError: the module cannot be copied.
        ExportError: the model has no exported program.
    """
    exported = _program(captured)
    named = {name: tensor for fqn, tensor in values.items() for name in captured.aliases.get(fqn, (fqn,))}
    program = over_state(exported.program, named)
    return replace(with_values(captured, values), exported=replace(exported, program=program))


def regions_of_units(
    captured: CapturedGraph, units: Iterable[StructuralUnit], modalities: Mapping[str, str] | None
) -> RegionMap:
    """Regions with the output weights of units as sites, and no others."""
    known = infer_regions(captured, modalities=modalities)
    linear = {name: site.fqn for site in known.sites for name in (site.fqn, *site.tied_with)}
    targets = list(dict.fromkeys(linear[unit.output_weight] for unit in units if unit.output_weight in linear))
    return infer_regions(captured, modalities=modalities, targets=targets) if targets else replace(known, sites=())


def prune_structure(
    captured: CapturedGraph,
    shares: float | Mapping[str, float],
    *,
    scorer: str | UnitScorer | None = None,
    scores: Mapping[str, Tensor] | None = None,
    statistics: CalibrationStatistics | None = None,
    scope: str = "unit",
    refit: bool | Mapping[str, Any] = False,
    calibration: Batches | None = None,
    modalities: Mapping[str, str] | None = None,
) -> CapturedGraph:
    """Remove the elements that score lowest, without training.

    Args:
        captured: as in ``remove_units``.
        shares: unit -> share of its elements to remove, from 0 to below 1, rounded down. A key may be a glob or ``re:``
            pattern of names, ``region:vision``, or ``kind:heads``; of several that name a unit, the last counts. A number
            alone is for all units.
        scorer: "wanda" (Eq. 3 of CoMP: weights of W_out times norms of its inputs), "cip" (Eq. 4: the same on token-weighted
            norms), "magnitude", "random" or a callable as in ``unit_scores``. None takes "magnitude" without statistics, and
            with them the formula of their norms.
        scores: unit -> (count,) scores of its elements, in place of a scorer.
        statistics: of ``calibrate`` on this model, with the output weights among its targets; what the norms are taken from.
        scope: "unit" removes the share of every unit; "pattern" the lowest of all units of one key and kind together.
        refit, calibration: as in ``remove_units``.
        modalities: as in ``find_units``.

    Raises:
        InputError: a key names no unit (with what is refused), a number is no share, or scores do not fit.
        CalibrationError: a scorer needs norms that the statistics do not have.
        ExportError: the model has no exported program.
        RegionError: the modality of an input cannot be decided.
    """
    if scope not in ("unit", "pattern"):
        raise InputError(f"scope={scope!r}: choose 'unit' or 'pattern'")
    exported = replace(captured, exported=_program(captured))
    regions = infer_regions(captured, modalities=modalities)
    plans, refused = plan_units(_program(exported).program, regions.weights)
    units = StructuralUnits(tuple(plan.unit for plan in plans), tuple(refused))
    groups = _requested(shares if isinstance(shares, Mapping) else {"*": shares}, units)
    wanted = [unit for _, members in groups for unit in members]
    given = scores if scores is not None else _scored(captured, wanted, scorer, statistics, regions)
    remove: dict[str, list[int]] = {}
    for share, members in groups:
        own = {unit.name: _checked_scores(unit, given) for unit in members}
        if scope == "unit":
            remove.update({unit.name: _lowest({unit.name: own[unit.name]}, share)[unit.name] for unit in members})
        else:
            for kind in dict.fromkeys(unit.kind for unit in members):
                remove.update(_lowest({unit.name: own[unit.name] for unit in members if unit.kind == kind}, share))
    taken = {name: items for name, items in remove.items() if items}
    return remove_units(exported, taken, refit=refit, calibration=calibration, modalities=modalities)


def output_weights(captured: CapturedGraph, units: Iterable[StructuralUnit], regions: RegionMap) -> dict[str, Tensor]:
    """FQN of every unit's output weight -> (out_features, in_features), whatever way round it is stored; for ``unit_scores``.

    Args:
        captured: the graph that the units were found in.
        units: of ``find_units``.
        regions: of ``infer_regions``, which knows the layouts.
    """
    layouts = {site.fqn: site.layout for site in regions.sites}
    found = {}
    for unit in units:
        weight = captured.parameter(unit.output_weight).detach()
        matrices = layouts[unit.output_weight].matrices(weight) if unit.output_weight in layouts else weight[None]
        found[unit.output_weight] = matrices.reshape(-1, matrices.shape[-1])
    return found


def unit_norms(units: Iterable[StructuralUnit], statistics: CalibrationStatistics) -> dict[str, Tensor]:
    """FQN of every unit's output weight -> (in_features,) norm of its inputs, where the statistics have it."""
    fqns = dict.fromkeys(unit.output_weight for unit in units)
    return {fqn: statistics.sites[fqn].input_norm() for fqn in fqns if fqn in statistics.sites}


def _scored(
    captured: CapturedGraph,
    units: Sequence[StructuralUnit],
    scorer: str | UnitScorer | None,
    statistics: CalibrationStatistics | None,
    regions: RegionMap,
) -> dict[str, Tensor]:
    chosen = scorer or ("magnitude" if statistics is None else "cip" if statistics.weighting == "cip" else "wanda")
    score = resolve_unit_scorer(chosen)
    weighting = scorer_weighting(chosen)
    if statistics is None and weighting is not None:
        raise InputError(f"scorer={chosen!r} needs activation norms: give statistics=mfcompile.calibrate(...)")
    if statistics is not None and isinstance(chosen, str) and weighting not in (None, statistics.weighting):
        raise InputError(
            f"scorer={chosen!r} takes norms of weighting {weighting!r}, and the statistics are of {statistics.weighting!r}. "
            f"Calibrate with that weighting, or leave the scorer out"
        )
    norms = {} if statistics is None else unit_norms(units, statistics)
    return score(units, output_weights(captured, units, regions), norms)


def _checked_scores(unit: StructuralUnit, scores: Mapping[str, Tensor]) -> Tensor:
    """(count,) float64 on the CPU."""
    found = scores.get(unit.name)
    if found is None or tuple(found.shape) != (unit.count,):
        seen = "there are none" if found is None else f"their shape is {tuple(found.shape)}"
        raise InputError(f"unit {unit.name} has {unit.count} elements, which need scores of shape ({unit.count},); {seen}")
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"scores of unit {unit.name} hold NaN or infinity")
    return found.detach().double().cpu()


def _lowest(scores: Mapping[str, Tensor], share: float) -> dict[str, list[int]]:
    """Elements with the lowest scores over units together, of equal ones the last; the best one of each unit stays."""
    total = math.floor(share * sum(item.numel() for item in scores.values()) + 1e-9)
    best = {name: int(item.argmax()) for name, item in scores.items()}
    ranked = sorted(
        (float(value), -index, -position, name)
        for position, (name, item) in enumerate(scores.items())
        for index, value in enumerate(item.tolist())
        if index != best[name]
    )
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    for _, index, _, name in ranked[:total]:
        chosen[name].append(-index)
    return {name: sorted(items) for name, items in chosen.items()}


def _requested(shares: Mapping[str, float], units: StructuralUnits) -> list[tuple[float, list[StructuralUnit]]]:
    """A share and its units for every key."""
    keys: dict[str, str] = {}
    for pattern, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise InputError(f"shares[{pattern!r}] is {share!r}: give the share to remove, from 0 to below 1")
        found = [unit for unit in units.units if _matches(pattern, unit.name, unit.region, unit.kind)]
        if not found:
            reasons = [str(item) for item in units.refused if _matches(pattern, item.name, "", item.kind)]
            known = ", ".join(f"{unit.name} ({unit.kind}, {unit.region})" for unit in units.units) or "none"
            why = f"; refused: {reasons[0]}" if reasons else ""
            raise InputError(f"{pattern!r} names no unit{why}. Units are {known}; find_units lists them with what is refused")
        keys.update(dict.fromkeys((unit.name for unit in found), pattern))
    return [(share, [unit for unit in units.units if keys.get(unit.name) == pattern]) for pattern, share in shares.items()]


def _matches(pattern: str, name: str, region: str, kind: str) -> bool:
    if pattern.startswith("region:"):
        return region == pattern.partition(":")[2]
    if pattern.startswith("kind:"):
        return kind == pattern.partition(":")[2]
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def _program(captured: CapturedGraph) -> ExportedModel:
    """A program of the model without operators that write into tensors, and without a cache."""
    if captured.exported is not None:
        return replace(captured.exported, program=functional(captured.exported.program))
    tried = []
    for attempt, exported in candidates(captured, first=_WITHOUT_CACHE):
        if exported is not None:
            return replace(exported, program=functional(exported.program))
        tried.append(f"{attempt.frontend}: {attempt.detail}")
    raise ExportError(
        f"{type(captured.module).__name__} has no exported program, and units are removed from one. Tried {'; '.join(tried)}"
    )
