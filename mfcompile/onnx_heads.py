"""Models of ONNX files without the values of some initializers, byte for byte what the files say beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mfcompile.onnx_wire import (
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    TENSOR_EXTERNAL,
    TENSOR_LOCATION,
    TENSOR_RAW_DATA,
    VALUE_FIELDS,
    FileRecord,
    MappedFile,
    TensorRecord,
    field_bytes,
    read_fields,
    varint,
)


def skeleton(record: FileRecord, stripped: frozenset[str]) -> bytes:
    """The model without the values of some initializers: they are said to be external, at a place that is none.

    Args:
        record: the file.
        stripped: names of initializers; other external ones are put inside.
    """

    def header(buffer: memoryview, tensor: TensorRecord) -> bytes | None:
        if tensor.name in stripped:
            return _outside(buffer, tensor, {"location": "given in memory"})
        return None if tensor.external is None else _brought_inside(buffer, tensor)

    return _with_headers(record, header)


def mapped_head(record: FileRecord, mapped: frozenset[str]) -> bytes:
    """The model without the values of some initializers: they are said to be external data, in the .onnx file itself.

    Args:
        record: the file.
        mapped: names of initializers whose values are in the file as plain numbers.
    """

    def header(buffer: memoryview, tensor: TensorRecord) -> bytes | None:
        if tensor.name not in mapped or tensor.values is None:
            return None
        start, stop = tensor.values
        place = {"location": record.path.name, "offset": str(start), "length": str(stop - start)}
        return _outside(buffer, tensor, place)

    return _with_headers(record, header)


def _with_headers(record: FileRecord, header: Callable[[memoryview, TensorRecord], bytes | None]) -> bytes:
    """The model with other TensorProtos in place of initializers; None leaves one as it is."""
    with MappedFile(record.path) as buffer:
        parts: list[bytes] = []
        by_start = {item.outer.start: item for item in record.tensors.values() if not item.is_constant_node}
        for item in record.graph_fields:
            tensor = by_start.get(item.start)
            found = None if tensor is None else header(buffer, tensor)
            if found is None:
                parts.append(bytes(buffer[item.start : item.end]))
            else:
                parts.append(field_bytes(GRAPH_INITIALIZER, found))
        graph = field_bytes(MODEL_GRAPH, b"".join(parts))
        return bytes(buffer[: record.graph.start]) + graph + bytes(buffer[record.graph.end :])


def _without_values(buffer: memoryview, tensor: TensorRecord) -> bytes:
    """A TensorProto without its values and their place."""
    dropped = VALUE_FIELDS | {TENSOR_EXTERNAL, TENSOR_LOCATION}
    fields = read_fields(buffer, *tensor.body)
    return b"".join(bytes(buffer[item.start : item.end]) for item in fields if item.number not in dropped)


def _outside(buffer: memoryview, tensor: TensorRecord, place: Mapping[str, str]) -> bytes:
    entries = (field_bytes(1, key.encode()) + field_bytes(2, text.encode()) for key, text in place.items())
    external = b"".join(field_bytes(TENSOR_EXTERNAL, entry) for entry in entries)
    return _without_values(buffer, tensor) + external + varint(TENSOR_LOCATION << 3) + varint(1)


def _brought_inside(buffer: memoryview, tensor: TensorRecord) -> bytes:
    place = tensor.external
    assert place is not None  # only external tensors are brought inside
    with place.path.open("rb") as file:
        file.seek(place.offset)
        values = file.read(place.length if place.length >= 0 else -1)
    return _without_values(buffer, tensor) + field_bytes(TENSOR_RAW_DATA, values)
