"""States of a model that is trained while it is pruned, and what trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mfcompile.comp.space import ModelSpace, ModelState
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.region import ROWS
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


class Trainer:
    """Takes steps of an optimizer on the user's loss.

    Args:
        loss_fn: the loss.
        batches: begun again when they end.
        factory: makes the optimizer.
        options: how many steps.
    """

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

    def __init__(self, trainer: Trainer, **arguments: Any) -> None:
        super().__init__(**arguments)
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
