"""Joint pruning: tokens and structural units together, one mode per stage, with what each costs measured on the way.

The search of CoMP (CVPR 2026) without its training: one-shot and gradient-free.

::

    captured = mfcompile.capture(model, example_inputs)
    smaller = mfcompile.prune_jointly(captured, flops=0.5, calibration=batches)
    mfcompile.export_onnx(smaller.captured, "smaller.onnx")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mfcompile.comp_latency import OnnxClock
from mfcompile.comp_loss import Loss, OutputLoss, calibration_inputs, evaluation_loss
from mfcompile.comp_modes import TokenMode, UnitMode, token_modes, unit_modes
from mfcompile.comp_options import EVALUATE, CompOptions
from mfcompile.comp_space import Cutting, ModelSpace
from mfcompile.errors import InputError
from mfcompile.frontends.program_module import program_module
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.mode_search import SearchOptions, Stage, search_modes
from mfcompile.passes.random_numbers import seeded
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.token_scores import resolve_scorer
from mfcompile.passes.token_sites import TokenSites
from mfcompile.passes.unit_scores import resolve_unit_scorer, scorer_weighting
from mfcompile.region import RegionMap
from mfcompile.steps import calibrate, capture, infer_regions
from mfcompile.structure import find_units, output_weights, remove_units, unit_norms
from mfcompile.tokens import find_token_sites, prune_tokens, with_program_for, with_token_program

Progress = Callable[[int, int | None], None]

STRUCTURE_KEY = "mfcompile.structure"
"""Metadata of a program: JSON of what was taken out of the model."""


@dataclass(frozen=True)
class Structure:
    """What was taken out of a model; enough to do it again.

    Attributes:
        removed: unit -> elements that are gone, by their numbers in the dense model.
        kept: token site -> the share of arriving unprotected tokens that stays.
        cutting: how tokens are cut.
    """

    removed: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, float]
    cutting: Cutting

    def apply(self, captured: CapturedGraph, modalities: Mapping[str, str] | None = None) -> CapturedGraph:
        """Take the same out of another capture of the model.

        Raises:
            InputError: it has no such unit or site.
        """
        if self.kept:
            captured = with_program_for(captured, self.kept, modalities=modalities)
        smaller = remove_units(captured, self.removed, modalities=modalities) if self.removed else captured
        if not self.kept:
            return smaller
        how = self.cutting
        return prune_tokens(smaller, self.kept, scorer=how.scorer, rest=how.rest, restore=how.restore, modalities=modalities)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Structure:
        """What ``as_dict`` gave."""
        removed = {name: tuple(elements) for name, elements in plain["removed"].items()}
        return cls(removed, dict(plain["kept"]), Cutting(plain["scorer"], plain["rest"], plain["restore"]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        removed = {name: list(elements) for name, elements in sorted(self.removed.items())}
        how = {"scorer": self.cutting.scorer, "rest": self.cutting.rest, "restore": self.cutting.restore}
        return {"removed": removed, "kept": dict(sorted(self.kept.items())), **how}

    def digest(self) -> str:
        """sha256 of what was taken."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class JointlyPruned:
    """A model without some of its units and tokens, and how it came to that.

    Attributes:
        captured: the graph of a smaller trainable module; it can be calibrated, masked and exported like any other.
        dense: the graph that it was made from.
        structure: what was taken.
        stages: the trace: mode, FLOPs, cost and R table of every stage.
        modes: what could go.
        capped: modes of which nothing more could go.
        skipped: units and sites that belong to no mode, and why.
        options: what the search was asked for.
        target: FLOPs asked for, as a share of the dense model's.
        flops: (dense, left) for inputs of the sizes of the example.
        training: what training took part ("stage_steps", "recovery_steps") and the "loss" after it; None in one shot.
    """

    captured: CapturedGraph
    dense: CapturedGraph
    structure: Structure
    stages: tuple[Stage, ...]
    modes: tuple[UnitMode | TokenMode, ...]
    capped: tuple[str, ...]
    skipped: tuple[Diagnostic, ...]
    options: CompOptions
    target: float
    flops: tuple[int, int]
    training: Mapping[str, Any] | None = None

    @property
    def module(self) -> nn.Module:
        """The smaller module."""
        return self.captured.module

    def report(self) -> dict[str, Any]:
        """What was done and measured, as plain values for report.json."""
        from mfcompile.comp_report import report_of

        return report_of(self)

    def plot(self, directory: Path | str, *, stem: str = "stages") -> tuple[Path, Path]:
        """Draw the trace as ``<stem>.png`` and ``<stem>.svg``: FLOPs that are left after every stage, and the loss."""
        from mfcompile.comp_report import plot_stages

        return plot_stages(self.report(), directory, stem=stem)


