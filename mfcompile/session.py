"""Sessions of stock onnxruntime, and the tensors that go in and out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs
from mfcompile.session_options import load_error, session_options

# onnxruntime's names of element types, and the torch dtypes that they are.
TORCH_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def open_session(path: Path | str, threads: int | None = None, library: str | None = None) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU.

    Args:
        path: an .onnx file.
        threads: threads inside one operator; None leaves the choice to onnxruntime.
        library: path of a library of custom operators to register, None for stock onnxruntime.

    Raises:
        InputError: there is no such file, or onnxruntime cannot load it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no ONNX file at {path}")
    try:
        return onnxruntime.InferenceSession(str(path), session_options(threads, library), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise load_error(path, error) from error


def make_feeds(session: onnxruntime.InferenceSession, inputs: ExampleInputs) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What to feed the session: every input of the graph, in the dtype that the graph declares.

    Returns:
        input name -> OrtValue, and the names of the example inputs that the graph does not have.

    Raises:
        InputError: the graph has an input that the examples lack, or of a type that is no tensor.
    """
    tensors = inputs.tensors()
    feeds: dict[str, Any] = {}
    for node in session.get_inputs():
        if node.name not in tensors:
            raise InputError(f"the ONNX graph needs input {node.name}, but the inputs are {', '.join(tensors)}")
        if node.type not in TORCH_DTYPES:
            raise InputError(f"input {node.name} of the ONNX graph is a {node.type}, which cannot be fed")
        feeds[node.name] = ort_value(tensors[node.name].detach().cpu().to(TORCH_DTYPES[node.type]))
    return feeds, tuple(name for name in tensors if name not in feeds)


def run_session(session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> dict[str, Tensor]:
    """Output name -> tensor on the CPU, sharing no memory with the session."""
    names = [node.name for node in session.get_outputs()]
    values = session.run_with_ort_values(names, feeds)
    return {name: _from_ort(value) for name, value in zip(names, values, strict=True)}


def ort_value(tensor: Tensor) -> Any:
    """A tensor on the CPU for onnxruntime; it shares memory with the tensor where that is contiguous."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(np.array(value.numpy()))
