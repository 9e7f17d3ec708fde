"""ONNX files byte by byte: where every stored tensor lies.

A file is read through protobuf's wire format (onnx.proto): fields are copied as the bytes that they are, so whatever is
not touched stays identical, unknown fields and the order of fields included, and no tensor is parsed.

::

    ModelProto  = ... graph(7) = { node(1)*  initializer(5)* ... } ...
    TensorProto = { dims(1)* data_type(2) name(8) raw_data(9) | float_data(4) | double_data(10) | external_data(13)* ... }
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfcompile.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

MODEL_GRAPH, MODEL_METADATA, _MODEL_OPSETS = 7, 14, 8
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
_NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_TENSOR = 1, 5
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, TENSOR_RAW_DATA, _DOUBLE_DATA, TENSOR_EXTERNAL, TENSOR_LOCATION = (
    1,
    2,
    4,
    8,
    9,
    10,
    13,
    14,
)
VALUE_FIELDS = frozenset({4, 5, 6, 7, 9, 10, 11})

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        number, wire: field number and wire type.
        start: where its tag begins.
        payload: where its content begins, after tag and length.
        end: where it ends.
        value: the number, for a varint.
    """

    number: int
    wire: int
    start: int
    payload: int
    end: int
    value: int = 0


@dataclass(frozen=True)
class ExternalPlace:
    """Where the values of a tensor lie outside of the .onnx file: file, first byte, number of bytes."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class TensorRecord:
    """A stored tensor: an initializer of the main graph, or the value of a Constant node.

    Attributes:
        name: the initializer, or the output of the Constant node.
        data_type: element type, as onnx.TensorProto counts them.
        dims: its shape.
        outer: the field of the graph that holds it.
        body: [start, stop) of its TensorProto.
        values: [start, stop) of its values, where they are in the .onnx file as plain numbers.
        external: where its values are otherwise; None with ``values`` None: in another of protobuf's forms.
        is_constant_node: a Constant node holds it.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    outer: Field
    body: tuple[int, int]
    values: tuple[int, int] | None
    external: ExternalPlace | None
    is_constant_node: bool


@dataclass(frozen=True)
class FileRecord:
    """An ONNX file: its graph's place, its fields, and every stored tensor.

    Attributes:
        path: the .onnx file.
        size: its bytes.
        graph: the field that holds the main graph.
        graph_fields: the fields of that graph, in order.
        tensors: name -> stored tensor.
    """

    path: Path
    size: int
    graph: Field
    graph_fields: tuple[Field, ...]
    tensors: dict[str, TensorRecord]

    def __deepcopy__(self, memo: Any) -> FileRecord:
        return self

    @property
    def data_files(self) -> tuple[Path, ...]:
        """Files beside the .onnx file that hold tensors, in order of first use."""
        return tuple(dict.fromkeys(item.external.path for item in self.tensors.values() if item.external is not None))


class MappedFile:
    """A file as a read-only buffer that costs no memory of its own; for ``with``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> memoryview:
        self._file = self._path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        return self._view

    def __exit__(self, *_: object) -> None:
        self._view.release()
        self._map.close()
        self._file.close()


def read_file(path: Path) -> FileRecord:
    """Find every tensor of an ONNX file.

    Raises:
        InputError: there is no such file, it is no ONNX model, or a file with its tensors is missing or too short.
    """
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty: it is no ONNX file. Copy or export it again")
    with MappedFile(path) as buffer:
        try:
            record = _read(buffer, path)
        except (IndexError, ValueError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read as an ONNX file ({error}): it is damaged, truncated, encrypted, or something else. "
                f"Export it again, or decrypt it first"
            ) from error
    for tensor in record.tensors.values():
        _check_external(record.path, tensor)
    return record


@dataclass(frozen=True)
class FileHead:
    """What an ONNX file says of itself, read without its graph.

    Attributes:
        metadata: its metadata_props.
        opsets: domain -> version of the operator sets that it imports; the standard domain is "".
    """

    metadata: dict[str, str]
    opsets: dict[str, int]


def read_head(path: Path) -> FileHead:
    """Metadata and operator sets of an ONNX file, however large it is.

    Raises:
        InputError: there is no such file, or it is no ONNX model.
    """
    if not path.is_file() or not path.stat().st_size:
        raise InputError(f"there is no ONNX file {path}" + (": it is empty" if path.is_file() else ""))
    head = FileHead({}, {})
    with MappedFile(path) as buffer:
        try:
            for item in read_fields(buffer, 0, len(buffer)):
                if item.number == MODEL_METADATA and item.wire == BYTES:
                    entry = {part.number: str(buffer[part.payload : part.end], "utf-8") for part in _inside(buffer, item)}
                    head.metadata[entry.get(1, "")] = entry.get(2, "")
                elif item.number == _MODEL_OPSETS and item.wire == BYTES:
                    parts = {part.number: part for part in _inside(buffer, item)}
                    domain = str(buffer[parts[1].payload : parts[1].end], "utf-8") if 1 in parts else ""
                    head.opsets["" if domain == "ai.onnx" else domain] = parts[2].value if 2 in parts else 0
        except (IndexError, ValueError) as error:
            raise InputError(f"{path} cannot be read as an ONNX file ({error}): it is damaged or something else") from error
    return head


def _inside(buffer: memoryview, field: Field) -> Iterator[Field]:
    return read_fields(buffer, field.payload, field.end)


def _read(buffer: memoryview, path: Path) -> FileRecord:
    top = list(read_fields(buffer, 0, len(buffer)))
    graphs = [item for item in top if item.number == MODEL_GRAPH and item.wire == BYTES]
    if len(graphs) != 1 or not any(item.number == 1 and item.wire == VARINT for item in top):
        raise ValueError("it holds no model with one graph")
    inside = tuple(read_fields(buffer, graphs[0].payload, graphs[0].end))
    tensors: dict[str, TensorRecord] = {}
    for item in inside:
        if item.wire != BYTES:
            continue
        if item.number == GRAPH_INITIALIZER:
            record = _read_tensor(buffer, item, (item.payload, item.end), path, None)
        elif item.number == GRAPH_NODE:
            constant = _constant_node(buffer, item)
            if constant is None:
                continue
            record = _read_tensor(buffer, item, constant[1], path, constant[0])
        else:
            continue
        tensors[record.name] = record
    return FileRecord(path, len(buffer), graphs[0], inside, tensors)


def read_fields(buffer: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in [start, end).

    Raises:
        ValueError: the bytes are no message.
    """
    place = start
    while place < end:
        tag, payload = read_varint(buffer, place)
        number, wire, value = tag >> 3, tag & 7, 0
        if wire == VARINT:
            value, stop = read_varint(buffer, payload)
        elif wire == FIXED64:
            stop = payload + 8
        elif wire == FIXED32:
            stop = payload + 4
        elif wire == BYTES:
            length, payload = read_varint(buffer, payload)
            stop = payload + length
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if stop > end or not number:
            raise ValueError(f"a field at byte {place} runs past the end")
        yield Field(number, wire, place, payload, stop, value)
        place = stop


