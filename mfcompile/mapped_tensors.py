"""One .onnx file as a model whose tensors onnxruntime maps from that file.

onnxruntime reads the tensors of an .onnx file into memory of its own, and keeps it as long as the session lives: beside the
packed weights of sparse layers, which have become something else by then. External data it maps. So the model is given to it
without its tensors, which are said to be external data at the places where they lie in the file.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mfcompile.onnx_heads import mapped_head
from mfcompile.onnx_wire import TensorRecord, read_file

FOLDER_KEY = "session.model_external_initializers_file_folder_path"
"""Option of a session: where the external data of a model that is given as bytes lies."""

MAPPED_BYTES = 1 << 20
"""Files with less than this to map are loaded as they are."""

LEAST_TENSOR_BYTES = 1024
"""Smaller tensors stay in the model, where onnxruntime infers shapes from them."""

ALIGNMENT = 64
"""Kernels of onnxruntime may read tensors of several bytes a number in place; exported files have them at multiples of this."""

_PLAIN_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}  # by onnx.TensorProto


def mapped_model(path: Path, anywhere: Collection[str] = ()) -> bytes | None:
    """The model of an .onnx file without most of its tensors, which are external data that lies in the file.

    Tensors that are not aligned (files of other writers) stay in the model, but for those of bytes.

    Args:
        path: an .onnx file; what onnxruntime is to be told as the folder of the model is its own.
        anywhere: names of tensors of which it is known that they are read from any place: those of sparse layers.

    Returns:
        The model; None where too little would be mapped, or tensors lie in other files already.

    Raises:
        InputError: it is missing, or no ONNX file.
    """
    if path.stat().st_size < MAPPED_BYTES:
        return None
    record = read_file(path)
    mapped = frozenset(name for name, tensor in record.tensors.items() if _is_mapped(tensor, name in anywhere))
    size = sum(_size(tensor) for name, tensor in record.tensors.items() if name in mapped)
    left = sum(_size(tensor) for name, tensor in record.tensors.items() if name not in mapped)
    if record.data_files or size < MAPPED_BYTES or size < left:  # a session keeps a model that was given as bytes
        return None
    return mapped_head(record, mapped)


def _is_mapped(tensor: TensorRecord, is_anywhere: bool) -> bool:
    if tensor.is_constant_node or tensor.values is None or tensor.data_type not in _PLAIN_BYTES:
        return False
    start, stop = tensor.values
    is_placed = is_anywhere or _PLAIN_BYTES[tensor.data_type] == 1 or start % ALIGNMENT == 0
    return is_placed and stop - start >= LEAST_TENSOR_BYTES


def _size(tensor: TensorRecord) -> int:
    start, stop = tensor.values or (0, 0)
    return stop - start