def prune_jointly(
    model: CapturedGraph | nn.Module,
    example_inputs: Any = None,
    *,
    flops: float = 0.5,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    options: Mapping[str, Any] | CompOptions | None = None,
    modalities: Mapping[str, str] | None = None,
    padding_mask: str | None = None,
    num_calibration_samples: int | None = None,
    progress: Progress | None = None,
) -> JointlyPruned:
    """Prune units and tokens until a share of the FLOPs is left: CoMP (CVPR 2026) in one shot, without its training.

    Each stage scores units and tokens of the model as it is by then, and takes a step of one mode (parameters of a region,
    tokens of a modality). What a step costs is how much worse it makes the model, per FLOPs (or seconds) that it saves.

    Args:
        model: what ``capture`` gave, or a module; nothing of it is changed.
        example_inputs: of a module; see ``capture``.
        flops: the share of the dense FLOPs that is to stay. The result is within 1 % of it or, where no unit is that small,
            as near as one more or less brings it.
        calibration: batches of the lengths of the example inputs; None uses the example inputs.
        evaluate: takes a module and gives a number (or several by name, of which the mean counts), the higher the better;
            None compares outputs with the dense model's on the calibration batches.
        options: see ``CompOptions``; {"strategy": "comp", "cost": "latency"}, say.
        modalities: input name -> modality, or "control", where inference needs help.
        padding_mask: name of the mask input of the text; None finds it by convention and shape.
        num_calibration_samples: use at most about this many samples; None uses all.
        progress: called with (thousandths of the FLOPs that are saved, thousandths to save).

    Raises:
        InputError: an option is not valid, a batch does not fit, nothing can be pruned, or the target cannot be reached (with
            what can, and why no more).
        ExportError: the model has no exported program, which is what is pruned.
        RegionError: the modality of an input cannot be decided.
        CalibrationError: calibration gave nothing that units can be scored by.
    """
    asked = options if isinstance(options, CompOptions) else CompOptions.of(options or {})
    search = _search_options(asked)
    resolve_unit_scorer(asked.scorer)
    resolve_scorer(asked.token_scorer)
    captured = model if isinstance(model, CapturedGraph) else capture(model, example_inputs)
    if asked.loss == EVALUATE and evaluate is None:
        raise InputError("loss='evaluate' compares models by your own measure: give evaluate, or define it in model.py")
    if captured.masks is not None:
        raise InputError("the graph has masks in force: prune units and tokens first, and mask what is left")
    given = [captured.example_inputs] if calibration is None else calibration
    batches = calibration_inputs(captured.module, given, _least(num_calibration_samples, asked.samples))
    dense, modes, skipped = modes_of(captured, asked, modalities)
    with ExitStack() as stack, seeded(asked.seed, captured.module):
        clock = stack.enter_context(OnnxClock(dense)) if asked.cost == "latency" else None
        if evaluate is not None:
            measure: Loss = evaluation_loss(evaluate, captured.module)
        else:
            assert dense.exported is not None  # it is what is cut
            whole = program_module(dense.exported.program)  # it refuses lengths that no smaller program could run
            measure = OutputLoss(whole, batches, asked.loss, asked.outputs)
        score = _UnitScores(asked.scorer, batches, modalities, padding_mask)
        cutting = Cutting(asked.token_scorer, asked.rest, asked.restore)
        layouts = {site.fqn: site.layout for site in infer_regions(dense, modalities=modalities).sites}
        space = ModelSpace(dense, modes, score, measure, clock, cutting, modalities, layouts, asked.mode_step)
        _check_reachable(space, flops, asked, skipped)
        found = search_modes(space, flops, search, progress)
    state = found.state
    structure = Structure(dict(state.removed), space.keep(state.gone), cutting)
    return JointlyPruned(
        captured=_told(state.captured, structure),
        dense=dense,
        structure=structure,
        stages=found.stages,
        modes=tuple(modes),
        capped=found.capped,
        skipped=skipped,
        options=asked,
        target=flops,
        flops=(space.start().total, state.total),
    )


