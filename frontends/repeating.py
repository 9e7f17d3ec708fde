"""Does a model give the same twice? State that it keeps between calls and numbers that it draws are found and said."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfcompile.frontends.recorder import Recording
from mfcompile.inputs import ExampleInputs, output_tensors
from mfcompile.undisturbed import undisturbed

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


def _run(module: nn.Module, inputs: ExampleInputs) -> dict[str, Tensor]:
    with undisturbed(module):
        found = output_tensors(inputs.map_tensors(lambda _, tensor: tensor.clone()).call(module))
        return {name: tensor.clone() for name, tensor in found.items()}


def _differing(first: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the outputs that are missing or differ."""
    return [name for name, tensor in first.items() if name not in other or not _agree(tensor, other[name])]


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_complex():
        one, other = one.double(), other.double()
    return torch.allclose(one, other, rtol=RTOL, atol=ATOL, equal_nan=True)
