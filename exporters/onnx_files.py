"""Writing an onnx_ir model tensor by tensor, and the exact size that it will have.

A protobuf message is the concatenation of its fields in any order, so the graph without its initializers is
serialised first and the initializers are appended one by one: no more than one tensor is in memory beside the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from mfcompile.exporters.staging import staging_folder

# Field numbers of onnx.proto, with the wire type of length-delimited fields.
MODEL_GRAPH = 7 << 3 | 2
GRAPH_INITIALIZER = 5 << 3 | 2
TENSOR_RAW_DATA = 9 << 3 | 2
TENSOR_DOC_STRING = 12 << 3 | 2

# Protobuf refuses files of 2 GiB; above this the tensors go to a file of their own.
INLINE_LIMIT_BYTES = 1_500_000_000
# What sparse layers store, above which the tensors go to a file of their own (python -m benchmarks.sparse_export: memory).
SPARSE_LIMIT_BYTES = 64 << 20
# Tensors smaller than this stay in the .onnx file, where shape inference can read them.
EXTERNAL_LEAST_BYTES = 1024
# Offsets of tensors: a cache line, and in external files a memory page where a tensor is large enough to be mapped.
ALIGNMENT, PAGE, PAGED_BYTES = 64, 4096, 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One initializer and its place in the artefact.

    Attributes:
        name: of the initializer.
        tensor: the values; read only while it is written.
        header: its TensorProto without the values.
        offset: where it starts in the external file, None when it is inside the .onnx file.
    """

    name: str
    tensor: ir.TensorProtocol
    header: bytes
    offset: int | None

    @property
    def proto_size_bytes(self) -> int:
        """Size of its TensorProto in the .onnx file."""
        if self.offset is not None or not self.tensor.nbytes:
            return len(self.header)
        return len(self.header) + 1 + len(_varint(self.tensor.nbytes)) + self.tensor.nbytes


@dataclass(frozen=True)
class FileLayout:
    """All bytes of an artefact, planned.

    Attributes:
        model_proto: ModelProto without its graph.
        graph_proto: GraphProto without its initializers.
        tensors: the initializers, in order.
        data_size_bytes: size of the external file, 0 when there is none.
    """

    model_proto: bytes
    graph_proto: bytes
    tensors: tuple[StoredTensor, ...]
    data_size_bytes: int

    @property
    def graph_size_bytes(self) -> int:
        """Size of the GraphProto with its initializers."""
        sizes = (tensor.proto_size_bytes for tensor in self.tensors)
        return len(self.graph_proto) + sum(1 + len(_varint(size)) + size for size in sizes)

    @property
    def model_size_bytes(self) -> int:
        """Size of the .onnx file."""
        return len(self.model_proto) + 1 + len(_varint(self.graph_size_bytes)) + self.graph_size_bytes

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return self.model_size_bytes + self.data_size_bytes


def needs_external_data(tensors: Iterable[ir.TensorProtocol]) -> bool:
    """The tensors are too large for one protobuf file (1.5 GB, with room for the graph below the limit of 2 GiB)."""
    return sum(tensor.nbytes for tensor in tensors) > INLINE_LIMIT_BYTES


def saves_memory(sparse_bytes: int) -> bool:
    """External data saves memory worth a second file, where onnxruntime itself loads it: kernels give back what is mapped.

    ``mfcompile.load_session`` needs none (``mfcompile.mapped_tensors``).
    """
    return sparse_bytes > SPARSE_LIMIT_BYTES


def plan_files(model: ir.Model, data_name: str | None) -> FileLayout:
    """Where every byte of the model goes.

    Args:
        model: the model; its initializers are taken out while the rest is serialised, and put back.
        data_name: name of the external file, None to keep everything in the .onnx file.
    """
    values = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    try:
        proto = ir.to_proto(model)
    finally:
        for value in values:
            model.graph.initializers.add(value)
    graph_proto: bytes = proto.graph.SerializeToString()
    proto.ClearField("graph")
    tensors: list[StoredTensor] = []
    end = 0
    for value in values:
        tensor = value.const_value
        assert tensor is not None  # an initializer has values
        assert value.name is not None  # and a name
        offset: int | None = None
        if data_name is not None and tensor.nbytes >= EXTERNAL_LEAST_BYTES:
            offset = _align(end, PAGE if tensor.nbytes >= PAGED_BYTES else ALIGNMENT)
            end = offset + tensor.nbytes
        header = _header(value.name, tensor, None if offset is None else (str(data_name), offset))
        tensors.append(StoredTensor(value.name, tensor, header, offset))
    return _align_inside(FileLayout(proto.SerializeToString(), graph_proto, tuple(tensors), end))