def repeat_structure(
    captured: CapturedGraph, metadata: Mapping[str, str], modalities: Mapping[str, str] | None = None
) -> CapturedGraph | None:
    """A model without the units and tokens that a file is without, by what its metadata say; None where they say nothing.

    Args:
        captured: the whole model.
        metadata: of the file.
        modalities: as in ``prune_jointly``.

    Raises:
        InputError: it is another model.
    """
    told = metadata.get(STRUCTURE_KEY)
    return None if told is None else Structure.of(json.loads(told)).apply(captured, modalities)


def _told(captured: CapturedGraph, structure: Structure) -> CapturedGraph:
    """The graph with a program whose files say what was taken."""
    assert captured.exported is not None  # programs are what is cut
    metadata = {**captured.exported.metadata, STRUCTURE_KEY: json.dumps(structure.as_dict(), sort_keys=True)}
    return replace(captured, exported=replace(captured.exported, metadata=metadata))


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _search_options(options: CompOptions) -> SearchOptions:
    shared = ("strategy", "step", "exploration", "temperature", "memory", "horizon", "tolerance", "order", "seed")
    return SearchOptions(**{name: getattr(options, name) for name in shared})


def modes_of(
    captured: CapturedGraph, options: CompOptions, modalities: Mapping[str, str] | None = None
) -> tuple[CapturedGraph, list[UnitMode | TokenMode], tuple[Diagnostic, ...]]:
    """What joint pruning of a model may choose of.

    Args:
        captured: the model.
        options: which modes, caps and places are asked for.
        modalities: as in ``prune_jointly``.

    Returns:
        (the graph with the program that all is cut in, the modes, units and sites that are in none of them and why).

    Raises:
        InputError: a mode is unknown, or there is none.
        ExportError: the model has no exported program.
    """
    sites = find_token_sites(fixed := with_token_program(captured, modalities=modalities), modalities=modalities)
    dense = _with_program(captured, fixed, sites, options, modalities)
    return (dense, *_modes(dense, sites, options, modalities))


def _with_program(
    captured: CapturedGraph,
    fixed: CapturedGraph,
    sites: TokenSites,
    options: CompOptions,
    modalities: Mapping[str, str] | None,
) -> CapturedGraph:
    """The graph with the program that all is cut in: lengths of inputs whose tokens are in no mode stay free."""
    wanted = _chosen(token_modes(sites.sites, options.caps, options.at), options)
    keep: dict[str, int | float] = {site.name: 1.0 for mode in wanted if isinstance(mode, TokenMode) for site in mode.sites}
    return with_program_for(captured, keep, modalities=modalities) if keep else fixed


def _chosen(modes: Sequence[UnitMode | TokenMode], options: CompOptions) -> list[UnitMode | TokenMode]:
    """The modes that are asked for: all but tokens of text, where none are named."""
    if options.modes is None:
        return [mode for mode in modes if not (isinstance(mode, TokenMode) and mode.is_text)]
    return [mode for mode in modes if mode.name in options.modes]


