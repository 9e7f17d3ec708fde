"""How much worse than the dense model a pruned one is: by its outputs on calibration batches, or by the user's own measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfcompile.errors import CalibrationError, InputError
from mfcompile.inputs import ExampleInputs, normalize_inputs, output_tensors

LOSSES = ("cos", "kl")
"""1 - cosine of a sample's output and the dense model's; or the divergence of the softmax over the last axis, in nats."""

Loss = Callable[[nn.Module], float]
"""Takes a module, and says how much worse than the dense one it is; 0 for as good."""


def calibration_inputs(module: nn.Module, batches: Iterable[Any], num_samples: int | None = None) -> list[ExampleInputs]:
    """Batches as inputs of a module, at most about a number of samples.

    Args:
        module: whose forward takes them.
        batches: in any form that ``capture`` takes.
        num_samples: stop after the batch that reaches it; None takes all.

    Raises:
        CalibrationError: there is none.
        InputError: one does not fit the forward.
    """
    found: list[ExampleInputs] = []
    samples = 0
    for index, batch in enumerate(batches):
        found.append(normalize_inputs(module, batch, what=f"calibration batch {index}"))
        samples += found[-1].batch_size() or 1
        if num_samples is not None and samples >= num_samples:
            break
    if not found:
        raise CalibrationError("there is no calibration batch, and the search compares models on them. Give at least one")
    return found


class OutputLoss:
    """How far the outputs of a pruned model are from those of the dense one: the mean over outputs and samples.

    Where an output lists tokens and those that were dropped are zero, they are not compared: what reads them is.

    Args:
        dense: the model that others are compared with.
        batches: what both are run on.
        kind: one of ``LOSSES``.
        outputs: names of the outputs to compare; None for all float ones.

    Raises:
        InputError: there is no such loss or output, or the model cannot run a batch.
    """

    def __init__(
        self, dense: nn.Module, batches: Sequence[ExampleInputs], kind: str = "cos", outputs: Sequence[str] | None = None
    ) -> None:
        if kind not in LOSSES:
            raise InputError(f"loss={kind!r} is not known; choose one of {', '.join(LOSSES)}, or give evaluate=")
        self._distance = {"cos": _cosine_distances, "kl": _divergences}[kind]
        self._batches = batches
        self._wanted = [self._run(dense, index) for index in range(len(batches))]
        known = [name for name, tensor in self._wanted[0].items() if tensor.is_floating_point()]
        unknown = [name for name in outputs or () if name not in known]
        if unknown or not known:
            what = f"there is no output {unknown[0]!r}" if unknown else "there is no output of floats"
            raise InputError(f"{what} to compare models by; the outputs of {type(dense).__name__} are {', '.join(known)}")
        self.outputs = tuple(outputs or known)

    def __call__(self, module: nn.Module) -> float:
        """0 where every output is the dense one's."""
        distances = []
        for index, wanted in enumerate(self._wanted):
            found = self._run(module, index)
            for name in self.outputs:
                distances.append(self._distance(*_compared(found[name].double(), wanted[name].double())))
        return float(torch.cat(distances).mean())

    def _run(self, module: nn.Module, index: int) -> dict[str, Tensor]:
        try:
            with torch.inference_mode():
                return output_tensors(self._batches[index].call(module))
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self._batches[index].tensors().items())
            why = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"calibration batch {index} ({shapes}) does not run: {type(error).__name__}: {why}. Tokens are cut in a "
                f"program whose lengths are those of the example inputs: give batches of these lengths"
            ) from error


def evaluation_loss(evaluate: Callable[[Any], Any], dense: nn.Module) -> Loss:
    """What a user's measure, of which more is better, says to a pruned model: how much less than for the dense one.

    Args:
        evaluate: takes a module, and gives a number or a mapping of names to numbers, of which the mean is taken.
        dense: the model that others are compared with.

    Raises:
        InputError: ``evaluate`` failed or gave no number.
    """
    from mfcompile.metrics import evaluated

    def score(module: nn.Module, what: str) -> float:
        values: Mapping[str, float] = evaluated(evaluate, module, what)
        if not values:
            raise InputError("evaluate gave no number; it must return one, or a dict from metric names to numbers")
        return sum(values.values()) / len(values)

    best = score(dense, "dense")
    return lambda module: best - score(module, "pruned")


def _compared(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """What of an output is compared: all but tokens that were dropped, whose rows are zero along the last axis."""
    if found.shape != wanted.shape:
        raise InputError(f"an output of {tuple(wanted.shape)} became one of {tuple(found.shape)}: they cannot be compared")
    if found.ndim < 3:
        return found, wanted
    is_left = (found != 0).any(dim=-1, keepdim=True)
    return found, wanted * (is_left | ~is_left.flatten(1).any(dim=1).view(-1, *[1] * (found.ndim - 1)))


def _cosine_distances(found: Tensor, wanted: Tensor) -> Tensor:
    """(samples,) 1 - cosine; of single numbers, (1,) over all samples."""
    rows = (-1,) if found.ndim == 0 or found[0].numel() == 1 else (found.shape[0], -1)
    own, other = found.reshape(*rows), wanted.reshape(*rows)
    own, other = (own[None], other[None]) if own.ndim == 1 else (own, other)
    both_zero = (own == 0).all(dim=1) & (other == 0).all(dim=1)
    return torch.where(both_zero, 0.0, 1 - F.cosine_similarity(own, other, dim=1, eps=1e-30))


def _divergences(found: Tensor, wanted: Tensor) -> Tensor:
    """(rows,) KL(dense || pruned) of the softmax over the last axis."""
    own, other = (F.log_softmax(item.reshape(-1, item.shape[-1] if item.ndim else 1), dim=-1) for item in (found, wanted))
    return F.kl_div(own, other, reduction="none", log_target=True).sum(dim=-1)
