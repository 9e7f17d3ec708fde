"""Models that remember: what an earlier call made of an input is kept in a Python object, and the input is not read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from mfcompile.errors import CaptureError
from mfcompile.frontends.recorder import Recording, record, replay
from mfcompile.inputs import ExampleInputs

Agrees = Callable[[Tensor, Tensor], bool]


def unread_inputs(recording: Recording) -> tuple[str, ...]:
    """Names of the inputs of which nothing reaches an output, in order; what a value only chose is not seen."""
    live: set[fx.Node] = set()
    # What writes into a tensor counts as an output: the write is an edge from no node to those that read afterwards.
    pending = [node for node in recording.graph_module.graph.nodes if node.op == "output" or _writes(node)]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)
    placeholders = {node.name: node for node in recording.graph_module.graph.nodes if node.op == "placeholder"}
    return tuple(item.name for item in recording.inputs if placeholders[item.node] not in live)


def read_again(
    recording: Recording, inputs: ExampleInputs, second: Callable[[], nn.Module | None], agrees: Agrees
) -> tuple[Recording, nn.Module | None, tuple[str, ...]]:
    """Record once more with other values of the inputs that were not read; a model that remembers them has to compute.

    Args:
        recording: the first recording.
        inputs: the example that it was made with.
        second: makes another object of the model that shares its weights; None where it has none.
        agrees: whether two outputs are the same.

    Returns:
        The second recording with the object that it was made with, and the names of the inputs that only it reads, if it
        gives the same outputs on the example; else the first recording, None and no names.
    """
    unread = unread_inputs(recording)
    changed = {name: _other_values(tensor) for name, tensor in inputs.tensors().items() if name in unread}
    unchanged = recording, None, ()
    module = second() if any(tensor is not None for tensor in changed.values()) else None
    if module is None:
        return unchanged
    try:
        found = record(module, inputs.map_tensors(lambda name, tensor: _or(changed.get(name), tensor)))
    except CaptureError:  # the values of the example were the only ones that it takes
        return unchanged
    read = [name for name in unread if name not in unread_inputs(found)]
    if not read or not _gives(found, inputs, list(recording.outputs.values()), agrees):
        return unchanged
    return replace(found, outputs=recording.outputs), module, tuple(read)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _other_values(tensor: Tensor) -> Tensor | None:
    """The same values at other places, so that tokens stay tokens and masks masks; None where that changes nothing."""
    for dim in range(tensor.ndim - 1, -1, -1):
        flipped = tensor.flip(dim)
        if not torch.equal(flipped, tensor):
            return flipped
    return None


def _or(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one


def _gives(recording: Recording, inputs: ExampleInputs, expected: Sequence[Tensor], agrees: Agrees) -> bool:
    try:
        found = replay(recording.graph_module, inputs)
    except Exception:  # sizes that the other values decided
        return False
    return len(found) == len(expected) and all(agrees(one, other) for one, other in zip(expected, found, strict=True))
