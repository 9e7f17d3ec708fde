"""Arrays and tensors as inputs of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs
from mfcompile.onnx_file import ELEMENT_TYPES, OnnxFile


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
