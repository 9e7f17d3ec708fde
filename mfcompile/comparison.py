"""compare: several pruners on one model, one capture and one calibration, side by side."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from mfcompile._version import __version__
from mfcompile.comparison_result import ComparedModel, Comparison, MetricChoice, percent, ranked
from mfcompile.compile import Progress, refuse_unprunable
from mfcompile.errors import InputError, MfcompileError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import as_batch, as_function
from mfcompile.masks import PackedMask, fingerprint
from mfcompile.metrics import evaluated
from mfcompile.onnx_entry import first_batch, opened
from mfcompile.parameter_checks import refuse_broken_parameters
from mfcompile.passes.allocation import Sparsity, check_sparsity
from mfcompile.passes.criteria.base import Need, Pruner
from mfcompile.passes.dense_facts import DenseFacts
from mfcompile.passes.held_out import SplitData, split_batches
from mfcompile.passes.mask_agreement import Agreement, agreement
from mfcompile.passes.mask_selection import check_needs, select_masks
from mfcompile.passes.masking import mask_module
from mfcompile.passes.output_error import DenseOutputs
from mfcompile.passes.random_numbers import seeded
from mfcompile.passes.sparsity_patterns import parse_pattern
from mfcompile.passes.variants import Variant, read_variants
from mfcompile.passes.weight_values import set_values
from mfcompile.region import RegionMap
from mfcompile.report import removed_fraction, site_kept_counts
from mfcompile.statistics import NO_STATISTICS, CalibrationStatistics
from mfcompile.steps import calibrated, capture, infer_regions, statistics_of

DEFAULT_SPARSITIES = (0.63, 0.75, 0.9)
"""Those of the paper."""


def compare(
    model: nn.Module | Path | str,
    example_inputs: Any = None,
    *,
    criteria: Iterable[str | Pruner | Mapping[str, Any] | Variant] | None = None,
    sparsities: Iterable[Sparsity] = DEFAULT_SPARSITIES,
    calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    metric: str | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    held_out: int | None = None,
    floor: bool = True,
    statistics: CalibrationStatistics | Path | str | None = None,
    cache: bool | Path | str = False,
    modalities: Mapping[str, str] | None = None,
    regions: Mapping[str, str] | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    padding_mask: str | None = None,
    num_calibration_samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Prune a model with several pruners, each from dense, and say how far their masks agree and what they cost.

    The model is captured once and calibrated once; gradients of the dense model are taken once. One pruned module exists
    at a time.

    Args:
        model: any ``nn.Module``, or the path of an .onnx file; it is not changed.
        example_inputs: a tensor, a tuple, or a mapping of keyword arguments; None takes the first calibration batch.
        criteria: words of the form ``CRITERION[,OPTION=VALUE...][@ALLOCATION][:PATTERN][+UPDATE[,OPTION=VALUE...]]``
            ("multiflow", "multiflow@score-global", "wanda:2:4", "multiflow+sparsegpt"), Criterion objects, or mappings with
            arguments of ``compile_pruned``; None for every criterion that needs no gradients, and SNIP where there is a
            ``loss_fn``.
        sparsities: fractions removed, or one mapping region -> fraction. A pattern that sets its own is pruned to that.
        calibration: any iterable of batches, or a function that gives them; None uses the example inputs.
        evaluate: ``evaluate(module)`` gives a number, or metric -> number.
        metric: the metric that ranks, of several; "NAME:min" or "NAME:max" says which way is better. None takes the first.
            Where the way is not said, the pruned model whose outputs are farthest from dense is taken to be worse.
        loss_fn: ``loss_fn(module, batch)`` gives the loss of a calibration batch, for criteria that need gradients.
        held_out: how many of the last batches are kept from calibration, to compare outputs on; None holds out one in eight
            (with fewer than eight batches none, and outputs are compared on calibration data).
        floor: compare random scores too, whether or not they are named.
        statistics: of an earlier calibration of this model, or their file, to be used again.
        cache, modalities, regions, targets, ignore, padding_mask, num_calibration_samples: see ``compile_pruned``.
        seed: of everything random.
        progress: called with (stage, done, total).

    Returns:
        Rows, agreement of masks, and what was compared on; ``save`` writes compare.json and a picture.

    Raises:
        MfcompileError: one of its kinds; where one pruner is at fault, it is named.
    """
    variants = read_variants(criteria, has_loss=loss_fn is not None, floor=floor)
    asked = _check_sparsities(sparsities)
    name, wanted = _read_metric(metric, evaluate)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be an integer, got {seed!r}")
    batches = None if calibration is None else as_function(calibration)
    model = opened(model)
    for variant in variants:
        with _named(variant.label):
            for sparsity in asked:
                refuse_unprunable(model, variant.options(sparsity, seed))
            check_needs(variant.pruner, NO_STATISTICS, batches or tuple, loss_fn)
    if example_inputs is None and batches is not None:
        example_inputs, _ = first_batch(batches())
    step = progress or _silent
    step("capture", 0, 1)
    captured = capture(model, example_inputs)
    found = infer_regions(captured, modalities=modalities, regions=regions, targets=targets, ignore=ignore)
    refuse_broken_parameters(captured.module, found)
    step("capture", 1, 1)
    if statistics is not None and held_out is None:
        held_out = 0  # nobody knows which batches these statistics have seen
    data = split_batches(captured, batches, num_samples=num_calibration_samples, held_out=held_out, seed=seed)
    if Need.STATISTICS not in frozenset().union(*(variant.pruner.needs for variant in variants)):
        statistics = None
    elif statistics is None:
        options = {"padding_mask": padding_mask, "progress": lambda done, total: step("calibrate", done, total)}
        with seeded(seed, captured.module):
            statistics = calibrated(captured, data.calibration, found, cache, options)
    else:
        statistics = statistics_of(statistics, captured, found)
    step("running the dense model", 0, None)
    dense = DenseOutputs(captured, found, data.compared, padding_mask=padding_mask, seed=seed)
    bench = _Bench(captured, found, statistics, data, dense, evaluate, loss_fn, seed, padding_mask)
    metrics = bench.metrics(captured.module, "dense")
    if name is not None and name not in metrics:
        raise InputError(f"metric={name!r} is none that evaluate returns; choose one of {', '.join(metrics)}")
    step("running the dense model", 1, 1)
    rows, agreements = bench.run(_sections(variants, asked), step)
    choice = _choose_metric(name, wanted, metrics, rows)
    return _result(bench, variants, rows, agreements, metrics, choice)


