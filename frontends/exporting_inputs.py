"""Inputs of an export: which dimensions are wanted free, which are, and other values to check a program on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mfcompile.inputs import ExampleInputs, slice_batch

Axes = dict[str, dict[int, str]]


def wanted_axes(inputs: ExampleInputs) -> Axes:
    """Input name -> dimension -> axis name: dimension 0 is the batch where all inputs agree, dimension 1 of integer inputs
    is a sequence, shared by every input that has that size there.
    """
    tensors = inputs.tensors()
    axes: Axes = {name: {} for name in tensors}
    if inputs.batch_size() is not None:
        for name, tensor in tensors.items():
            if tensor.ndim:
                axes[name][0] = "batch"
    lengths: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and not tensor.is_floating_point() and 0 in axes[name]:
            axis = lengths.setdefault(tensor.shape[1], "sequence" if not lengths else f"sequence_{len(lengths)}")
            axes[name][1] = axis
    return {name: dims for name, dims in axes.items() if dims}


def only_axes(axes: Axes, wanted: str) -> Axes:
    """The dimensions that have this axis name."""
    kept = {name: {dim: axis for dim, axis in dims.items() if axis == wanted} for name, dims in axes.items()}
    return {name: dims for name, dims in kept.items() if dims}


def symbolic_axes(program: ExportedProgram, inputs: ExampleInputs, axes: Axes) -> Axes:
    """The wanted axes that the program really leaves free."""
    values = _placeholder_values(program, inputs)
    kept: Axes = {}
    for name, dims in axes.items():
        free = {dim: axis for dim, axis in dims.items() if name in values and _is_free(values[name].shape[dim])}
        if free:
            kept[name] = free
    return kept


def fixed_axes(program: ExportedProgram, inputs: ExampleInputs, axes: Axes, why: str) -> tuple[str, ...]:
    """A note for each wanted axis that the program fixes."""
    kept = symbolic_axes(program, inputs, axes)
    tensors = inputs.tensors()
    return tuple(
        f"dimension {dim} ({axis}) of {name} is fixed to {tensors[name].shape[dim]}: {why}"
        for name, dims in axes.items()
        for dim, axis in dims.items()
        if dim not in kept.get(name, {})
    )


def two_samples(inputs: ExampleInputs) -> ExampleInputs:
    """A batch of one is repeated to two: torch.export takes a size of one for a constant."""
    return slice_batch(inputs, [0, 0]) if inputs.batch_size() == 1 else inputs


def redraw(inputs: ExampleInputs, *, rows: bool = True, seed: int = 0) -> ExampleInputs:
    """Other values with the statistics of the example: float inputs are drawn anew, samples of the others swap places.

    Args:
        inputs: the example.
        rows: False leaves every input alone that is not of floats.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = inputs.batch_size() if rows else None

    def change(_: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and torch.unique(tensor).numel() > 2:  # fewer values are a mask or a flag
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            return noise * tensor.std() + tensor.mean()
        return tensor.roll(1, 0) if batch is not None and tensor.ndim else tensor

    return inputs.map_tensors(change)


def _is_free(size: Any) -> bool:
    """A size that is still a symbol; a SymInt may have become a number on the way."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _placeholder_values(program: ExportedProgram, inputs: ExampleInputs) -> dict[str, Tensor]:
    users = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[name].meta["val"] for name in users if isinstance(nodes[name].meta.get("val"), Tensor)]
    return dict(zip(inputs.names, values, strict=True))