def _modes(
    dense: CapturedGraph, sites: TokenSites, options: CompOptions, modalities: Mapping[str, str] | None
) -> tuple[list[UnitMode | TokenMode], tuple[Diagnostic, ...]]:
    """The modes that are searched over, and what is in none of them."""
    units = find_units(dense, modalities=modalities)
    skipped = [Diagnostic(item.name, f"{item.kind} stay: {item.node}: {item.reason}") for item in units.refused]
    skipped += sites.refused
    scored, unscored = _scorable(dense, units.units, options.scorer, modalities)
    skipped += unscored
    every: list[UnitMode | TokenMode] = [*unit_modes(scored, options.caps), *token_modes(sites.sites, options.caps, options.at)]
    known = [mode.name for mode in every]
    for name in (*(options.modes or ()), *options.caps):
        if name not in known:
            why = f" ({skipped[0]})" if skipped else ""
            raise InputError(f"there is no mode {name!r}; this model's modes are {', '.join(known) or 'none'}{why}")
    chosen = _chosen(every, options)
    if not chosen:
        reasons = "; ".join(str(item) for item in skipped[:3]) or "it has neither"
        raise InputError(f"no units and no tokens of this model can go: {reasons}")
    return chosen, tuple(skipped)


def _scorable(
    dense: CapturedGraph, units: Sequence[StructuralUnit], scorer: str, modalities: Mapping[str, str] | None
) -> tuple[list[StructuralUnit], list[Diagnostic]]:
    """Units that can be scored: those whose output weight calibration observes, where the scorer needs that."""
    if scorer_weighting(scorer) is None:
        return list(units), []
    sites = {site.fqn for site in _regions_of_units(dense, units, modalities).pruned_sites}
    missing = [unit for unit in units if unit.output_weight not in sites]
    reason = "the inputs of {} are not observed by calibration, so that its units have no score"
    skipped = [Diagnostic(unit.name, reason.format(unit.output_weight)) for unit in missing]
    return [unit for unit in units if unit.output_weight in sites], skipped


def _regions_of_units(
    captured: CapturedGraph, units: Iterable[StructuralUnit], modalities: Mapping[str, str] | None
) -> RegionMap:
    """Regions with the output weights of units as sites, and no others."""
    known = infer_regions(captured, modalities=modalities)
    linear = {site.fqn for site in known.sites}
    targets = [fqn for fqn in dict.fromkeys(unit.output_weight for unit in units) if fqn in linear]
    return infer_regions(captured, modalities=modalities, targets=targets) if targets else replace(known, sites=())


@dataclass(frozen=True)
class _UnitScores:
    """Scores the units of a graph, on calibration batches that run through it as it is."""

    scorer: str
    batches: Sequence[ExampleInputs]
    modalities: Mapping[str, str] | None
    padding_mask: str | None

    def __call__(self, captured: CapturedGraph, units: Sequence[StructuralUnit]) -> dict[str, Tensor]:
        weighting = scorer_weighting(self.scorer)
        regions = _regions_of_units(captured, units, self.modalities)
        norms: dict[str, Tensor] = {}
        if weighting is not None:
            how: dict[str, Any] = {} if weighting == "none" else {"weighting": weighting}
            statistics = calibrate(captured, list(self.batches), regions=regions, padding_mask=self.padding_mask, **how)
            norms = unit_norms(units, statistics)
        return resolve_unit_scorer(self.scorer)(units, output_weights(captured, units, regions), norms)


def _check_reachable(space: ModelSpace, flops: float, options: CompOptions, skipped: Sequence[Diagnostic]) -> None:
    """Refuse a target below what all modes together can reach, before anything is searched.

    Raises:
        InputError: says how far they reach, and what is in none of them.
    """
    if isinstance(flops, bool) or not isinstance(flops, (int, float)) or not 0 < flops <= 1:
        raise InputError(f"flops={flops!r} is not in (0, 1]: it is the share of the dense FLOPs that stays, such as 0.5")
    least = space.flops(space.least())
    if least <= flops * (1 + options.tolerance):
        return
    why = [f"with all of {', '.join(space.modes)} gone that may go, {least:.3f} of the FLOPs are left"]
    if any(share < 1 for share in options.caps.values()):
        why.append(f"the caps are {dict(options.caps)}")
    if skipped:
        why.append(f"not in any mode: {'; '.join(str(item) for item in skipped[:3])}")
    raise InputError(
        f"flops={flops:g} cannot be reached: {'; '.join(why)}. Ask for {least:.3f} or more, raise caps, or name more modes"
    )
