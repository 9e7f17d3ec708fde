"""Joint pruning inside fine-tuning: the recipe of CoMP (CVPR 2026), one mode per stage with training in between.

::

    smaller = mfcompile.train_jointly(
        model, example_inputs, flops=0.3, loss_fn=loss, batches=loader, evaluate=accuracy, calibration=batches
    )
    mfcompile.export_onnx(smaller.captured, "smaller.onnx")
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mfcompile.comp.candidates import candidates_of
from mfcompile.comp.loss import calibration_inputs, evaluation_loss
from mfcompile.comp.options import CompOptions
from mfcompile.comp.result import JointlyPruned
from mfcompile.comp.search import JointSearch, Progress, least
from mfcompile.comp.trained_space import LossFn, OptimizerFactory, TrainedSpace, Trainer, TrainingOptions
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.random_numbers import seeded
from mfcompile.steps import capture


def train_jointly(
    model: CapturedGraph | nn.Module,
    example_inputs: Any = None,
    *,
    flops: float = 0.5,
    loss_fn: LossFn,
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], Any],
    calibration: Iterable[Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    training: TrainingOptions | None = None,
    options: Mapping[str, Any] | CompOptions | None = None,
    modalities: Mapping[str, str] | None = None,
    padding_mask: str | None = None,
    num_calibration_samples: int | None = None,
    progress: Progress | None = None,
) -> JointlyPruned:
    """Prune units and tokens inside fine-tuning until a share of the FLOPs is left: the recipe of CoMP (CVPR 2026).

    Every stage chooses a mode (Eq. 8 to 10), marks its least important units by the weights of the moment or cuts more
    tokens, and trains: tokens are really gone, and marked units fade to zero linearly (as in UPop, whose soft masks CoMP
    takes over), which is when they count as removed. What a stage costs is what ``evaluate`` lost over it. In the end all
    that faded is taken out of the module, which is trained on for ``recovery_steps``.

    The model is trained as a copy in eval mode, without dropout, through the program that tokens are cut in: ``loss_fn`` and
    ``evaluate`` see a module with the forward of the model, and no other methods of it.

    Args:
        model: what ``capture`` gave, or a module; nothing of it is changed.
        example_inputs: of a module; see ``capture``.
        flops: the share of the dense FLOPs that is to stay, as in ``prune_jointly``.
        loss_fn: takes the module and a batch of ``batches``.
        batches: what the model is trained on, begun again when it ends: a DataLoader or a list, no generator that is used up.
        evaluate: takes a module and gives a number (or several by name, of which the mean counts), the higher the better.
        calibration: batches that units are scored on, as in ``prune_jointly``; None uses the example inputs.
        optimizer: makes an optimizer of parameters, once for the stages and once for the recovery; None is AdamW with a rate
            of 1e-4.
        training: numbers of steps.
        options: see ``CompOptions``; the strategy is "comp", "fixed" or "greedy", the default being "comp". Stages are
            trained, so that none can be tried and taken back, and costs are per FLOPs.
        modalities: input name -> modality, or "control", where inference needs help.
        padding_mask: name of the mask input of the text; None finds it by convention and shape.
        num_calibration_samples: use at most about this many samples; None uses all.
        progress: called with (thousandths of the FLOPs that are saved, thousandths to save).

    Raises:
        InputError: as ``prune_jointly``; or the loss is no finite scalar, or there is no batch.
        ExportError: the model has no exported program, which is what is pruned.
        RegionError: the modality of an input cannot be decided.
        CalibrationError: calibration gave nothing that units can be scored by.
    """
    asked = _with_training(options)
    steps = training or TrainingOptions()
    module, inputs = (model.module, model.example_inputs) if isinstance(model, CapturedGraph) else (model, example_inputs)
    if isinstance(model, CapturedGraph) and model.masks is not None:
        raise InputError("the graph has masks in force: prune units and tokens first, and mask what is left")
    own = capture(copy.deepcopy(module), inputs)
    given = [own.example_inputs] if calibration is None else calibration
    samples = calibration_inputs(own.module, given, least(num_calibration_samples, asked.samples))
    search = JointSearch(asked, candidates_of(own, asked, modalities), samples, modalities, padding_mask)
    trainer = Trainer(loss_fn, batches, optimizer or _adamw, steps)
    with seeded(asked.seed, own.module):
        measure = evaluation_loss(evaluate, own.module)
        pruned = search.run(TrainedSpace(trainer, **search.space_options, measure=measure), flops, progress)
        trainer.train(pruned.module, steps.recovery_steps, trainer.optimizer(pruned.module))
        recovered = measure(pruned.module)
    return replace(pruned, training={**asdict(steps), "loss": recovered})


def _with_training(options: Mapping[str, Any] | CompOptions | None) -> CompOptions:
    """The options, where they can be had with training.

    Raises:
        InputError: they cannot.
    """
    asked = options if isinstance(options, CompOptions) else CompOptions.of({"strategy": "comp", **(options or {})})
    if asked.strategy == "probe":
        raise InputError("strategy='probe' takes steps back, and stages are trained: choose 'comp', 'fixed' or 'greedy'")
    if asked.refit:
        raise InputError("refit=True solves for output weights that training has found: leave it out")
    if asked.cost != "flops":
        raise InputError(f"cost={asked.cost!r}: with training, costs are per FLOPs; leave cost out")
    return asked


def _adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
