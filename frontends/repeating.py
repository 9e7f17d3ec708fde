"""Does a model give the same twice? State that it keeps between calls and numbers that it draws are found and said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.control_flow import eager_code, run_eagerly
from mfcompile.frontends.module_calls import eval_mode
from mfcompile.frontends.recorder import Recording
from mfcompile.inputs import ExampleInputs, output_tensors
from mfcompile.module_copy import KeptState

RTOL, ATOL = 1e-4, 1e-5
"""As for a replay: the same kernels in the same order."""

_LISTED = 3


def find_differences(
    model: nn.Module, second: nn.Module, recording: Recording, inputs: ExampleInputs, seed: int
) -> tuple[str, ...]:
    """Run the model once more, where that is possible without touching it, and say what differs.

    Args:
        model: the user's module.
        second: the module object that was recorded; what it remembers of that run is still in it.
        recording: what the first run gave.
        inputs: the arguments of the call.
        seed: what torch's generator was seeded with before the first run.

    Returns:
        Notes for the user; empty for a model that repeats itself.
    """
    notes = []
    if recording.written:
        more = f" and {len(recording.written) - _LISTED} more" if len(recording.written) > _LISTED else ""
        notes.append(
            f"what {', '.join(recording.written[:_LISTED])}{more} hold before the run: the model writes into them, the graph "
            f"into copies"
        )
    if second is model:  # it could not be copied: another run would leave traces in the user's module
        return tuple(notes)
    torch.manual_seed(seed)
    differing = _differing(recording.outputs, _run(second, inputs))
    if differing:
        notes.append(
            f"a first call: a second one gives another {', '.join(differing[:_LISTED])}, so the model keeps state between "
            f"calls, or draws numbers that torch's seed does not decide"
        )
    return tuple(notes)


class _KeepingState(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Copies what the run is about to write into parameters and buffers, so that it can be put back."""

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = KeptState(module)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_eagerly(func, args, kwargs, self, "the model")
        self.state.before(func, args, kwargs)
        return func(*args, **kwargs)


def _run(module: nn.Module, inputs: ExampleInputs) -> dict[str, Tensor]:
    mode = _KeepingState(module)
    try:
        with eval_mode(module), eager_code(), torch.inference_mode(), mode:
            found = output_tensors(inputs.map_tensors(lambda _, tensor: tensor.clone()).call(module))
            return {name: tensor.clone() for name, tensor in found.items()}
    finally:
        mode.state.restore()


def _differing(first: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the outputs that are missing or differ."""
    return [name for name, tensor in first.items() if name not in other or not _agree(tensor, other[name])]


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_complex():
        one, other = one.double(), other.double()
    return torch.allclose(one, other, rtol=RTOL, atol=ATOL, equal_nan=True)
