"""Inputs for an ONNX file that came without any: made up from the types that it declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
        inputs = {name: _draw(name, declared[name], image_size, tables, generator) for name in file.input_names}
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


_KEEPS_INDICES = frozenset(
    {"Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Transpose", "Clip", "Where"}
)
