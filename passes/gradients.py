"""Gradients of a loss with respect to chosen weights, on a copy that leaves the user's module as it was.

The copy shares its memory with the module but has Parameter objects of its own: ``.grad``, ``requires_grad`` and the
training mode of the user's parameters are not touched, and what forward passes write into buffers is put back after
every batch. Only the chosen weights ask for a gradient, so that autograd keeps one buffer for each of them and adds into
it in place.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfcompile.control_flow import eager_code
from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import Diagnostic
from mfcompile.module_copy import share_weights_copy, storage_address
from mfcompile.passes.losses import LossFunction, batch_count, batch_tensors, own_containers, usable_loss
from mfcompile.passes.random_numbers import seeded
from mfcompile.undisturbed import KeepingState

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the mean loss over some batches.

    Attributes:
        gradients: FQN -> gradient in the layout of the parameter: float32 (float64 for a float64 weight), on the device of
            the weight. Names of one tied weight share one tensor.
        batch_count: batches that the mean is over.
        mean_loss: mean of the loss over them.
        unused: FQNs that no batch's loss depends on; their gradient is zero.
    """

    gradients: Mapping[str, Tensor]
    batch_count: int
    mean_loss: float
    unused: tuple[str, ...] = ()

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """One line per weight that the loss does not use."""
        return unused_weights(self.unused)


def unused_weights(names: Iterable[str]) -> tuple[Diagnostic, ...]:
    """One line per weight that no batch's loss depends on."""
    return tuple(Diagnostic(name, "the loss depends on it in none of the batches: its gradient is zero") for name in names)


