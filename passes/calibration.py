"""Calibration: run batches, observe the activations that feed prune sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from numbers import Integral
from typing import Any

from torch import Tensor

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import ExampleInputs, normalize_inputs
from mfcompile.passes.losses import batch_count
from mfcompile.passes.observers import StatisticsCollector
from mfcompile.passes.padding import PaddingPlan, find_padding_masks
from mfcompile.passes.runner import Runner, runner_of
from mfcompile.passes.weighted_runner import Recapture, WeightedRunner
from mfcompile.recipe import WEIGHTINGS
from mfcompile.region import RegionMap
from mfcompile.statistics import CalibrationStatistics

Progress = Callable[[int, int | None], None]


def plan_padding(captured: CapturedGraph, regions: RegionMap, padding_mask: str | None = None) -> PaddingPlan:
    """Find the padding masks and the tokens that they speak of.

    Which activations they cover is not planned: padding is followed through every forward pass (``padding_flow``).

    Args:
        captured: the captured model.
        regions: its regions.
        padding_mask: name of the mask input; None to find it.

    Raises:
        InputError: ``padding_mask`` names no (batch, length) input.
    """
    return PaddingPlan(find_padding_masks(captured, regions.modalities, padding_mask))


def repeated_weights(regions: RegionMap) -> frozenset[str]:
    """FQNs of the weights whose rows meet several activations in one forward."""
    return frozenset(
        fqn for fqn, uses in regions.evidence.items() if any(one.overlaps(other) for one, other in combinations(uses, 2))
    )


def calibrate(
    captured: CapturedGraph,
    regions: RegionMap,
    batches: Iterable[Any] | None,
    *,
    padding_mask: str | None = None,
    num_samples: int | None = None,
    observe: str = "auto",
    precision: str = "model",
    weighting: str = "none",
    recapture: Recapture | None = None,
    progress: Progress | None = None,
) -> CalibrationStatistics:
    """Run calibration batches and collect the statistics of every pruned site.

    Args:
        captured: the captured model.
        regions: its regions and sites.
        batches: any iterable of batches (dicts, tuples, tensors; a DataLoader); None uses the example inputs.
        padding_mask: name of the mask input of the text; None to find it.
        num_samples: stop after the batch that reaches this many samples; None uses all.
        observe: "auto" runs the graph with inserted observers where a batch fits it, else the module; "graph" and
            "module" insist on one.
        precision: "model" runs the model as it is. "float64" runs a copy of the module in float64, which takes twice the
            memory of a float32 model on top: matrix products of few rows (below sixteen) round otherwise when batches are
            cut or threads are counted otherwise, which can flip a weight at a threshold; in float64 that is out of sight.
        weighting: "none", or "cip": norms are weighted by token importance, Eq. 4 of CoMP (CVPR 2026).
        recapture: records a module on other inputs: with a weighting, for batches that the captured graph does not fit.
        progress: called with (batches done, batches in all or None) after every batch.

    Returns:
        Statistics of every pruned site.

    Raises:
        InputError: ``batches`` is one batch or no iterable, or another argument is not valid.
        CalibrationError: no batch, a region without a single token, NaN or infinity in an activation, or a batch that
            the model refuses.
    """
    check_arguments(batches, num_samples, observe, precision, weighting)
    plan = plan_padding(captured, regions, padding_mask)
    collector = StatisticsCollector(regions.pruned_sites, plan, repeated_weights(regions), weighting=weighting)
    runner = run_batches(
        captured, regions, collector, batches, plan, num_samples=num_samples, observe=observe, precision=precision,
        recapture=recapture, progress=progress,
    )  # fmt: skip
    statistics = CalibrationStatistics(
        collector.statistics(), collector.batch_count, source_of(captured, batches), "+".join(sorted(runner.observed_by)),
        tuple(dict.fromkeys(item.mask for item in plan.masks)), runner.diagnostics, weighting=weighting,
    )  # fmt: skip
    statistics.check()
    check_regions(regions, statistics)
    return replace(statistics, diagnostics=(*statistics.diagnostics, *_unseen(regions, statistics)))


def run_batches(
    captured: CapturedGraph,
    regions: RegionMap,
    collector: StatisticsCollector,
    batches: Iterable[Any] | None,
    plan: PaddingPlan,
    *,
    num_samples: int | None = None,
    observe: str = "auto",
    precision: str = "model",
    recapture: Recapture | None = None,
    progress: Progress | None = None,
) -> Runner:
    """Run batches and hand the activations that feed the collector's sites to it; the arguments are those of ``calibrate``.

    Raises:
        CalibrationError: there is no batch, or one that the model refuses.
    """
    runner: Runner
    if collector.weighting == "none":
        runner = runner_of(captured, regions, collector, observe, precision, plan)
    else:
        runner = WeightedRunner(captured, regions, collector, observe, precision, recapture)
    total, samples = batch_count(batches), 0
    for index, batch in enumerate([captured.example_inputs] if batches is None else batches):
        inputs = normalize_batch(captured, batch, index)
        runner.run(inputs, index)
        samples += sample_count(inputs)
        if progress is not None:
            progress(index + 1, total)
        if num_samples is not None and samples >= num_samples:
            break
    if collector.batch_count == 0:
        raise CalibrationError(
            "the calibration set is empty: no batch was given. Pass at least one batch, or None to use the example inputs"
        )
    return runner


def source_of(captured: CapturedGraph, batches: Iterable[Any] | None) -> str:
    """Where calibration data come from, in words; without batches, what stands in for them."""
    if batches is not None:
        return "calibration batches"
    is_random = any(text.startswith("random inputs") for text in captured.specialised)
    return "random inputs" if is_random else "example inputs"


def check_arguments(
    batches: Iterable[Any] | None, num_samples: int | None, observe: str, precision: str = "model", weighting: str = "none"
) -> None:
    """Refuse arguments of ``calibrate`` that are not valid, before any work.

    Raises:
        InputError: see calibrate.
    """
    if observe not in {"auto", "graph", "module"}:
        raise InputError(f"observe={observe!r} is unknown; choose auto, graph or module")
    if precision not in {"model", "float64"}:
        raise InputError(f"precision={precision!r} is unknown; choose model or float64")
    if weighting not in WEIGHTINGS:
        raise InputError(f"weighting={weighting!r} is unknown; choose {' or '.join(WEIGHTINGS)}")
    if precision == "float64" and observe == "graph":
        raise InputError("precision='float64' runs the module: the graph is fixed to the model's dtypes. Leave observe out")
    if num_samples is not None and (isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 1):
        raise InputError(f"num_samples must be a positive integer or None, got {num_samples!r}")
    if isinstance(batches, (Mapping, Tensor, str)) or not (batches is None or isinstance(batches, Iterable)):
        raise InputError(
            f"calibration is a {type(batches).__name__}: give an iterable of batches, a list with this one batch in it say"
        )


def sample_count(inputs: ExampleInputs) -> int:
    """Samples in a batch, as ``num_samples`` counts them: the size of the first tensor that has one."""
    return next((int(tensor.shape[0]) for tensor in inputs.tensors().values() if tensor.ndim), 1)


def normalize_batch(captured: CapturedGraph, batch: Any, index: int) -> ExampleInputs:
    """A calibration batch as the model receives it.

    Raises:
        CalibrationError: it does not fit the model.
    """
    try:
        if captured.frontend == "onnx":
            from mfcompile.onnx_file import OnnxFile
            from mfcompile.onnx_inputs import name_inputs

            assert isinstance(captured.module, OnnxFile)  # the front end is onnx
            return name_inputs(captured.module, batch, what=f"calibration batch {index}")
        return normalize_inputs(captured.module, batch, what=f"calibration batch {index}")
    except InputError as error:
        raise CalibrationError(str(error)) from error


def check_regions(regions: RegionMap, statistics: CalibrationStatistics) -> None:
    """Refuse statistics that leave a region without a token.

    Raises:
        CalibrationError: names the region and its first site.
    """
    for region, sites in regions.by_region().items():
        if not sum(statistics.sites[site.name].token_count for site in sites):
            raise CalibrationError(
                f"the region {region!r} received no calibration token at any of its {len(sites)} sites (first: "
                f"{sites[0].name}), so its weights cannot be ranked. Give calibration batches that run this part of the "
                f"model, or keep it dense with ignore=['region:{region}']"
            )


def _unseen(regions: RegionMap, statistics: CalibrationStatistics) -> Iterator[Diagnostic]:
    """Sites that received no token; the experts of one weight in one line."""
    experts: dict[str, dict[int, bool]] = {}
    for site in regions.pruned_sites:
        is_seen = bool(statistics.sites[site.name].token_count)
        if site.expert is not None:
            found = experts.setdefault(site.fqn, {})
            found[site.expert] = found.get(site.expert, True) and is_seen
        elif not is_seen:
            yield Diagnostic(site.name, "it received no calibration token: magnitude ranks its weights")
    for fqn, seen in experts.items():
        unseen = [str(expert) for expert, is_seen in seen.items() if not is_seen]
        if unseen:
            listed = ", ".join(unseen[:8]) + (f" and {len(unseen) - 8} more" if len(unseen) > 8 else "")
            yield Diagnostic(
                fqn,
                f"{len(unseen)} of its {len(seen)} experts received no calibration token ({listed}): magnitude ranks theirs",
            )
