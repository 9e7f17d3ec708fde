"""Joint pruning: tokens and structural units together, one mode per stage, with what each costs measured on the way.

The search of CoMP (CVPR 2026) without its training: one-shot and gradient-free.

::

    captured = mfcompile.capture(model, example_inputs)
    smaller = mfcompile.prune_jointly(captured, flops=0.5, calibration=batches)
    mfcompile.export_onnx(smaller.captured, "smaller.onnx")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from mfcompile.comp.candidates import candidates_of
from mfcompile.comp.latency import OnnxClock
from mfcompile.comp.loss import Loss, OutputLoss, calibration_inputs, evaluation_loss
from mfcompile.comp.options import EVALUATE, CompOptions
from mfcompile.comp.refit import refit_outputs
from mfcompile.comp.result import JointlyPruned
from mfcompile.comp.search import JointSearch, Progress, least
from mfcompile.comp.space import ModelSpace
from mfcompile.errors import InputError
from mfcompile.frontends.program_module import program_module
from mfcompile.graph import CapturedGraph
from mfcompile.passes.random_numbers import seeded
from mfcompile.passes.token_scores import resolve_scorer
from mfcompile.passes.unit_scores import resolve_unit_scorer
from mfcompile.steps import capture


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
    resolve_unit_scorer(asked.scorer)
    resolve_scorer(asked.token_scorer)
    captured = model if isinstance(model, CapturedGraph) else capture(model, example_inputs)
    if asked.loss == EVALUATE and evaluate is None:
        raise InputError("loss='evaluate' compares models by your own measure: give evaluate, or define it in model.py")
    if captured.masks is not None:
        raise InputError("the graph has masks in force: prune units and tokens first, and mask what is left")
    given = [captured.example_inputs] if calibration is None else calibration
    few = least(num_calibration_samples, asked.samples)
    every = calibration_inputs(captured.module, given, num_calibration_samples if asked.refit else few)
    batches = calibration_inputs(captured.module, every, few)
    candidates = candidates_of(captured, asked, modalities)
    search = JointSearch(asked, candidates, batches, modalities, padding_mask)
    with ExitStack() as stack, seeded(asked.seed, captured.module):
        clock = stack.enter_context(OnnxClock(candidates.dense)) if asked.cost == "latency" else None
        if evaluate is not None:
            measure: Loss = evaluation_loss(evaluate, captured.module)
        else:
            assert candidates.dense.exported is not None  # it is what is cut
            whole = program_module(candidates.dense.exported.program)  # it refuses lengths that no smaller program could run
            measure = OutputLoss(whole, batches, asked.loss, asked.outputs)
        found = search.run(ModelSpace(**search.space_options, measure=measure, spend=clock), flops, progress)
        return refit_outputs(found, every, measure, modalities, padding_mask) if asked.refit else found