@dataclass(frozen=True)
class _Section:
    """Pruners that are compared with each other: those of one sparsity.

    Attributes:
        sparsity: what is asked for; None for what the variant sets.
        variants: the pruners.
    """

    sparsity: Sparsity | None
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class _Bench:
    """A dense model with all that pruners are tried with."""

    captured: CapturedGraph
    regions: RegionMap
    statistics: CalibrationStatistics | None
    data: SplitData
    dense: DenseOutputs
    evaluate: Callable[[Any], Any] | None
    loss_fn: Callable[[Any, Any], Any] | None
    seed: int
    padding_mask: str | None
    known: DenseFacts = field(default_factory=DenseFacts)

    def metrics(self, module: nn.Module, what: str) -> dict[str, float]:
        """The user's own metrics; every model meets the same random numbers."""
        if self.evaluate is None:
            return {}
        with seeded(self.seed, module):
            return evaluated(self.evaluate, module, what)

    def run(self, sections: Sequence[_Section], step: Progress) -> tuple[list[ComparedModel], list[tuple[Sparsity, Agreement]]]:
        """All rows, and the agreement inside every section."""
        rows: list[ComparedModel] = []
        agreements = []
        for section in sections:
            masks: dict[str, Mapping[str, PackedMask]] = {}
            title = "pruning" if section.sparsity is None else f"pruning to {percent(section.sparsity)}"
            for index, variant in enumerate(section.variants):
                step(title, index, len(section.variants))
                row, masks[variant.label] = self._row(variant, section.sparsity)
                rows.append(row)
            step(title, len(section.variants), len(section.variants))
            agreements.append((rows[-1].sparsity, agreement(masks, self.regions.pruned_sites)))
        return rows, agreements

    def _row(self, variant: Variant, sparsity: Sparsity | None) -> tuple[ComparedModel, Mapping[str, PackedMask]]:
        began = time.perf_counter()
        batches = self.data.calibration or [as_batch(self.captured.example_inputs)]
        with _named(variant.label):
            masks = select_masks(
                self.captured,
                self.regions,
                self.statistics,
                variant.options(sparsity, self.seed, padding_mask=self.padding_mask),
                batches=lambda: batches,
                loss_fn=self.loss_fn,
                known=self.known,
            )
        seconds = time.perf_counter() - began
        assert masks.sparsity is not None
        sites, kept = self.regions.pruned_sites, site_kept_counts(self.regions.pruned_sites, masks)
        by_region = self.regions.by_region()
        module = mask_module(set_values(self.captured, masks).module, masks)
        row = ComparedModel(
            pruner=variant.label,
            sparsity=masks.sparsity if sparsity is None else sparsity,
            weights=sum(site.weight_count for site in sites),
            kept=sum(kept.values()),
            regions={
                region: removed_fraction(sum(site.weight_count for site in own), sum(kept[site.name] for site in own))
                for region, own in by_region.items()
            },
            layers={site.name: removed_fraction(site.weight_count, kept[site.name]) for site in sites},
            errors=self.dense.errors(module),
            metrics=self.metrics(module, variant.label),
            digest=masks.mask_digest(),
            seconds=seconds,
            diagnostics=masks.diagnostics,
        )
        del module
        gc.collect()  # what a copy of a module refers to in circles would pile up, masks and all
        return row, masks.packed