def accumulate_gradients(
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    fqns: Iterable[str],
    *,
    masks: Mapping[str, Tensor] | None = None,
    values: Mapping[str, Tensor] | None = None,
    training: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Gradients:
    """The mean over batches of the gradient of ``loss_fn(module, batch)``.

    Sums are kept in float32 also for bfloat16 and float16 weights, whose own precision would lose a batch among many
    (256 equal bfloat16 addends stop growing); no loss is scaled, so that float16 gradients may underflow. A tied weight
    has one buffer and the sum over its uses.

    Args:
        module: any module; it is left as it was, and so are the random number generators.
        batches: any iterable; each item is given to ``loss_fn`` as it is.
        loss_fn: gives the loss of a batch.
        fqns: names of parameters or buffers of the module.
        masks: FQN -> bool mask in the layout of the parameter, 1 = kept: in force while the model runs, and in the gradient.
        values: FQN -> values that stand for the weight's own.
        training: run in training mode (dropout), else in eval mode.
        seed: of the random numbers that the loss and the batches draw.
        progress: called with (batches done, batches in all or None) after every batch.

    Raises:
        CalibrationError: there is no batch, the module cannot be copied, or the loss of a batch is unusable (names it).
        InputError: the module has no such weight, or a mask or value does not fit it.
    """
    runner = LossRunner(module, loss_fn, fqns, training=training)
    runner.set_weights(values, masks)
    with runner.seeded(seed):
        return runner.accumulate(batches, progress=progress)


class LossRunner:
    """A copy of a module whose chosen weights have gradients; for pruners that run it many times, under other weights.

    Use it inside ``seeded``, which puts the random number generators back.

    Args:
        module, loss_fn, fqns, training: see ``accumulate_gradients``.

    Attributes:
        leaves: FQN -> the tensor of the copy that stands for the weight; tied names share one.

    Raises:
        CalibrationError: the module cannot be copied.
        InputError: the module has no such weight, or it is of an integer type.
    """

    def __init__(self, module: nn.Module, loss_fn: LossFunction, fqns: Iterable[str], *, training: bool = False) -> None:
        self._loss_fn = loss_fn
        chosen = {fqn: _weight(module, fqn) for fqn in fqns}
        with torch.inference_mode(False):  # else the copy's parameters could never have gradients
            replaced = _replacements(module, chosen.values())
        try:
            self._copy = share_weights_copy(module, replaced=replaced)
        except Exception as error:
            raise CalibrationError(
                f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}): gradients are taken on a copy so "
                f"that your model stays as it is. Remove the attribute that deepcopy refuses"
            ) from error
        self.leaves: dict[str, Tensor] = {fqn: replaced[item] for fqn, item in chosen.items()}
        self._dense = {leaf: leaf.detach() for leaf in self.leaves.values()}
        self._sums: dict[Tensor, Tensor] = {}
        self._masks: dict[Tensor, Tensor] = {}
        self._sink: Callable[[Tensor, Tensor], None] | None = None
        arrived = weakref.WeakMethod(self._arrived)  # weak: nothing that is large may wait for the garbage collector
        for leaf in dict.fromkeys(self.leaves.values()):
            leaf.register_post_accumulate_grad_hook(partial(_call, arrived))  # type: ignore[no-untyped-call]
        self._watcher = KeepingState(self._copy)
        _set_mode(self._copy, training, self._watcher)

    def seeded(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Seed every generator that a loss may draw from, and put all of them back at the end."""
        return seeded(seed, self._copy)

    def set_weights(self, values: Mapping[str, Tensor] | None = None, masks: Mapping[str, Tensor] | None = None) -> None:
        """Let other values stand for the weights, zero where a mask prunes; weights named in neither keep their own.

        Raises:
            InputError: a mask or a value is of another shape than the weight, or belongs to no chosen weight.
        """
        given = self._by_leaf("values", values or {})
        self._masks = {leaf: mask.to(leaf.device) for leaf, mask in self._by_leaf("masks", masks or {}).items()}
        for leaf, dense in self._dense.items():
            value = given.get(leaf, dense).detach().to(dense)
            if leaf in self._masks:
                with torch.inference_mode(False), torch.no_grad():
                    value = torch.where(self._masks[leaf], value, 0.0)
            if _place(value) != _place(leaf):
                leaf.data = value
        self._watcher = KeepingState(self._copy)  # it remembers where the weights are

    def accumulate(self, batches: Iterable[Any], *, progress: Progress | None = None) -> Gradients:
        """The mean gradient over batches; see ``accumulate_gradients``. The buffers are the caller's from then on."""
        total, count, losses = batch_count(batches), 0, 0.0
        try:
            for batch in batches:
                losses += self.backward(batch, count)
                count += 1
                if progress is not None:
                    progress(count, total)
            if not count:
                raise CalibrationError("there is no batch to take gradients of: pass at least one batch")
            return self._collect(count, losses / count)
        finally:
            self.clear()

    def backward(self, batch: Any, index: int) -> float:
        """Add the gradient of one batch to what is there; gives the loss.

        Args:
            batch: what the loss function gets; containers are handed over as copies, tensors are put back.
            index: number of the batch, for messages.

        Raises:
            CalibrationError: the loss raised, is no scalar, is not finite, or depends on none of the weights.
        """
        watcher = self._watcher
        for tensor in batch_tensors(batch):
            watcher.state.watch(tensor)
        try:
            # Whatever mode the caller is in; operator by operator, or the watcher would not see what is written.
            with torch.inference_mode(False), torch.enable_grad(), eager_code(), watcher:
                loss = self._loss(batch, index)
                try:
                    loss.backward()  # type: ignore[no-untyped-call]
                except Exception as error:
                    raise CalibrationError(
                        f"the backward pass of batch {index} raised {type(error).__name__}: {error}. The loss function must "
                        f"return the loss of a forward pass of its own, and leave backward() to the pruner"
                    ) from error
        finally:
            watcher.state.restore()
        return float(loss.detach())

    def gradient_sum(self, fqn: str) -> Tensor | None:
        """The sum over the batches so far, the buffer itself; None while no batch's loss depended on the weight."""
        leaf = self.leaves[fqn]
        return leaf.grad if _sum_dtype(leaf) == leaf.dtype else self._sums.get(leaf)

    def clear(self) -> None:
        """Let go of all gradients."""
        self._sums.clear()
        for leaf in self.leaves.values():
            leaf.grad = None

    @contextlib.contextmanager
    def sending(self, sink: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Call ``sink(leaf, gradient)`` as soon as the backward pass has a gradient, and keep none."""
        self._sink = sink
        try:
            yield
        finally:
            self._sink = None
            self.clear()

    def masked(self, leaf: Tensor, gradient: Tensor) -> Tensor:
        """The gradient, changed in place: zero where the mask in force prunes."""
        return gradient.masked_fill_(~self._masks[leaf], 0.0) if leaf in self._masks else gradient

    def _by_leaf(self, kind: str, given: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        found = {}
        for fqn, tensor in given.items():
            if fqn not in self.leaves:
                raise InputError(f"the {kind} hold {fqn}, which is none of the weights that gradients are taken of")
            if tensor.shape != self.leaves[fqn].shape:
                shapes = f"{tuple(tensor.shape)}, the weight is {tuple(self.leaves[fqn].shape)}"
                raise InputError(f"the {kind} of {fqn} are {shapes}: they belong to another model")
            found[self.leaves[fqn]] = tensor
        return found

    def _loss(self, batch: Any, index: int) -> Tensor:
        try:
            result = self._loss_fn(self._copy, own_containers(batch))
        except Exception as error:
            raise CalibrationError(f"the loss function raised {type(error).__name__} on batch {index}: {error}") from error
        return usable_loss(result, index)

    def _arrived(self, leaf: Tensor) -> None:
        """The backward pass has the gradient of a leaf, the sum over the uses of a tied one."""
        gradient = leaf.grad
        assert gradient is not None
        if self._sink is not None:
            self._sink(leaf, gradient)
        elif _sum_dtype(leaf) == leaf.dtype:
            return  # it stays where it is, and the next batch's is added to it in place
        elif leaf in self._sums:
            self._sums[leaf].add_(gradient)
        else:
            self._sums[leaf] = gradient.to(_sum_dtype(leaf))
        leaf.grad = None

    def _collect(self, count: int, mean_loss: float) -> Gradients:
        by_leaf: dict[Tensor, Tensor] = {}
        unused = []
        for fqn, leaf in self.leaves.items():
            gradient = self.gradient_sum(fqn)
            if gradient is None:
                unused.append(fqn)
                by_leaf.setdefault(leaf, torch.zeros_like(leaf, dtype=_sum_dtype(leaf), requires_grad=False))
            elif leaf not in by_leaf:
                gradient.div_(count)
                if not bool(torch.isfinite(gradient).all()):
                    raise CalibrationError(
                        f"the gradient of {fqn} holds NaN or infinity, though the losses are finite: it cannot rank weights. "
                        f"Check the calibration data, or take gradients in float32"
                    )
                by_leaf[leaf] = self.masked(leaf, gradient)
        return Gradients({fqn: by_leaf[leaf] for fqn, leaf in self.leaves.items()}, count, mean_loss, tuple(unused))


def _call(method: Callable[[], Callable[[Tensor], None] | None], leaf: Tensor) -> None:
    """Call a weakly held method."""
    function = method()
    if function is not None:
        function(leaf)


def _weight(module: nn.Module, fqn: str) -> Tensor:
    owner, _, leaf = fqn.rpartition(".")
    try:
        found = getattr(module.get_submodule(owner), leaf)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise InputError(f"{type(module).__name__} has no parameter or buffer called {fqn!r} to take a gradient of")
    if not found.is_floating_point():
        raise InputError(f"{fqn} is of type {found.dtype}: there is no gradient of it. Leave it out with ignore=[{fqn!r}]")
    return found


def _replacements(module: nn.Module, chosen: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Tensor of the module -> what stands for it in the copy: a leaf in the same memory. Only chosen ones ask for a gradient.

    Parameters that are different objects in the same place count as tied: they are one weight.
    """
    wanted = {_place(tensor) for tensor in chosen}
    leaves: dict[tuple[Any, ...], Tensor] = {}
    found: dict[Tensor, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        place = _place(tensor)
        if place in wanted or tensor.requires_grad or tensor.is_inference():
            if place not in leaves:
                memory = tensor.detach()
                memory = memory.clone() if memory.is_inference() else memory
                leaves[place] = nn.Parameter(memory, requires_grad=place in wanted)
            found[tensor] = leaves[place]
    return found


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return storage_address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _sum_dtype(leaf: Tensor) -> torch.dtype:
    return torch.float64 if leaf.dtype == torch.float64 else torch.float32


def _set_mode(module: nn.Module, training: bool, watcher: KeepingState) -> None:
    """Training by the module's own ``train``, which may hold parts of it in eval mode; eval mode for every part."""
    if training:
        with torch.inference_mode(False), watcher:
            module.train()
        watcher.state.restore()
    else:
        for item in module.modules():
            if item.training:
                item.training = False
