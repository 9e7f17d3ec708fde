"""compile_pruned and the steps that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from mfcompile.artifact import ExportedArtifact, ParityReport
from mfcompile.comp.request import joined_digest, method_request
from mfcompile.comp.result import JointlyPruned
from mfcompile.errors import InputError
from mfcompile.exporting import export_onnx, verify
from mfcompile.files import staged_directory
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import as_function
from mfcompile.masked_weights import masked_parameters, replaced_weights, strip
from mfcompile.masks import MaskSet
from mfcompile.module_copy import share_weights_copy
from mfcompile.onnx_entry import first_batch, is_onnx, opened, refuse_untrainable
from mfcompile.parameter_checks import refuse_broken_parameters, require_values
from mfcompile.passes.allocation import Sparsity, check_sparsity
from mfcompile.passes.criteria.base import Need, Pruner
from mfcompile.passes.dense_facts import DenseFacts
from mfcompile.passes.mask_selection import SelectionOptions, check_needs, check_options
from mfcompile.passes.mask_selection import select_masks as select_with_options
from mfcompile.passes.masking import mask_module
from mfcompile.passes.random_numbers import seeded
from mfcompile.passes.weight_values import with_values
from mfcompile.region import RegionMap
from mfcompile.report import build_report, save_report
from mfcompile.saving import save_weights
from mfcompile.statistics import NO_STATISTICS, CalibrationStatistics
from mfcompile.steps import apply_masks, calibrated, capture, infer_regions, statistics_of
from mfcompile.token_request import TokenRequest, as_request

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total); total is None where it is not known."""