def _result(
    bench: _Bench,
    variants: Sequence[Variant],
    rows: Sequence[ComparedModel],
    agreements: Sequence[tuple[Sparsity, Agreement]],
    dense: Mapping[str, float],
    choice: MetricChoice | None,
) -> Comparison:
    """Everything in order, the best first and marked."""
    captured, data, seen = bench.captured, bench.data, bench.statistics
    told: list[Diagnostic] = [*bench.regions.diagnostics, *(seen.diagnostics if seen else ()), *bench.dense.ignored]
    return Comparison(
        rows=tuple(ranked(rows, choice)),
        agreements=tuple(agreements),
        pruners=tuple(variant.describe() for variant in variants),
        dense=dense,
        metric=choice,
        outputs=bench.dense.outputs,
        data={
            "calibration": None if seen is None else {"source": seen.source, "batches": seen.batch_count},
            "samples": data.samples[0],
            "compared_on": data.source,
            "is_held_out": data.is_held_out,
            "compared_batches": len(data.compared),
            "compared_samples": data.samples[1],
        },
        model={
            "class": type(captured.module).__name__,
            "parameters": sum(parameter.numel() for parameter in captured.module.parameters()),
            "prunable": sum(site.weight_count for site in bench.regions.pruned_sites),
            "fingerprint": fingerprint(captured.module),
        },
        versions={"mfcompile": __version__, **captured.versions},
        seed=bench.seed,
        diagnostics=tuple(dict.fromkeys(told)),
    )


def _sections(variants: Sequence[Variant], sparsities: Sequence[Sparsity]) -> list[_Section]:
    """Sections by sparsity; a variant whose pattern sets one that was asked for stands among the others of it."""
    free = [variant for variant in variants if not variant.sets_sparsity]
    members: dict[float, list[Variant]] = {value: list(free) for value in sparsities if isinstance(value, float)}
    last = [_Section(value, tuple(free)) for value in sparsities if isinstance(value, Mapping)]
    for variant in variants:
        own = parse_pattern(variant.pattern).fixed_sparsity if variant.sets_sparsity else None
        if own is not None:
            members.setdefault(own, []).append(variant)
        elif variant.sets_sparsity:
            last.append(_Section(None, (variant,)))
    found = [_Section(value, tuple(members[value])) for value in sorted(members)]
    return [section for section in (*found, *last) if section.variants]


def _check_sparsities(sparsities: Iterable[Sparsity]) -> list[Sparsity]:
    """Checked, each once, plain numbers as floats.

    Raises:
        InputError: there is none, one is given twice or is not in [0, 1).
    """
    given: list[Any] = [sparsities] if isinstance(sparsities, (Real, Mapping)) else list(sparsities)
    found: list[Sparsity] = [
        {region: check_sparsity(one, f"the sparsity of {region}") for region, one in value.items()}
        if isinstance(value, Mapping)
        else check_sparsity(value)
        for value in given
    ]
    if not found:
        raise InputError("sparsities is empty: give at least one, 0.63 say")
    twice = next((value for index, value in enumerate(found) if value in found[:index]), None)
    if twice is not None:
        raise InputError(f"sparsities: {twice} is there twice")
    return found


def _read_metric(metric: str | None, evaluate: Callable[[Any], Any] | None) -> tuple[str | None, bool | None]:
    """(name, whether higher is better) of "NAME", "NAME:max" or "NAME:min"; None for what is not said."""
    if metric is None:
        return None, None
    if evaluate is None:
        raise InputError(f"metric={metric!r}: there is no evaluate that could give it. Define evaluate(model) in model.py")
    name, _, way = metric.rpartition(":")
    return (name, way == "max") if name and way in ("min", "max") else (metric, None)


def _choose_metric(
    name: str | None, wanted: bool | None, dense: Mapping[str, float], rows: Sequence[ComparedModel]
) -> MetricChoice | None:
    """The metric that ranks, and its better direction."""
    if not dense:
        return None
    name = next(iter(dense)) if name is None else name
    if wanted is not None:
        return MetricChoice(name, wanted, "as asked")
    measured = [row for row in rows if not math.isnan(row.metrics.get(name, math.nan))]
    farthest = max(measured, key=lambda row: row.errors.overall, default=None)
    if farthest is None or math.isnan(dense[name]):
        return MetricChoice(name, True, "no value says otherwise")
    reason = f"dense has {dense[name]:.4g}, and {farthest.metrics[name]:.4g} where outputs are farthest from dense"
    return MetricChoice(name, dense[name] >= farthest.metrics[name], reason)


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    """Errors inside say which pruner they are about."""
    try:
        yield
    except MfcompileError as error:
        raise type(error)(f"{label}: {error}") from error


def _silent(stage: str, done: int, total: int | None) -> None:
    """Nobody watches."""
