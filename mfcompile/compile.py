"""compile_pruned and the steps that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfcompile.artifact import ExportedArtifact, ParityReport
from mfcompile.errors import InputError
from mfcompile.files import staged_directory
from mfcompile.frontends.capture import capture as _capture
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet
from mfcompile.onnx_entry import capture_file, export_file, first_batch, is_onnx, opened, with_weaker_rules
from mfcompile.onnx_ladder import FLOAT32_KEY, FLOAT32_VALUE, export_accepted, float32_inputs, float32_module
from mfcompile.parameter_checks import refuse_broken_parameters, require_values
from mfcompile.passes.base import run_transform
from mfcompile.passes.calibration import calibrate as _calibrate
from mfcompile.passes.mask_selection import SelectionOptions
from mfcompile.passes.mask_selection import select_masks as _select_masks
from mfcompile.passes.masking import ApplyMasks, mask_module, masked_parameters, strip
from mfcompile.passes.regions import RegionOptions
from mfcompile.passes.regions import infer_regions as _infer_regions
from mfcompile.region import RegionMap
from mfcompile.report import build_report, save_report
from mfcompile.saving import save_weights
from mfcompile.split import split_request
from mfcompile.statistics import CalibrationStatistics

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total); total is None where it is not known."""


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
        progress: called with (batches done, batches in all or None).

    Raises:
        CalibrationError: no batch, a region without a token, NaN or infinity in an activation, or a refused batch.
    """
    require_values(captured.module)
    found = regions if regions is not None else infer_regions(captured)
    return _calibrate(
        captured, found, batches, padding_mask=padding_mask, num_samples=num_samples, observe=observe, progress=progress
    )


def select_masks(
    captured: CapturedGraph,
    regions: RegionMap,
    statistics: CalibrationStatistics | None,
    *,
    sparsity: float = 0.63,
    criterion: str = "multiflow",
    allocation: str = "magnitude-per-region",
    rounding: str = "exact",
    progress: Callable[[int, int | None], None] | None = None,
) -> MaskSet:
    """Choose the weights that stay: MULTIFLOW (CVPR 2024), Eq. 4 to 8, by default.

    Args:
        captured: what ``capture`` gave; weights are read, never written.
        regions: what ``infer_regions`` gave.
        statistics: what ``calibrate`` gave; None for criterion="magnitude".
        sparsity: fraction of the prunable weights that is removed, in [0, 1).
        criterion: "multiflow", "multiflow-inverted" or "magnitude".
        allocation: "magnitude-per-region" (Eq. 7), "magnitude-global" or "score-global".
        rounding: "exact" (integer budgets that sum to the request) or "official" (the published truncation).
        progress: called with (weight tensors done, weight tensors in all).

    Raises:
        InputError: an option is not valid, nothing is left to prune, or a weight holds NaN or infinity.
        CalibrationError: statistics are needed and missing.
    """
    require_values(captured.module)
    options = SelectionOptions(sparsity, criterion, allocation, rounding)
    return _select_masks(captured, regions, statistics, options, progress)


def apply_masks(captured: CapturedGraph, masks: MaskSet) -> CapturedGraph:
    """Rewrite the linear nodes of a captured graph with masks; weights stay shared, the given graph is not touched.

    Raises:
        PreconditionError: the masks do not belong to this model.
    """
    return run_transform(ApplyMasks(masks), captured).graph


def export_onnx(
    pruned: CapturedGraph,
    path: Path | str,
    *,
    format: str = "packed",
    values: str = "fp32",
    split: str | None = None,
    regions: RegionMap | None = None,
) -> ExportedArtifact:
    """Write a (masked) captured graph as an ONNX file that stock onnxruntime loads.

    The file is compared with the masked module in onnxruntime before it gets its name; a program that does not hold
    gives way to the next way of exporting. Models in bfloat16 are computed in float32.

    Args:
        pruned: what ``apply_masks`` gave (or a dense CapturedGraph).
        path: the .onnx file to write; large weights go to a ``.data`` file beside it. With ``split``, the directory.
        format: "packed" stores only what is left of pruned weights, "dense" stores zeros as well.
        values: "fp32", or "fp16" for the stored values of pruned weights.
        split: "regions" writes one file per modality and one for their fusion, with a manifest (see ``load_parts``);
            None writes one file.
        regions: what ``infer_regions`` gave, for ``split``; None infers them with defaults.

    Raises:
        InputError: format, values or split is unknown.
        ExportError: no way of exporting gives a file that computes what the model computes; names every way that was
            tried, with the operator or the line of the model that stopped it.
    """
    require_values(pruned.module)
    request = split_request(split, infer_regions(pruned) if regions is None and split is not None else regions)
    if is_onnx(pruned.module):
        if request is not None:
            raise InputError("an .onnx file is pruned as it is, in one file; split is for PyTorch models. Export without it")
        return export_file(pruned, path, format=format, values=values)
    return export_accepted(pruned, path, format=format, values=values, split=request)[0]


def verify(
    artifact: ExportedArtifact | Path | str,
    pruned: CapturedGraph,
    example_inputs: Any | None = None,
    *,
    values: str | None = None,
    seed: int = 0,
) -> ParityReport:
    """Compare an ONNX file in onnxruntime with the masked PyTorch module, on held-out inputs at two batch sizes.

    Args:
        artifact: what ``export_onnx`` gave, or the path of an .onnx file or of a split model.
        pruned: the masked graph that the file was made from.
        example_inputs: inputs to draw the comparison from; None uses those of the capture.
        values: "fp32" or "fp16", how the file stores values; None takes it from the artefact.
        seed: seed of the held-out inputs.

    Returns:
        The report; ``passed`` says whether every output is within the tolerance.
    """
    from mfcompile.exporters import parity
    from mfcompile.inputs import normalize_inputs

    stored = values or (artifact.values if isinstance(artifact, ExportedArtifact) else "fp32")
    is_cast = parity.read_metadata(artifact).get(FLOAT32_KEY) == FLOAT32_VALUE
    if not is_cast and any(parameter.dtype == torch.float16 for parameter in pruned.module.parameters()):
        stored = "fp16"  # both sides compute in half precision, whatever the file stores
    inputs = pruned.example_inputs if example_inputs is None else normalize_inputs(pruned.module, example_inputs)
    module = pruned.module if pruned.masks is None else mask_module(pruned.module, pruned.masks)
    if is_cast:
        module, inputs = float32_module(module), float32_inputs(inputs)
    rtol, atol = parity.default_tolerance(stored)
    cases = parity.runnable_cases(artifact, module, inputs, seed=seed)
    return parity.verify(artifact, module, cases, rtol=rtol, atol=atol)


@dataclass(frozen=True)
class CompiledModel:
    """A pruned model: the trainable module, its masks, and everything that is known of them.

    Attributes:
        module: the user's own class with masks in force (``torch.nn.utils.parametrize``); it shares its weights with
            the model that was given, so that training one trains the other.
        captured: the captured graph with its linear nodes rewritten with masks.
        regions: regions, evidence and sites.
        statistics: what calibration saw.
        masks: FQN -> bool mask in the layout of the parameter ((out, in) for nn.Linear), 1 = kept.
        report: what report.json holds.
    """

    module: nn.Module
    captured: CapturedGraph
    regions: RegionMap
    statistics: CalibrationStatistics
    masks: MaskSet
    report: dict[str, Any]

    def export_onnx(
        self, path: Path | str, format: str = "packed", values: str = "fp32", *, split: str | None = None
    ) -> ExportedArtifact:
        """Write the pruned model as ONNX; see ``mfcompile.export_onnx``. Weights are read from ``module`` as it is now."""
        return export_onnx(self.captured, path, format=format, values=values, split=split, regions=self.regions)

    def verify(self, artifact: ExportedArtifact | Path | str, example_inputs: Any | None = None) -> ParityReport:
        """Compare an exported file with ``module``; see ``mfcompile.verify``."""
        return verify(artifact, self.captured, example_inputs)

    def strip(self) -> nn.Module:
        """A plain module with zeros baked in and no masks in force; ``module`` stays as it is."""
        return strip(mask_module(self.captured.module, self.masks))

    def save(self, output_dir: Path | str, *, onnx: bool = True, split: str | None = None, overwrite: bool = False) -> Path:
        """Write weights, masks, report and the packed ONNX file into a new directory, complete or not at all.

        With ``split="regions"`` the ONNX file is several; see ``mfcompile.export_onnx``.

        ``model.safetensors`` holds plain parameter names with zeros baked in; models that can (``save_pretrained``)
        write their configuration beside it, so that their own library reloads the directory.

        Raises:
            InputError: the directory is not empty (see ``overwrite``) or not writable.
            ExportError: the ONNX file cannot be written; pass onnx=False to do without.
        """
        with staged_directory(Path(output_dir), overwrite=overwrite) as staging:
            if not is_onnx(self.module):  # the weights of an ONNX file are saved in the ONNX file
                save_weights(self.strip(), staging)
            self.masks.save(staging / "masks.safetensors")
            save_report(self.report, staging / "report.json")
            if onnx:
                self.export_onnx(staging if split else staging / "model.onnx", split=split)
        return Path(output_dir)


def compile_pruned(
    model: nn.Module | Path | str,
    example_inputs: Any = None,
    *,
    sparsity: float = 0.63,
    calibration: Iterable[Any] | None = None,
    modalities: Mapping[str, str] | None = None,
    regions: Mapping[str, str] | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    padding_mask: str | None = None,
    num_calibration_samples: int | None = None,
    rounding: str = "exact",
    seed: int = 0,
    progress: Progress | None = None,
) -> CompiledModel:
    """Prune a vision-language model once, gradient-free, with MULTIFLOW (Farina et al., CVPR 2024).

    Args:
        model: any ``nn.Module``, or the path of an .onnx file; it is not changed, its weights are never written.
        example_inputs: a tensor, a tuple, or a mapping of keyword arguments; None takes the first calibration batch.
        sparsity: fraction of the prunable weights that is removed, in [0, 1).
        calibration: any iterable of batches (dicts, tuples, a DataLoader); None uses the example inputs.
        modalities: input name -> modality, or "control", where dataflow needs help.
        regions: pattern -> region, overriding what dataflow found ({"text_encoder.*": "text"}).
        targets: patterns of the weights to prune; None prunes the linear weights inside repeated blocks.
        ignore: patterns of weights that stay dense.
        padding_mask: name of the mask input of the text; None finds it by convention and shape.
        num_calibration_samples: use at most about this many samples; None uses all.
        rounding: "exact" or "official".
        seed: seeds torch before calibration, for models and loaders that draw random numbers.
        progress: called with (stage, done, total).

    Returns:
        The compiled model.

    Raises:
        MfcompileError: one of its kinds, with what happened, where, why, and what to do.
    """
    from mfcompile.passes.allocation import check_sparsity

    sparsity = check_sparsity(sparsity)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be an integer, got {seed!r}")
    model = opened(model)
    if example_inputs is None:
        example_inputs, calibration = first_batch(calibration)
    if next(masked_parameters(model), None) is not None:
        raise InputError(
            "the model has masks in force, from an earlier pruning: bake their zeros in with mfcompile.strip(model) first, "
            "then prune it further"
        )

    require_values(model)

    def step(stage: str) -> Callable[[int, int | None], None]:
        return lambda done, total: None if progress is None else progress(stage, done, total)

    step("capture")(0, 1)
    captured = capture(model, example_inputs)
    model = captured.module
    found = infer_regions(captured, modalities=modalities, regions=regions, targets=targets, ignore=ignore)
    refuse_broken_parameters(model, found)
    step("capture")(1, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        statistics = calibrate(
            captured,
            calibration,
            regions=found,
            padding_mask=padding_mask,
            num_samples=num_calibration_samples,
            progress=step("calibrate"),
        )
    masks = select_masks(captured, found, statistics, sparsity=sparsity, rounding=rounding, progress=step("select"))
    return assemble(captured, found, statistics, masks, sparsity=sparsity, rounding=rounding, seed=seed)


def assemble(
    captured: CapturedGraph,
    regions: RegionMap,
    statistics: CalibrationStatistics,
    masks: MaskSet,
    *,
    sparsity: float,
    rounding: str = "exact",
    seed: int = 0,
) -> CompiledModel:
    """Put masks into graph and module, and report."""
    report = build_report(
        captured=captured, regions=regions, statistics=statistics, masks=masks, sparsity=sparsity, rounding=rounding, seed=seed
    )
    pruned = apply_masks(captured, masks)
    return CompiledModel(mask_module(captured.module, masks), pruned, regions, statistics, masks, report)


def with_masks(captured: CapturedGraph, masks: MaskSet) -> CapturedGraph:
    """The captured graph with saved masks applied, after checking that they were made for these weights.

    Raises:
        InputError: the fingerprints differ.
    """
    from mfcompile.masks import fingerprint

    own = fingerprint(captured.module)
    if masks.fingerprint and masks.fingerprint != own:
        raise InputError(
            f"the masks were made for a model with fingerprint {masks.fingerprint[:16]}..., this model's is {own[:16]}...: its "
            f"weights are different. Prune this model, or load the weights that the masks were made for"
        )
    return replace(apply_masks(captured, masks))
