"""The steps from a model to masks: capture, regions, calibration, selection, masks applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mfcompile.frontends.capture import capture as _capture
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import as_function
from mfcompile.masks import MaskSet, fingerprint
from mfcompile.onnx_entry import capture_file, is_onnx, opened, with_weaker_rules
from mfcompile.parameter_checks import require_values
from mfcompile.passes.allocation import Sparsity
from mfcompile.passes.base import run_transform
from mfcompile.passes.calibration import calibrate as _calibrate
from mfcompile.passes.criteria.base import Pruner
from mfcompile.passes.mask_selection import SelectionOptions
from mfcompile.passes.mask_selection import select_masks as _select_masks
from mfcompile.passes.masking import ApplyMasks
from mfcompile.passes.regions import RegionOptions
from mfcompile.passes.regions import infer_regions as _infer_regions
from mfcompile.passes.weight_values import set_values
from mfcompile.region import RegionMap
from mfcompile.statistics import CalibrationStatistics


def capture(model: nn.Module | Path | str, example_inputs: Any = None) -> CapturedGraph:
    """Capture a model as a graph by running it once on the example inputs.

    Args:
        model: any ``nn.Module`` that runs eagerly, or the path of an .onnx file, which may do without example inputs.
        example_inputs: a tensor, a tuple, or a mapping of keyword arguments (BatchEncoding too); None values are allowed.

    Returns:
        The graph. That of a model on the meta device is a plan, good for ``infer_regions`` and pictures, not for pruning.

    Raises:
        InputError: the inputs do not fit the model's forward.
        CaptureError: the model does not run, or does not repeat what it computed.
    """
    module = opened(model)
    return capture_file(module, example_inputs) if is_onnx(module) else _capture(module, example_inputs)


def infer_regions(
    captured: CapturedGraph,
    *,
    modalities: Mapping[str, str] | None = None,
    regions: Mapping[str, str] | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    cross_attention_kv: str = "block",
) -> RegionMap:
    """Tag every linear weight with its region by dataflow from the inputs, and decide which weights are pruned.

    Args:
        captured: what ``capture`` gave.
        modalities: input name -> "vision", "text", any other modality, or "control", where inference needs help.
        regions: pattern -> region; overrides what dataflow found. The most specific pattern wins.
        targets: patterns of the weights to prune; None prunes those of the model's layers (repeated blocks).
        ignore: patterns of weights that stay dense.
        cross_attention_kv: "block" groups image-fed keys and values with the block they feed, "input" with the
            modality they read (the literal reading of Eq. 7).

    Raises:
        RegionError: the modality of an input cannot be decided.
        InputError: a pattern matches nothing (the nearest names are given).
    """
    if captured.masks is not None:  # masks stand between a weight and what it multiplies: look at the graph without them
        captured = capture(captured.module, captured.example_inputs)
    found = _infer_regions(captured, RegionOptions(modalities, regions, targets, ignore, cross_attention_kv))
    return with_weaker_rules(captured, found)


def calibrate(
    captured: CapturedGraph,
    batches: Iterable[Any] | None = None,
    *,
    regions: RegionMap | None = None,
    padding_mask: str | None = None,
    num_samples: int | None = None,
    observe: str = "auto",
    precision: str = "model",
    weighting: str = "none",
    progress: Callable[[int, int | None], None] | None = None,
) -> CalibrationStatistics:
    """Run calibration batches and collect the norm of every activation that feeds a pruned weight.

    Args:
        captured: what ``capture`` gave.
        batches: any iterable of batches (dicts, tuples, a DataLoader); None uses the example inputs.
        regions: what ``infer_regions`` gave; None infers them with defaults.
        padding_mask: name of the mask input of the text; None finds it by convention and shape.
        num_samples: stop after the batch that reaches this many samples; None uses all.
        observe: "auto", "graph" (observers in the captured graph) or "module" (the user's module is watched).
        precision: "model", or "float64" to run a copy of the module in float64: then masks do not depend on how batches of a
            few rows are cut, which float32 products can.
        weighting: "none", or "cip": norms are weighted by token importance, Eq. 4 of CoMP (CVPR 2026), so that every
            criterion that takes norms asks what matters to the tokens that matter.
        progress: called with (batches done, batches in all or None).

    Raises:
        CalibrationError: no batch, a region without a token, NaN or infinity in an activation, or a refused batch.
    """
    require_values(captured.module)
    found = regions if regions is not None else infer_regions(captured)
    return _calibrate(
        captured,
        found,
        batches,
        padding_mask=padding_mask,
        num_samples=num_samples,
        observe=observe,
        precision=precision,
        weighting=weighting,
        recapture=capture,
        progress=progress,
    )


def calibrated(
    captured: CapturedGraph,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None,
    regions: RegionMap,
    cache: bool | Path | str,
    options: Mapping[str, Any],
) -> CalibrationStatistics:
    """Statistics by ``calibrate``, or from the cache where one is asked for.

    Args:
        captured: what ``capture`` gave.
        batches: calibration batches, or a function that gives them; None uses the example inputs.
        regions: what ``infer_regions`` gave.
        cache: False for none, True for the user's cache directory, or another directory.
        options: further arguments of ``calibrate``.
    """
    if cache is False:
        given = batches() if callable(batches) and not isinstance(batches, Iterable) else batches
        return calibrate(captured, given, regions=regions, **options)
    from mfcompile.passes.cached_calibration import calibrate_cached

    require_values(captured.module)
    cache_dir = None if cache is True else cache
    found = calibrate_cached(captured, regions, batches, cache_dir=cache_dir, recapture=capture, **options)
    return replace(found.statistics, diagnostics=(*found.statistics.diagnostics, *found.diagnostics))


def statistics_of(
    statistics: CalibrationStatistics | Path | str, captured: CapturedGraph, regions: RegionMap
) -> CalibrationStatistics:
    """Statistics of an earlier run, after a look at whether they are of this model and these sites.

    Raises:
        InputError: they are not, or the file cannot be read.
    """
    if not isinstance(statistics, CalibrationStatistics):
        statistics = CalibrationStatistics.load(statistics)
    statistics.check_fits(regions.pruned_sites, fingerprint(captured.module))
    return statistics


def select_masks(
    captured: CapturedGraph,
    regions: RegionMap,
    statistics: CalibrationStatistics | None = None,
    *,
    sparsity: Sparsity | None = None,
    criterion: str | Pruner = "multiflow",
    criterion_options: Mapping[str, Any] | None = None,
    allocation: str | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    update: str | None = None,
    update_options: Mapping[str, Any] | None = None,
    rounding: str = "exact",
    seed: int = 0,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> MaskSet:
    """Choose the weights that stay: criterion x allocation x pattern (x update). MULTIFLOW (CVPR 2024), Eq. 4 to 8, by default.

    Args:
        captured: what ``capture`` gave; weights are read, never written.
        regions: what ``infer_regions`` gave.
        statistics: what ``calibrate`` gave; None for criteria that need none.
        sparsity: fraction of the prunable weights that is removed, in [0, 1), or region -> fraction; None for 0.63, or for
            what the pattern sets.
        criterion: a name ("multiflow", "magnitude", "random", "lamp", "l2", "wanda", "snip", "itersnip", "chita", "chita++",
            "tamt", "multiflow-inverted", or one that another package registers), or a Criterion object.
        criterion_options: options of the named criterion, such as {"steps": 20}.
        allocation: "magnitude-per-region" (Eq. 7), "magnitude-global", "score-per-region", "score-global", "uniform",
            "uniform-rows", "erk", or pattern of weights -> fraction; None for what the criterion was published with.
        pattern: "unstructured", "N:M" of consecutive inputs ("2:4"), or blocks of outputs x inputs ("1x4", "4x1", "16x1").
        update: "sparsegpt" or "least-squares" rewrites the kept weights so that every layer's output changes less, or
            least; "gradual" also chooses anew which weights of a layer stay, as many; None leaves them.
        update_options: options of the update: damping, memory_mib, passes, ...; see ``passes.weight_update.UpdateOptions``.
        rounding: "exact" (integer budgets that sum to the request) or "official" (the published truncation).
        seed: of random scores, and of what a loss draws.
        batches: calibration batches, or a function that gives them, for criteria and updates that run the model.
        loss_fn: ``loss_fn(module, batch)`` gives the loss of a batch, for criteria that need gradients.
        progress: called with (weight tensors done, weight tensors in all).

    Raises:
        InputError: an option is not valid, nothing is left to prune, or a weight holds NaN or infinity.
        CalibrationError: what the criterion needs is missing.
    """
    require_values(captured.module)
    options = SelectionOptions(
        sparsity, criterion, criterion_options or {}, allocation, pattern, update, rounding, seed, update_options or {}
    )
    again = None if batches is None else as_function(batches)
    if statistics is not None:
        statistics.check_fits(site for site in regions.pruned_sites if site.name in statistics.sites)
    return _select_masks(captured, regions, statistics, options, progress, batches=again, loss_fn=loss_fn)


def apply_masks(captured: CapturedGraph, masks: MaskSet) -> CapturedGraph:
    """Rewrite the linear nodes of a captured graph with masks; the given graph is not touched.

    Weights stay shared with the user's module, but for those that the masks bring new values for.

    Raises:
        PreconditionError: the masks do not belong to this model.
    """
    return run_transform(ApplyMasks(masks), set_values(captured, masks)).graph
