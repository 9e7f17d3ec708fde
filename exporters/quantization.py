"""int8 values of linear weights, and how a masked one is stored.

Symmetric, one scale for each output row n of W (N, K)::

    scale[n] = max_k |W[n, k]| / 127,    Wq[n, k] = round(W[n, k] / scale[n]),    W ~ scale[n] Wq[n, k]

so zeros stay exactly zero, and no weight moves by more than scale[n] / 2. This is the symmetric per-channel scheme of
Krishnamoorthi (arXiv 1806.08342, section 2.2). A row of zeros has scale 1.

A masked weight is stored as blocks of 1 or 4 consecutive inputs of an output. A place is a block, counted in row-major order;
gap8 and gap4 are those of ``mfcompile.exporters.packing``, between blocks that keep anything. Bytes per weight, where a
fraction b of the blocks keeps anything: gap8 b (1 + 1 / block), gap4 b (1 + 1 / (2 block)). Blocks of 4 suit weights that were
pruned by the pattern 1x4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mfcompile.errors import ExportError
from mfcompile.exporters.packing import GAP_LIMITS

LARGEST = 127
"""Largest magnitude of a weight; -128 is left out, so that a weight and its negative are stored alike."""

LARGEST_INPUTS = 2**31 // (255 * LARGEST)
"""Inputs of a layer whose sums of products of uint8 and int8 cannot overflow int32."""

BLOCKS = (4, 1)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in int8.

    Attributes:
        values: (N, K) int8 in -127 .. 127.
        scales: (N,) float32, positive.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]

    def dequantized(self) -> NDArray[np.float32]:
        """(N, K) float32: what the layer multiplies by."""
        result: NDArray[np.float32] = self.values.astype(np.float32) * self.scales[:, None]
        return result


@dataclass(frozen=True)
class EncodedInt8:
    """A masked int8 weight as it is stored.

    Attributes:
        encoding: "gap8" or "gap4".
        block: inputs of a place, 1 or 4.
        gaps: (entries,) uint8 for gap8, (entries / 2,) for gap4.
        values: (entries, block) int8.
    """

    encoding: str
    block: int
    gaps: NDArray[np.uint8]
    values: NDArray[np.int8]

    @property
    def stored_bytes(self) -> int:
        """Bytes of gaps and values."""
        return int(self.gaps.nbytes + self.values.nbytes)


def quantize_rows(weight: NDArray[np.floating], name: str = "weight") -> QuantizedWeight:
    """A weight in int8, with a scale for each output.

    Args:
        weight: (N, K), any float dtype; zero where pruned.
        name: for the message.

    Raises:
        ExportError: it is no matrix, has more than 66,311 inputs, or holds NaN or infinity.
    """
    if weight.ndim != 2 or not 0 < weight.shape[1] <= LARGEST_INPUTS:
        raise ExportError(
            f"{name} of shape {weight.shape} cannot be int8: it must be a matrix of 1 to {LARGEST_INPUTS:,} inputs, so that "
            f"sums fit 32 bits. Leave it in floating point"
        )
    wide = weight.astype(np.float32, copy=False)
    largest = np.abs(wide).max(axis=1)
    if not np.isfinite(largest).all():
        raise ExportError(f"{name}: row {int(np.argmin(np.isfinite(largest)))} holds NaN or infinity, which no int8 stands for")
    scales = (largest / np.float32(LARGEST)).astype(np.float32)
    scales[scales == 0] = 1  # nothing but zeros, or numbers too small for float32 to divide by
    values = np.clip(np.rint(wide / scales[:, None]), -LARGEST, LARGEST).astype(np.int8)
    return QuantizedWeight(values, scales)


def encode_int8(values: NDArray[np.int8], *, encoding: str | None = None, block: int | None = None) -> EncodedInt8:
    """An int8 weight in the smallest of the encodings.

    Args:
        values: (N, K); zero is what is not stored.
        encoding: "gap8" or "gap4"; None for the smaller.
        block: 1 or 4; None for the smaller.

    Raises:
        ExportError: blocks of 4 do not fill the inputs, or gap4 has no place left for an even number of entries.
    """
    candidates = []
    for size in (block,) if block is not None else BLOCKS:
        if values.shape[1] % size:
            if block is not None:
                raise ExportError(f"{values.shape[1]} inputs are no whole number of blocks of {size}. Store single weights")
            continue
        candidates += [
            (_entry_bytes(values, name, size), order, name, size)
            for order, name in enumerate(("gap8", "gap4"))
            if encoding in (None, name)
        ]
    _, _, chosen, size = min(candidates)
    return _encode(values, chosen, size)


def decode_int8(encoded: EncodedInt8, shape: tuple[int, int]) -> NDArray[np.int8]:
    """(N, K) int8, zero where nothing is stored."""
    gaps = encoded.gaps
    if encoded.encoding == "gap4":
        gaps = np.stack([gaps >> 4, gaps & 15], axis=1).reshape(-1)
    places = np.zeros((shape[0] * shape[1] // encoded.block, encoded.block), np.int8)
    places[np.cumsum(gaps, dtype=np.int64)] = encoded.values
    return places.reshape(shape)


def _kept_places(values: NDArray[np.int8], block: int) -> NDArray[np.int64]:
    places: NDArray[np.int64] = np.flatnonzero(values.reshape(-1, block).any(axis=1))
    return places


def _entry_count(places: NDArray[np.int64], limit: int) -> int:
    """Entries with those that break a distance over ``limit``; at least one."""
    distances = np.diff(places, prepend=0)
    return max(1, int(places.size + (np.maximum(distances - 1, 0) // limit).sum()))


def _entry_bytes(values: NDArray[np.int8], encoding: str, block: int) -> float:
    count = _entry_count(_kept_places(values, block), GAP_LIMITS[encoding])
    if encoding == "gap8":
        return count * (block + 1)
    return float("inf") if count % 2 and count == values.size // block else (count + count % 2) * (block + 0.5)


def _encode(values: NDArray[np.int8], encoding: str, block: int) -> EncodedInt8:
    rows, limit = values.reshape(-1, block), GAP_LIMITS[encoding]
    places = _kept_places(values, block)
    if places.size == 0:
        places = np.zeros(1, np.int64)
    distances = np.diff(places, prepend=0)
    breaks = np.maximum(distances - 1, 0) // limit
    # A break is a stored block of zeros, `limit` places behind the entry before it.
    steps = distances - breaks * limit
    if breaks.any():
        steps = np.insert(steps, np.repeat(np.arange(steps.size), breaks), limit)
    stored = np.cumsum(steps)
    if encoding == "gap4" and stored.size % 2:
        stored = _with_one_more(stored, rows.shape[0])
        steps = np.diff(stored, prepend=0)
    gaps = steps.astype(np.uint8)
    if encoding == "gap4":
        gaps = (gaps[0::2] << np.uint8(4)) | gaps[1::2]
    return EncodedInt8(encoding, block, gaps, np.ascontiguousarray(rows[stored]))


def _with_one_more(stored: NDArray[np.int64], places: int) -> NDArray[np.int64]:
    """One place more, the first that is not stored."""
    free = np.flatnonzero(stored != np.arange(stored.size))
    index = int(free[0]) if free.size else int(stored.size)
    if index >= places:
        raise ExportError(f"gap4 stores an even number of entries, and all {places} places have one. Use gap8")
    result: NDArray[np.int64] = np.insert(stored, index, index)
    return result