@dataclass(frozen=True)
class CompiledModel:
    """A pruned model: the trainable module, its masks, and everything that is known of them.

    Attributes:
        module: the user's own class with masks in force, its parameters under their own names; it shares its weights with
            the model that was given, so that training one trains the other. Weights that an update changed are its own.
        captured: the captured graph with its linear nodes rewritten with masks.
        regions: regions, evidence and sites.
        statistics: what calibration saw; of no sites where the criterion needed none.
        masks: FQN -> bool mask in the layout of the parameter ((out, in) for nn.Linear), 1 = kept.
        report: what report.json holds.
        pruning: what the masks were chosen by, for ``at_sparsity``.
    """

    module: nn.Module
    captured: CapturedGraph
    regions: RegionMap
    statistics: CalibrationStatistics
    masks: MaskSet
    report: dict[str, Any]
    pruning: Pruning

    @property
    def joint(self) -> JointlyPruned | None:
        """What was taken out before masks, and its trace; None where nothing was."""
        return self.pruning.joint

    @property
    def digest(self) -> str:
        """sha256 of the masks, and of what was taken out before them."""
        found: str = self.report["digest"]
        return found

    @property
    def pruned_sparsity(self) -> Sparsity:
        """The sparsity that the masks were asked for."""
        assert self.masks.sparsity is not None
        return self.masks.sparsity

    def at_sparsity(self, sparsity: Sparsity, progress: Progress | None = None) -> CompiledModel:
        """The same model pruned from dense to another sparsity, from the same calibration."""
        return self.pruning.at_sparsity(sparsity, progress)

    def export_onnx(
        self,
        path: Path | str,
        format: str = "packed",
        values: str = "fp32",
        *,
        split: str | None = None,
        inline: bool = False,
        load_budget: float | None = None,
        external_data: bool | None = None,
    ) -> ExportedArtifact:
        """Write the pruned model as ONNX; see ``mfcompile.export_onnx``. Weights are read from ``module`` as it is now."""
        pruned = self._as_trained()
        options: dict[str, Any] = {"format": format, "values": values, "split": split, "inline": inline}
        options |= {"load_budget": load_budget, "external_data": external_data}
        return export_onnx(pruned, path, regions=self.regions, **options)

    def verify(self, artifact: ExportedArtifact | Path | str, example_inputs: Any | None = None) -> ParityReport:
        """Compare an exported file with ``module``; see ``mfcompile.verify``."""
        return verify(artifact, self._as_trained(), example_inputs)

    def _as_trained(self) -> CapturedGraph:
        """The captured graph over the weights that ``module`` computes with now."""
        moved = {} if is_onnx(self.module) else replaced_weights(self.module, self.captured.module)
        return with_values(self.captured, moved) if moved else self.captured

    def strip(self) -> nn.Module:
        """A plain module with zeros baked in and no masks in force; ``module`` stays as it is."""
        return strip(share_weights_copy(self.module))  # of what was trained, whatever became of its parameters since

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
    sparsity: Sparsity | None = None,
    criterion: str | Pruner = "multiflow",
    criterion_options: Mapping[str, Any] | None = None,
    allocation: str | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    update: str | None = None,
    update_options: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    statistics: CalibrationStatistics | Path | str | None = None,
    cache: bool | Path | str = False,
    modalities: Mapping[str, str] | None = None,
    regions: Mapping[str, str] | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    padding_mask: str | None = None,
    num_calibration_samples: int | None = None,
    precision: str = "model",
    weighting: str = "none",
    rounding: str = "exact",
    seed: int = 0,
    keep_gradients: bool = False,
    tokens: int | float | Mapping[str, int | float] | TokenRequest | None = None,
    method: str | None = None,
    flops: float | None = None,
    method_options: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Prune a vision-language model once; gradient-free, with MULTIFLOW (Farina et al., CVPR 2024), by default.

    Args:
        model: any ``nn.Module``, or the path of an .onnx file; it is not changed, its weights are never written.
        example_inputs: a tensor, a tuple, or a mapping of keyword arguments; None takes the first calibration batch.
        sparsity: fraction of the prunable weights that is removed, in [0, 1), or region -> fraction; None for 0.63, or for
            what the pattern sets.
        criterion, criterion_options, allocation, pattern, update, update_options: how weights are chosen; see
            ``mfcompile.select_masks``.
        calibration: any iterable of batches (dicts, tuples, a DataLoader), or a function that gives them; None uses the
            example inputs.
        loss_fn: ``loss_fn(module, batch)`` gives the loss of a calibration batch, for criteria that need gradients.
        statistics: of an earlier calibration of this model, or their file, to be used again.
        cache: whether statistics of the same model and data are looked up and kept, or in which directory.
        modalities: input name -> modality, or "control", where dataflow needs help.
        regions: pattern -> region, overriding what dataflow found ({"text_encoder.*": "text"}).
        targets: patterns of the weights to prune; None prunes the linear weights inside repeated blocks.
        ignore: patterns of weights that stay dense.
        padding_mask: name of the mask input of the text; None finds it by convention and shape.
        num_calibration_samples: use at most about this many samples; None uses all.
        precision: "model", or "float64" to calibrate a copy in float64; see ``mfcompile.calibrate``.
        weighting: "none", or "cip" for norms weighted by token importance; see ``mfcompile.calibrate``.
        rounding: "exact" or "official".
        seed: seeds torch, NumPy and Python while batches run, for models and loaders that draw, and random scores.
        keep_gradients: keep the gradients that a criterion took, as large as the pruned weights, for ``at_sparsity``.
        tokens: which tokens stay, as ``mfcompile.prune_tokens`` takes it in ``keep``, or a ``TokenRequest`` with its options;
            norms are then observed with fewer tokens, and ``module`` is the one with fewer tokens. None keeps all.
        method: "masks" (also for None), "comp" to take out units and tokens until a share of the FLOPs is left (see
            ``mfcompile.prune_jointly``) and mask nothing, or "comp+multiflow" to mask what is left of that.
        flops: the share of the dense FLOPs that is to stay, for "comp"; None for 0.5.
        method_options: options of "comp"; see ``mfcompile.CompOptions``.
        evaluate: takes a module and gives a number, the higher the better, for method_options={"loss": "evaluate"}.
        progress: called with (stage, done, total).

    Returns:
        The compiled model.

    Raises:
        MfcompileError: one of its kinds, with what happened, where, why, and what to do.
    """
    shared = {} if update is None else {"padding_mask": padding_mask, "num_samples": num_calibration_samples}
    rewriting = shared | dict(update_options or {})
    options = SelectionOptions(
        sparsity, criterion, criterion_options or {}, allocation, pattern, update, rounding, seed, rewriting
    )
    request = method_request(method, flops, method_options, seed)
    if request is not None:
        options = request.mask_options(options)
    needs = check_options(options).needs
    if isinstance(sparsity, Real):
        check_sparsity(sparsity)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be an integer, got {seed!r}")
    model = opened(model)
    given: Iterable[Any] | None = calibration() if callable(calibration) else calibration
    if example_inputs is None:
        example_inputs, given = first_batch(given)
    batches = calibration if callable(calibration) else given
    refuse_unprunable(model, options)
    if is_onnx(model) and (tokens is not None or request is not None):
        what = "tokens" if request is None else "method"
        raise InputError(f"tokens and units are cut in PyTorch models, and the model is an .onnx file: leave out {what}")
    if tokens is not None and request is not None:
        raise InputError(f"method={method!r} chooses how many tokens stay: leave out tokens, or cap them in method_options")
    if Need.GRADIENTS in needs and loss_fn is None:
        check_needs(check_options(options), NO_STATISTICS, None, None)
    stages = _Stages(progress)
    stages.step("capture")(0, 1)
    captured = capture(model, example_inputs)
    if tokens is not None:
        captured = as_request(tokens).apply(captured, modalities)
    joint = None
    if request is not None:
        batches = as_function([example_inputs] if batches is None else batches, num_calibration_samples)
        searched = stages.step("search (thousandths of the FLOPs)")
        joint = request.apply(captured, batches(), evaluate, modalities, padding_mask, searched)
        captured = joint.captured
    found = infer_regions(captured, modalities=modalities, regions=regions, targets=targets, ignore=ignore)
    refuse_broken_parameters(captured.module, found)
    stages.step("capture")(1, 1)
    if Need.GRADIENTS in needs or update is not None:
        batches = as_function([example_inputs] if batches is None else batches, num_calibration_samples)
    if Need.STATISTICS not in needs:
        statistics = None
    elif statistics is None:
        asked: dict[str, Any] = {"padding_mask": padding_mask, "num_samples": num_calibration_samples, "precision": precision}
        asked |= {"weighting": weighting, "progress": stages.step("calibrate")}
        with seeded(seed, captured.module):
            statistics = calibrated(captured, batches, found, cache, asked)
    else:
        statistics = statistics_of(statistics, captured, found)
        if weighting not in {"none", statistics.weighting}:
            raise InputError(
                f"weighting={weighting!r} was asked for, but the given statistics weigh tokens {statistics.weighting!r}. Leave "
                f"out one of the two"
            )
    again = batches if callable(batches) else None
    known = DenseFacts() if keep_gradients else None
    return Pruning(captured, found, statistics, options, again, loss_fn, known, joint).compile(progress)


def refuse_unprunable(model: nn.Module, options: SelectionOptions) -> None:
    """Refuse a model that cannot be pruned with these options, before anything is run.

    Raises:
        InputError: it has masks in force, or weights on the meta device, or is an ONNX file that would have to be trained.
    """
    if next(masked_parameters(model), None) is not None:
        raise InputError(
            "the model has masks in force, from an earlier pruning: bake their zeros in with mfcompile.strip(model) first, "
            "then prune it further"
        )
    require_values(model)
    refuse_untrainable(model, check_options(options), options.update)


class _Stages:
    """Reports progress by stage."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def step(self, stage: str) -> Callable[[int, int | None], None]:
        """What reports progress of one stage."""
        return lambda done, total: None if self._progress is None else self._progress(stage, done, total)