def read_varint(buffer: Buffer, place: int) -> tuple[int, int]:
    """A number of protobuf's variable length, and the place behind it."""
    value = shift = 0
    while True:
        byte = buffer[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {place} is too long")


def varint(number: int) -> bytes:
    """A number in protobuf's variable length: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number >= 128:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def field_bytes(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | BYTES) + varint(len(payload)) + payload


def _constant_node(buffer: memoryview, node: Field) -> tuple[str, tuple[int, int]] | None:
    """Output and [start, stop) of the tensor, for a Constant node that holds a tensor."""
    output, place, is_constant, domain = "", None, False, b""
    for item in read_fields(buffer, node.payload, node.end):
        if item.number == _NODE_OP_TYPE:
            is_constant = bytes(buffer[item.payload : item.end]) == b"Constant"
            if not is_constant:
                return None
        elif item.number == _NODE_OUTPUT:
            output = str(buffer[item.payload : item.end], "utf-8")
        elif item.number == _NODE_DOMAIN:
            domain = bytes(buffer[item.payload : item.end])
        elif item.number == _NODE_ATTRIBUTE:
            name = b""
            for part in read_fields(buffer, item.payload, item.end):
                if part.number == _ATTRIBUTE_NAME:
                    name = bytes(buffer[part.payload : part.end])
                elif part.number == _ATTRIBUTE_TENSOR and part.wire == BYTES:
                    found = (part.payload, part.end)
                    place = found if name in (b"", b"value") else place
    return (output, place) if is_constant and place is not None and output and domain in (b"", b"ai.onnx") else None


def _read_tensor(buffer: memoryview, outer: Field, body: tuple[int, int], path: Path, constant: str | None) -> TensorRecord:
    name, data_type, is_external = constant or "", 0, False
    dims: list[int] = []
    values: list[Field] = []
    entries: dict[str, str] = {}
    for item in read_fields(buffer, *body):
        if item.number == _NAME and constant is None:
            name = str(buffer[item.payload : item.end], "utf-8")
        elif item.number == _DATA_TYPE:
            data_type = item.value
        elif item.number == _DIMS:
            dims += [item.value] if item.wire == VARINT else _packed(buffer, item)
        elif item.number in VALUE_FIELDS:
            values.append(item)
        elif item.number == TENSOR_EXTERNAL:
            texts = {
                part.number: str(buffer[part.payload : part.end], "utf-8")
                for part in read_fields(buffer, item.payload, item.end)
            }
            entries[texts.get(1, "")] = texts.get(2, "")
        elif item.number == TENSOR_LOCATION:
            is_external = item.value == 1
    plain = None
    if len(values) == 1 and values[0].number in (TENSOR_RAW_DATA, _FLOAT_DATA, _DOUBLE_DATA) and values[0].wire == BYTES:
        plain = (values[0].payload, values[0].end)
    external = None
    if is_external:
        place = path.parent / entries.get("location", "")
        offset = int(entries.get("offset", "0") or 0)
        length = int(entries["length"]) if entries.get("length") else -1
        external, plain = ExternalPlace(place, offset, length), None
    return TensorRecord(name, data_type, tuple(dims), outer, body, plain, external, constant is not None)


def _packed(buffer: memoryview, field: Field) -> list[int]:
    found, place = [], field.payload
    while place < field.end:
        value, place = read_varint(buffer, place)
        found.append(value)
    return found


def _check_external(path: Path, tensor: TensorRecord) -> None:
    place = tensor.external
    if place is None:
        return
    if not place.path.is_file():
        raise InputError(
            f"{path} keeps the tensor {tensor.name} in {place.path.name}, and there is no such file in {place.path.parent}. "
            f"Put it beside the .onnx file"
        )
    if place.offset + max(place.length, 0) > place.path.stat().st_size:
        raise InputError(
            f"{path} keeps the tensor {tensor.name} in {place.path}, bytes {place.offset} to {place.offset + place.length}, "
            f"but that file ends at {place.path.stat().st_size}: it is truncated. Copy it again"
        )
