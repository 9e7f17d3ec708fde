"""Inputs of an ONNX file: brought into one form, or made up from the types that the file declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from mfcompile.errors import CaptureError, InputError
from mfcompile.inputs import ExampleInputs
from mfcompile.onnx_file import ELEMENT_TYPES, OnnxFile

BATCH, LENGTH = 2, 8
"""Sizes of free dimensions in inputs that are made up."""

IMAGE_SIZES = (224, 384, 336, 448, 256, 512, 32, 64)
"""Sizes of images that are tried in turn where the file leaves them free."""

_FEW_TYPES = 4


def name_inputs(file: OnnxFile, given: Any, *, what: str) -> ExampleInputs:
    """Arrays or tensors as inputs of the file, in its order and dtypes.

    Args:
        file: the file.
        given: a mapping from input names, a sequence in the order of the inputs, or the one array.
        what: how messages call it.

    Raises:
        InputError: an input is missing, unknown, or does not have the dtype or the sizes that the file declares.
    """
    if isinstance(given, ExampleInputs):
        given = given.tensors()
    if isinstance(given, (Tensor, np.ndarray)):
        given = (given,)
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) > len(file.input_names):
            raise InputError(f"{what} holds {len(given)} tensors, {file.path.name} takes {', '.join(file.input_names)}")
        given = dict(zip(file.input_names, given, strict=False))
    if not isinstance(given, Mapping):
        raise InputError(f"{what} is a {type(given).__name__}: give a dict from input names to arrays or tensors")
    declared = {item.name: item for item in file.proto.graph.input}
    missing = [name for name in file.input_names if name not in given or given[name] is None]
    unknown = [str(name) for name in given if name not in file.input_names]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"names {', '.join(unknown)}, which it does not take"
        raise InputError(f"{what} does not fit {file.path.name}: it {problem}. The inputs are {', '.join(file.input_names)}")
    tensors = {name: _fitting(given[name], declared[name], what) for name in file.input_names}
    return ExampleInputs((), dict(tensors), tuple(tensors))


def _fitting(value: Any, declared: onnx.ValueInfoProto, what: str) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except TypeError as error:
        raise InputError(f"{what}: {declared.name} is a {type(value).__name__}, not an array of numbers") from error
    dtype = ELEMENT_TYPES.get(declared.type.tensor_type.elem_type)
    if dtype is None:
        raise InputError(f"the input {declared.name} is no tensor of numbers: such a file cannot be calibrated")
    if tensor.dtype != dtype:
        if tensor.is_floating_point() and not dtype.is_floating_point:
            raise InputError(f"{what}: {declared.name} is {tensor.dtype}, the file takes {dtype}")
        tensor = tensor.to(dtype)
    if declared.type.tensor_type.HasField("shape"):
        sizes = [item.dim_value or None for item in declared.type.tensor_type.shape.dim]
        fits = len(sizes) == tensor.ndim and all(own in (None, size) for own, size in zip(sizes, tensor.shape, strict=True))
        if not fits:
            shown = [item.dim_param or item.dim_value or "?" for item in declared.type.tensor_type.shape.dim]
            raise InputError(f"{what}: {declared.name} is {tuple(tensor.shape)}, the file takes {tuple(shown)}")
    return tensor


def describe_inputs(inputs: ExampleInputs) -> str:
    """Names and sizes, in one line."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.tensors().items())


def synthesize(file: OnnxFile, seed: int = 0) -> ExampleInputs:
    """Random inputs that the file runs on: images and features are drawn, ids lie within their tables, masks are ones.

    Raises:
        InputError: onnxruntime runs none of those that were tried.
    """
    declared = {item.name: item.type.tensor_type for item in file.proto.graph.input}
    tables = looked_up_rows(file.proto)
    generator = torch.Generator().manual_seed(seed)
    refusal = ""
    for image_size in IMAGE_SIZES:
        inputs = {
            name: _draw(name, declared[name], image_size, tables, generator) for name in file.input_names
        }
        found = ExampleInputs((), inputs, tuple(inputs))
        try:
            file(**inputs)
        except (CaptureError, InputError) as error:
            refusal = refusal or str(error)
            continue
        return found
    raise InputError(
        f"no example inputs could be made up for {file.path.name}: {refusal}. Give some, as calibration data "
        f"(--calibration batches.npz, arrays named {', '.join(file.input_names)}) or as example_inputs"
    )


def _draw(
    name: str, declared: onnx.TypeProto.Tensor, image_size: int, tables: Mapping[str, int], generator: torch.Generator
) -> Tensor:
    dtype = ELEMENT_TYPES.get(declared.elem_type, torch.float32)
    rank = len(declared.shape.dim)
    shape = [_size(item, place, rank, image_size) for place, item in enumerate(declared.shape.dim)]
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        is_mask = rank == 2 and "mask" in name.lower()
        return torch.ones(shape, dtype=dtype) if is_mask else torch.randn(shape, generator=generator).to(dtype)
    rows = tables.get(name)
    if rows is None:
        return torch.ones(shape, dtype=dtype)
    if rows == max(tables.values()) and rows > _FEW_TYPES:
        return torch.randint(min(5, rows - 1), rows, shape, generator=generator).to(dtype)
    if rows <= _FEW_TYPES:
        return torch.zeros(shape, dtype=dtype)
    return (torch.arange(shape[-1]) % rows).expand(shape).to(dtype).clone() if shape else torch.zeros((), dtype=dtype)


def _size(dim: onnx.TensorShapeProto.Dimension, place: int, rank: int, image_size: int) -> int:
    if dim.dim_value:
        return int(dim.dim_value)
    if place == 0:
        return BATCH
    if rank >= 4:
        return 3 if place == rank - 3 else image_size if place >= rank - 2 else 1
    return LENGTH


def looked_up_rows(model: onnx.ModelProto) -> dict[str, int]:
    """Input name -> rows of the smallest stored table that it looks up, through casts and re-arrangements."""
    graph = model.graph
    stored = {item.name: tuple(item.dims) for item in graph.initializer}
    source = {item.name: item.name for item in graph.input if item.name not in stored}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _KEEPS_INDICES and node.input and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
        elif node.op_type in ("Identity", "Cast") and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
        for table, index in _look_ups(node):
            if table in stored and len(stored[table]) == 2 and index in source:
                name = source[index]
                found[name] = min(found.get(name, stored[table][0]), stored[table][0])
    return found


def _look_ups(node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """(table, index) of a node that looks something up."""
    if node.op_type == "Gather":
        yield node.input[0], node.input[1]
    elif node.op_type == "EmbedLayerNormalization":
        yield node.input[2], node.input[0]
        if len(node.input) > 4:
            yield node.input[4], node.input[1]


_KEEPS_INDICES = frozenset({"Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Transpose", "Clip", "Where"})
