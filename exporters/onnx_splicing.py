"""Files put together from pieces of another file and new bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.onnx_wire import (
    GRAPH_INITIALIZER,
    FileRecord,
    TensorRecord,
    field_bytes,
    read_fields,
    varint,
)


@dataclass(frozen=True)
class Later:
    """Bytes that are made when they are written, so that one tensor at a time is in memory.

    Attributes:
        length: how many.
        load: makes them.
    """

    length: int
    load: Callable[[], bytes]


Chunk: TypeAlias = "tuple[int, int] | bytes | Later"
"""[start, stop) of the original file, or new bytes."""

_EXTERNAL_FIELD = 13
_COPY_BYTES = 1 << 24
_ALIGNMENT, _PAGE, _PAGED_BYTES = 64, 4096, 1 << 20


@dataclass(frozen=True)
class FileChunks:
    """A message with one nested message, in pieces.

    Attributes:
        buffer: the original file.
        before, after: the fields around the nested message.
        number: its field number.
        inside: its fields.
    """

    buffer: memoryview
    before: Sequence[Chunk]
    number: int
    inside: Sequence[Chunk]
    after: Sequence[Chunk]


def write_chunks(chunks: FileChunks, path: Path) -> None:
    """Write the pieces, with the length of the nested message as it is now."""
    length = sum(_length(item) for item in chunks.inside)
    tag = varint(chunks.number << 3 | 2) + varint(length)
    with path.open("wb") as file:
        for item in (*chunks.before, tag, *chunks.inside, *chunks.after):
            if isinstance(item, tuple):
                file.write(chunks.buffer[item[0] : item[1]])
            else:
                file.write(_made(item) if isinstance(item, Later) else item)


def _length(chunk: Chunk) -> int:
    if isinstance(chunk, tuple):
        return chunk[1] - chunk[0]
    return chunk.length if isinstance(chunk, Later) else len(chunk)


def _made(item: Later) -> bytes:
    data = item.load()
    if len(data) != item.length:
        raise ValueError(f"{len(data)} bytes were made; {item.length} were planned")
    return data


def as_array(weight: Tensor) -> NDArray[np.generic]:
    """A weight as numpy has it; the memory is shared."""
    plain = weight.detach()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[np.generic] = plain.numpy()
    return array


def masked_bytes(weight: Tensor, mask: Tensor) -> bytes:
    """The values of a weight with +0.0 at pruned places, as a file stores them.

    Args:
        weight: any shape and float dtype; not changed.
        mask: bool of the same shape, 1 = kept.
    """
    masked = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype)).contiguous()
    return masked.reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class DataFile:
    """The files beside an .onnx file: copies with other values in place, or moved together without what was replaced.

    Attributes:
        record: the original.
        values: gives the new values of a tensor, None for those it has.
        is_moved: tensors change places.
        places: tensor -> its new offset, where tensors change places.
        ends: location -> the end of its file so far.
        added: (location, offset, values) of new tensors.
    """

    record: FileRecord
    values: Callable[[TensorRecord], bytes | None]
    is_moved: bool
    places: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    added: list[tuple[str, int, Later]] = field(default_factory=list)

    @classmethod
    def same(cls, record: FileRecord, values: Callable[[TensorRecord], bytes | None]) -> DataFile:
        """Every tensor stays at its place."""
        return cls(record, values, is_moved=False)

    @classmethod
    def plan(cls, record: FileRecord, dropped: Collection[str], values: Callable[[TensorRecord], bytes | None]) -> DataFile:
        """The tensors that are left move together, in their order."""
        found = cls(
            record, values, is_moved=True, ends=dict.fromkeys((_location(record, path) for path in record.data_files), 0)
        )
        kept = [item for item in record.tensors.values() if item.external is not None and item.name not in dropped]
        for item in sorted(kept, key=lambda item: item.external.offset if item.external else 0):
            assert item.external is not None  # selected above
            found.places[item.name] = found._reserve(_location(record, item.external.path), external_length(item))
        return found

    def append(self, data: Later) -> tuple[str, int]:
        """Put new bytes at the end of the first data file; where they are."""
        location = next(iter(self.ends))
        offset = self._reserve(location, data.length)
        self.added.append((location, offset, data))
        return location, offset

    def write(self, folder: Path) -> None:
        """Write all data files into a folder."""
        for source in self.record.data_files:
            location = _location(self.record, source)
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            tensors = [
                item for item in self.record.tensors.values() if item.external is not None and item.external.path == source
            ]
            tensors.sort(key=lambda item: item.external.offset if item.external else 0)
            with source.open("rb") as original, (folder / location).open("wb") as target:
                if self.is_moved:
                    self._write_moved(tensors, location, original, target)
                else:
                    self._write_in_place(tensors, original, target)

    def _write_in_place(self, tensors: Sequence[TensorRecord], original: BinaryIO, target: BinaryIO) -> None:
        """The bytes of the original, with those of masked tensors exchanged on the way."""
        for item in tensors:
            values = self.values(item)
            if values is not None:
                assert item.external is not None  # external tensors only
                _copy(original, target, item.external.offset - target.tell())
                target.write(values)
                original.seek(target.tell())
        _copy(original, target, None)

    def _write_moved(self, tensors: Sequence[TensorRecord], location: str, original: BinaryIO, target: BinaryIO) -> None:
        """The tensors that are left at their new places, and the new ones."""
        for item in tensors:
            if item.name in self.places:
                assert item.external is not None  # external tensors only
                values = self.values(item)
                original.seek(item.external.offset)
                target.seek(self.places[item.name])
                if values is None:
                    _copy(original, target, external_length(item))
                else:
                    target.write(values)
        for where, offset, data in self.added:
            if where == location:
                target.seek(offset)
                target.write(_made(data))

    def _reserve(self, location: str, length: int) -> int:
        alignment = _PAGE if length >= _PAGED_BYTES else _ALIGNMENT
        offset = -(-self.ends[location] // alignment) * alignment
        self.ends[location] = offset + length
        return offset


def _copy(original: BinaryIO, target: BinaryIO, length: int | None) -> None:
    """Copy so many bytes from where the original is, all that are left where None is given."""
    left = length
    while left is None or left > 0:
        block = original.read(_COPY_BYTES if left is None else min(left, _COPY_BYTES))
        if not block:
            return
        target.write(block)
        left = None if left is None else left - len(block)


def external_length(tensor: TensorRecord) -> int:
    """Bytes of an external tensor; the rest of its file where the file does not say."""
    place = tensor.external
    assert place is not None  # external tensors only
    return place.length if place.length >= 0 else place.path.stat().st_size - place.offset


def moved_tensor(buffer: memoryview, tensor: TensorRecord, data: DataFile) -> bytes:
    """The field of an initializer whose external values have another offset now."""
    kept = b"".join(
        bytes(buffer[item.start : item.end]) for item in read_fields(buffer, *tensor.body) if item.number != _EXTERNAL_FIELD
    )
    assert tensor.external is not None  # external tensors only
    place = {
        "location": _location(data.record, tensor.external.path),
        "offset": str(data.places[tensor.name]),
        "length": str(external_length(tensor)),
    }
    for key, value in place.items():
        kept += field_bytes(_EXTERNAL_FIELD, field_bytes(1, key.encode()) + field_bytes(2, value.encode()))
    return field_bytes(GRAPH_INITIALIZER, kept)


def _location(record: FileRecord, path: Path) -> str:
    """Name of a data file as the .onnx file gives it."""
    return Path(os.path.relpath(path, record.path.parent)).as_posix()
