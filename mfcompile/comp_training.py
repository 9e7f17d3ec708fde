"""Joint pruning inside fine-tuning: the recipe of CoMP (CVPR 2026), one mode per stage with training in between.

::

    smaller = mfcompile.train_jointly(
        model, example_inputs, flops=0.3, loss_fn=loss, batches=loader, evaluate=accuracy, calibration=batches
    )
    mfcompile.export_onnx(smaller.captured, "smaller.onnx")
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfcompile.comp import (
    JointlyPruned,
    Progress,
    Structure,
    _check_reachable,
    _least,
    _search_options,
    _told,
    _UnitScores,
    modes_of,
)
from mfcompile.comp_loss import calibration_inputs, evaluation_loss
from mfcompile.comp_options import CompOptions
from mfcompile.comp_space import Cutting, ModelSpace, ModelState
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.passes.mode_search import search_modes
from mfcompile.passes.random_numbers import seeded
from mfcompile.region import ROWS
from mfcompile.steps import capture, infer_regions
from mfcompile.tokens import prune_tokens

LossFn = Callable[[nn.Module, Any], Tensor]
"""Takes the module being trained and a batch, and gives the loss to go down, a scalar."""

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer of parameters."""


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained while it is pruned.

    Attributes:
        stage_steps: steps of the optimizer in every stage (I of the design; UPop, ICML 2023, renews its choice every 50). What
            the stage removes fades to zero over them.
        recovery_steps: steps after the last stage, of the smaller module.
        clip: the largest norm of the gradient; None for any.
    """

    stage_steps: int = 50
    recovery_steps: int = 300
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (("stage_steps", self.stage_steps, 1), ("recovery_steps", self.recovery_steps, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}: give a number of optimizer steps, at least {least}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip={self.clip!r} is not above 0: it is the largest norm of the gradient; None for any")


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
    samples = calibration_inputs(own.module, given, _least(num_calibration_samples, asked.samples))
    dense, modes, skipped = modes_of(own, asked, modalities)
    trainer = _Trainer(loss_fn, batches, optimizer or _adamw, steps)
    with seeded(asked.seed, own.module):
        measure = evaluation_loss(evaluate, own.module)
        score = _UnitScores(asked.scorer, samples, modalities, padding_mask)
        cutting = Cutting(asked.token_scorer, asked.rest, asked.restore)
        layouts = {site.fqn: site.layout for site in infer_regions(dense, modalities=modalities).sites}
        space = TrainedSpace(trainer, dense, modes, score, measure, None, cutting, modalities, layouts, asked.mode_step)
        _check_reachable(space, flops, asked, skipped)
        found = search_modes(space, flops, _search_options(asked), progress)
        structure = Structure(dict(found.state.removed), space.keep(found.state.gone), cutting)
        captured = _told(found.state.captured, structure)
        trainer.train(captured.module, steps.recovery_steps, trainer.optimizer(captured.module))
        recovered = measure(captured.module)
    return JointlyPruned(
        captured=captured,
        dense=dense,
        structure=structure,
        stages=found.stages,
        modes=tuple(modes),
        capped=found.capped,
        skipped=skipped,
        options=asked,
        target=flops,
        flops=(space.start().total, found.state.total),
        training={**asdict(steps), "loss": recovered},
    )


def _with_training(options: Mapping[str, Any] | CompOptions | None) -> CompOptions:
    """The options, where they can be had with training.

    Raises:
        InputError: they cannot.
    """
    asked = options if isinstance(options, CompOptions) else CompOptions.of({"strategy": "comp", **(options or {})})
    if asked.strategy == "probe":
        raise InputError("strategy='probe' takes steps back, and stages are trained: choose 'comp', 'fixed' or 'greedy'")
    if asked.cost != "flops":
        raise InputError(f"cost={asked.cost!r}: with training, costs are per FLOPs; leave cost out")
    return asked


def _adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)


class _Trainer:
    """Takes steps of an optimizer on the user's loss."""

    def __init__(self, loss_fn: LossFn, batches: Iterable[Any], factory: OptimizerFactory, options: TrainingOptions) -> None:
        self._loss_fn, self._factory = loss_fn, factory
        self._batches = _endless(batches)
        self.options = options

    def optimizer(self, module: nn.Module) -> Optimizer:
        """An optimizer of what of a module is trained."""
        return self._factory([parameter for parameter in module.parameters() if parameter.requires_grad])

    def train(
        self, module: nn.Module, count: int, optimizer: Optimizer, after_step: Callable[[int], None] | None = None
    ) -> None:
        """Take steps.

        Args:
            module: what is trained.
            count: how many steps.
            optimizer: of its parameters.
            after_step: called with the number of each step, from 1.

        Raises:
            InputError: the loss is no finite scalar, or there is no batch.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for step in range(1, count + 1):
            with torch.enable_grad():
                loss = self._loss_fn(module, next(self._batches))
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise InputError(f"loss_fn gave {_described(loss)}: give a scalar tensor that the module computed")
                if not math.isfinite(loss.item()):
                    raise InputError(f"the loss is {loss.item()} at a step of training: lower the learning rate, or clip")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
            if self.options.clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.options.clip)
            optimizer.step()
            if after_step is not None:
                after_step(step)
        optimizer.zero_grad(set_to_none=True)


class TrainedSpace(ModelSpace):
    """States of a model of which every one that is measured is trained first.

    All states train the parameters of one dense module: units that went have columns of W_out that are zero and masked, tokens
    that went are cut in a program over the same parameters.

    Args:
        trainer: takes the steps.
        arguments: of ``ModelSpace``.
    """

    def __init__(self, trainer: _Trainer, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._trainer = trainer
        self._optimizer = trainer.optimizer(self._dense.captured.module)
        self._current: ModelState | None = None

    def measure(self, state: ModelState) -> tuple[float, float]:
        """Loss after the stage's training, without what faded in it, and FLOPs; the dense model is measured as it is."""
        if self._current is None:
            self._current = state
        else:
            self._train(state)
            self._fewer_units = ({}, self._dense.captured)  # its weights are not those of the last stage any more
            self._current = self._state(state.removed, state.gone)
        return self._measure(self._current.captured.module), self.flops(self._current)

    def settle(self, state: ModelState) -> ModelState:
        """The state over the weights as they are now: it was measured last."""
        assert self._current is not None
        return self._current

    def _train(self, state: ModelState) -> None:
        """Take a stage's steps with the tokens of a state; what goes in it fades."""
        module = self._trainee(state).module
        fading = self._fading(state)
        assert self._current is not None
        gone = self._marked(self._current.removed)
        steps = self._trainer.options.stage_steps

        def after_step(step: int) -> None:
            _fade(fading, (steps - step) / (steps - step + 1))
            _fade(gone, 0.0)  # neither the gradient nor momentum brings them back

        self._trainer.train(module, steps, self._optimizer, after_step)

    def _trainee(self, state: ModelState) -> CapturedGraph:
        """The dense module with the tokens of a state, and the units that were gone before it."""
        assert self._current is not None
        graph = self._dense.captured
        keep = self.keep(state.gone)
        if not keep:
            return graph
        how = self._cutting
        return prune_tokens(graph, keep, scorer=how.scorer, rest=how.rest, restore=how.restore, modalities=self._modalities)

    def _masks(self, removed: Mapping[str, Sequence[int]]) -> MaskSet:
        """False where W_out takes from units that are gone."""
        masks: dict[str, Tensor] = {}
        for fqn, columns in self._columns(removed).items():
            weight, layout = self._dense.captured.parameter(fqn), self._layouts.get(fqn, ROWS)
            matrices = layout.matrices(torch.ones(weight.shape, dtype=torch.bool)).clone()
            matrices[:, :, columns] = False
            masks[fqn] = layout.stored(matrices, weight.shape)
        regions = {unit.output_weight: unit.region for unit in self._units}
        packed = {fqn: PackedMask.pack(mask) for fqn, mask in masks.items()}
        return MaskSet(packed, {fqn: regions[fqn] for fqn in masks})

    def _fading(self, state: ModelState) -> list[tuple[nn.Parameter, Tensor]]:
        """(weight, bool of its shape) of what goes in a stage."""
        assert self._current is not None
        before = self._current.removed
        new = {name: sorted(set(gone) - set(before.get(name, ()))) for name, gone in state.removed.items()}
        return self._marked({name: gone for name, gone in new.items() if gone})

    def _marked(self, removed: Mapping[str, Sequence[int]]) -> list[tuple[nn.Parameter, Tensor]]:
        """(weight, bool of its shape) of what W_out takes from elements."""
        named = dict(self._dense.captured.module.named_parameters(remove_duplicate=False))
        marked = self._masks(removed)
        return [(named[fqn], ~mask) for fqn, mask in marked.items()]

    def _columns(self, removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """FQN of W_out -> its inputs that belong to elements."""
        found: dict[str, list[int]] = {}
        for unit in self._units:
            for element in removed.get(unit.name, ()):
                found.setdefault(unit.output_weight, []).extend(unit.columns(element))
        return found


def _fade(weights: Sequence[tuple[nn.Parameter, Tensor]], factor: float) -> None:
    with torch.no_grad():
        for weight, goes in weights:
            weight[goes.to(weight.device)] *= factor


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches, begun again when they end.

    Raises:
        InputError: there is none, or none when they are begun again.
    """
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise InputError("batches has nothing (more) to train on: give a DataLoader or a list, which can be begun again")


def _described(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return f"a {type(loss).__name__}"
    return f"a tensor of shape {tuple(loss.shape)}" + ("" if loss.requires_grad else " without a gradient")