@dataclass(frozen=True)
class Pruning:
    """A dense model with all that is needed to prune it, at one sparsity or at several.

    Attributes:
        captured: the dense model.
        regions: its regions.
        statistics: what calibration saw; None where the criterion needs none.
        options: how weights are chosen.
        batches: gives the calibration batches; None where nothing but statistics is needed of them.
        loss_fn: the loss of a batch; None where none is needed.
        known: what is found out once for all sparsities; None finds it out for each.
        joint: what was taken out before; None where nothing was.
    """

    captured: CapturedGraph
    regions: RegionMap
    statistics: CalibrationStatistics | None
    options: SelectionOptions
    batches: Callable[[], Iterable[Any]] | None = None
    loss_fn: Callable[[Any, Any], Any] | None = None
    known: DenseFacts | None = None
    joint: JointlyPruned | None = None

    def at_sparsity(self, sparsity: Sparsity, progress: Progress | None = None) -> CompiledModel:
        """Prune the dense model to this sparsity."""
        return replace(self, options=replace(self.options, sparsity=sparsity)).compile(progress)

    def compile(self, progress: Progress | None = None) -> CompiledModel:
        """Choose masks, put them into graph and module, and report."""
        stages = _Stages(progress)
        masks = select_with_options(
            self.captured,
            self.regions,
            self.statistics,
            self.options,
            stages.step("select"),
            batches=self.batches,
            loss_fn=self.loss_fn,
            known=self.known,
            update_progress=stages.step("update"),
        )
        return self.assemble(masks)

    def assemble(self, masks: MaskSet) -> CompiledModel:
        """Put masks into graph and module, and report."""
        if self.joint is not None and self.joint.structure.refitted:
            masks = replace(masks, refitted={fqn: self.captured.parameter(fqn) for fqn in self.joint.structure.refitted})
        assert masks.sparsity is not None
        report = build_report(
            captured=self.captured,
            regions=self.regions,
            statistics=self.statistics,
            masks=masks,
            sparsity=masks.sparsity,
            options=self.options.describe(),
        )
        if self.joint is not None:
            structure = self.joint.report()
            report |= {"structure": structure, "digest": joined_digest(report["digest"], structure["digest"])}
        pruned = apply_masks(self.captured, masks)
        module, statistics = mask_module(pruned.module, masks), self.statistics or NO_STATISTICS
        return CompiledModel(module, pruned, self.regions, statistics, masks, report, self)


def assemble(
    captured: CapturedGraph, regions: RegionMap, statistics: CalibrationStatistics | None, masks: MaskSet
) -> CompiledModel:
    """Put masks that were chosen step by step into graph and module, and report."""
    return Pruning(captured, regions, statistics, SelectionOptions(masks.sparsity)).assemble(masks)


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
