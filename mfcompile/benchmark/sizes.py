"""Inputs of several sizes for one ONNX graph: which of its dimensions are free, and examples brought to those sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mfcompile.benchmark.result import InputSize
from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs

DEFAULT_TOKENS = (1, 8, 32, 197)
"""Lengths that are measured where the graph leaves them free: one token of a decoder, few, a short text, the patches of an
image of 224 pixels."""

IMAGE_RANK = 4
"""Inputs of this rank and above are images or volumes: their free sizes are pixels, and stay as in the example."""


@dataclass(frozen=True)
class FreeAxes:
    """The dimensions that a graph leaves free.

    Attributes:
        batch: input -> axes that are the batch: the first axis, and whatever has the name of one.
        tokens: input -> further free axes of inputs that are no images.
    """

    batch: Mapping[str, tuple[int, ...]]
    tokens: Mapping[str, tuple[int, ...]]


def free_axes(declared: Mapping[str, Sequence[int | str | None]]) -> FreeAxes:
    """Tell batch from tokens.

    Args:
        declared: input name -> its dimensions as onnxruntime gives them: a number, or a name or None where it is free.
    """
    names = {shape[0] for shape in declared.values() if shape and isinstance(shape[0], str)}
    batch: dict[str, tuple[int, ...]] = {}
    tokens: dict[str, tuple[int, ...]] = {}
    for name, shape in declared.items():
        free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        own = tuple(axis for axis in free if axis == 0 or shape[axis] in names)
        rest = tuple(axis for axis in free if axis not in own)
        if own:
            batch[name] = own
        if rest and len(shape) < IMAGE_RANK:
            tokens[name] = rest
    return FreeAxes(batch, tokens)


def declared_shapes(session: Any) -> dict[str, tuple[int | str | None, ...]]:
    """Input name -> dimensions of a session's graph."""
    return {node.name: tuple(node.shape) for node in session.get_inputs()}


def resize(inputs: ExampleInputs, axes: FreeAxes, batch: int | None, tokens: int | None) -> ExampleInputs:
    """The inputs with their free axes brought to a size, what is there cut off or repeated.

    Args:
        inputs: examples; what no axis is free of stays as it is.
        axes: what ``free_axes`` gave.
        batch: length of the batch axes; None leaves them.
        tokens: length of the token axes; None leaves them.

    Raises:
        InputError: an input that should grow is empty there.
    """

    def change(name: str, tensor: Tensor) -> Tensor:
        for wanted, own in ((batch, axes.batch.get(name, ())), (tokens, axes.tokens.get(name, ()))):
            if wanted is None:
                continue
            for axis in own:
                if tensor.shape[axis] == 0:
                    raise InputError(
                        f"input {name} {tuple(tensor.shape)} is empty along axis {axis}: give an example that is not"
                    )
                tensor = tensor.index_select(axis, torch.arange(wanted) % tensor.shape[axis])
        return tensor

    return inputs.map_tensors(change)


@dataclass(frozen=True)
class SizedInputs:
    """Inputs of one size."""

    size: InputSize
    inputs: ExampleInputs


def sized_inputs(
    inputs: ExampleInputs, axes: FreeAxes, batches: Sequence[int], tokens: Sequence[int] | None
) -> tuple[list[SizedInputs], list[str]]:
    """Inputs of every size that is asked for and that the graph takes.

    Args:
        inputs: examples.
        axes: the free axes of the graph.
        batches: batch sizes.
        tokens: lengths; empty for that of the examples, None for ``DEFAULT_TOKENS`` where they are free.

    Returns:
        The inputs, and notes about what is fixed.

    Raises:
        InputError: a size under 1, or one that is there twice.
    """
    for what, sizes in (("batch", batches), ("tokens", tokens or ())):
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise InputError(f"{what}: sizes must be whole numbers from 1, got {', '.join(map(str, sizes))}")
        if len(set(sizes)) < len(sizes):
            raise InputError(f"{what}: a size is there twice: {', '.join(map(str, sizes))}")
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.tensors().items()}
    notes = []
    wanted_batches: Sequence[int | None] = batches or (None,)
    if not axes.batch:
        if list(batches) not in ([], [1]):
            notes.append(f"the graph fixes its batch size: {_shapes(shapes)} is what was measured")
        wanted_batches = (None,)
    wanted_tokens: Sequence[int | None] = (DEFAULT_TOKENS if tokens is None else tokens) or (None,)
    if not axes.tokens:
        notes.append(
            f"the graph leaves no sequence length free, so there is one number of tokens, that of {_shapes(shapes)}; vary the "
            f"batch instead"
        )
        wanted_tokens = (None,)
    found = []
    for batch in wanted_batches:
        for count in wanted_tokens:
            resized = resize(inputs, axes, batch, count)
            found.append(SizedInputs(_size(resized, axes), resized))
    return found, notes


def _size(inputs: ExampleInputs, axes: FreeAxes) -> InputSize:
    tensors = inputs.tensors()

    def common(own: Mapping[str, tuple[int, ...]]) -> int | None:
        sizes = {tensors[name].shape[axis] for name, places in own.items() if name in tensors for axis in places}
        return int(sizes.pop()) if len(sizes) == 1 else None

    return InputSize(common(axes.batch), common(axes.tokens), {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def with_inputs_of(inputs: ExampleInputs, names: Sequence[str]) -> ExampleInputs:
    """Only the inputs that a graph has.

    Raises:
        InputError: the graph has an input that the examples lack.
    """
    tensors = inputs.tensors()
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(
            f"the graph needs {', '.join(missing)}, but the inputs are {', '.join(tensors)}. Give an array of that name"
        )
    chosen = {name: tensors[name] for name in names}
    return replace(inputs, args=(), kwargs=chosen, names=tuple(chosen))


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