def _align_inside(layout: FileLayout) -> FileLayout:
    """The layout with the values of large tensors that stay in the .onnx file at multiples of ``ALIGNMENT``.

    So they can be read where the file is mapped (``mfcompile.mapped_tensors``). A tensor's header is filled up by blanks in
    its doc_string, which readers do not read. Where tensors begin depends on how many bytes the size of the graph takes.
    """
    for width in range(1, 11):
        place = len(layout.model_proto) + 1 + width + len(layout.graph_proto)
        tensors = []
        for stored in layout.tensors:
            aligned = _align_stored(stored, place)
            size = aligned.proto_size_bytes
            place += 1 + len(_varint(size)) + size
            tensors.append(aligned)
        found = replace(layout, tensors=tuple(tensors))
        if len(_varint(found.graph_size_bytes)) == width:
            return found
    return layout


def _align_stored(stored: StoredTensor, place: int) -> StoredTensor:
    """The tensor with a header after which its values are aligned, where its field of the graph starts at ``place``."""
    size = stored.tensor.nbytes
    if stored.offset is not None or size < EXTERNAL_LEAST_BYTES:
        return stored
    for width in range(1, 11):  # bytes of the size of the whole TensorProto
        end = place + 1 + width + len(stored.header) + 1 + len(_varint(size))
        header = stored.header + _filler(_align(end, ALIGNMENT) - end)
        found = replace(stored, header=header)
        if len(_varint(found.proto_size_bytes)) == width:
            return found
    return stored


def _filler(size: int) -> bytes:
    """A doc_string of blanks that takes ``size`` bytes, or ``ALIGNMENT`` more where one of that size does not exist."""
    if not size:
        return b""
    if size == 1:  # a field takes two bytes at least
        size += ALIGNMENT
    return bytes([TENSOR_DOC_STRING, size - 2]) + b" " * (size - 2)  # below 128: the length is one byte


def write_files(layout: FileLayout, path: Path, data_path: Path | None) -> None:
    """Write what was planned: the .onnx file, and the external file when there is one."""
    with path.open("wb") as file:
        write_model(layout, file)
    if data_path is not None:
        with data_path.open("wb") as file:
            for stored in layout.tensors:
                if stored.offset is not None:
                    file.write(bytes(stored.offset - file.tell()))
                    _write_values(stored.tensor, file)


def write_model(layout: FileLayout, file: BinaryIO) -> None:
    """Write the .onnx file, without its external tensors."""
    file.write(layout.model_proto)
    file.write(bytes([MODEL_GRAPH]) + _varint(layout.graph_size_bytes))
    file.write(layout.graph_proto)
    for stored in layout.tensors:
        file.write(bytes([GRAPH_INITIALIZER]) + _varint(stored.proto_size_bytes) + stored.header)
        if stored.offset is None and stored.tensor.nbytes:
            file.write(bytes([TENSOR_RAW_DATA]) + _varint(stored.tensor.nbytes))
            _write_values(stored.tensor, file)


def data_path(path: Path) -> Path:
    """The file of the external tensors of an .onnx file."""
    return path.with_name(f"{path.name}.data")


def publish_files(
    layout: FileLayout, path: Path, *, has_data_file: bool, check: Callable[[Path], None] | None = None
) -> tuple[Path, ...]:
    """Write what was planned, complete or not at all: in a folder beside the path, then renamed.

    Args:
        layout: all bytes.
        path: the .onnx file; an existing one is replaced.
        has_data_file: the layout has tensors in ``data_path(path)``.
        check: called with the path of the written file before it gets its name; what it raises, nothing is kept of.

    Returns:
        The files.

    Raises:
        InputError, ExportError: see ``staging_folder``.
    """
    data = data_path(path)
    with staging_folder(path) as staging:
        staged, staged_data = staging / path.name, staging / data.name
        write_files(layout, staged, staged_data if has_data_file else None)
        if check is not None:
            check(staged)
        if has_data_file:
            os.replace(staged_data, data)
        os.replace(staged, path)
        if not has_data_file:
            data.unlink(missing_ok=True)  # belonged to the file that was just replaced
    return (path, data) if has_data_file else (path,)


def strip_metadata(model: ir.Model) -> None:
    """Remove what the converter notes for its own debugging (stack traces with paths of the user's machine)."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in _graphs(model):
        graph.metadata_props.clear()
        graph.doc_string = None
        constants = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        for value in (*graph.inputs, *graph.outputs, *constants):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for output in node.outputs:
                output.metadata_props.clear()


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph and every subgraph and function body."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        function.metadata_props.clear()
        yield function
        yield from function.subgraphs()


def _header(name: str, tensor: ir.TensorProtocol, place: tuple[str, int] | None) -> bytes:
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    if place is not None:
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", place[0]), ("offset", str(place[1])), ("length", str(tensor.nbytes))):
            proto.external_data.add(key=key, value=text)
    header: bytes = proto.SerializeToString()
    return header


def _write_values(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    data = tensor.tobytes()
    if len(data) != tensor.nbytes:
        raise ValueError(f"{tensor.name} has {len(data)} bytes; {tensor.nbytes} were planned")
    file.write(data)


def _align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


def _varint(number: int) -> bytes:
    """Protobuf's variable-length integer: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number >= 128:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
