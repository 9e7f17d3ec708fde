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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mfcompile.errors import ExportError
from mfcompile.exporters.packing import GAP_LIMITS, EncodingPlan

LARGEST = 127
"""Largest magnitude of a weight; -128 is left out, so that a weight and its negative are stored alike."""

LARGEST_INPUTS = 2**31 // (255 * LARGEST)
"""Inputs of a layer whose sums of products of uint8 and int8 cannot overflow int32."""

BLOCKS = (4, 1)
"""Inputs of a place."""

DENSE, GAP8, GAP4 = "int8", "int8-gap8", "int8-gap4"
LIMITS = {GAP8: GAP_LIMITS["gap8"], GAP4: GAP_LIMITS["gap4"]}


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
class Int8Plan(EncodingPlan):
    """How one weight is stored in int8, known from its mask alone.

    Attributes:
        encoding: "int8" (dense), "int8-gap8" or "int8-gap4".
        entries: stored blocks: those that keep anything, and explicit zeros; all weights for dense.
        block: inputs of a place, 1 or 4; 1 for dense.
    """

    block: int = 1

    @property
    def gap_bytes(self) -> int:
        """Bytes of the gaps, 0 for dense."""
        return {DENSE: 0, GAP8: self.entries, GAP4: self.entries // 2}[self.encoding]

    @property
    def stored_bytes(self) -> int:
        """Bytes of gaps, values and scales."""
        return self.gap_bytes + self.entries * self.block + 4 * self.shape[0]

    @property
    def folded_bytes(self) -> int:
        """Bytes of the intermediates that onnxruntime keeps while it folds the decode nodes.

        With n entries and N weights: distances and sums (int32), positions twice (int64), 12 n more for gap4 (codes, halves and
        steps), and the scattered, reshaped and transposed weight.
        """
        if self.encoding == DENSE:
            return 0
        return (24 + 12 * (self.encoding == GAP4)) * self.entries + 3 * self.weight_count


@dataclass(frozen=True)
class EncodedInt8:
    """A masked int8 weight as it is stored.

    Attributes:
        gaps: (entries,) uint8 for gap8, (entries / 2,) for gap4.
        values: (entries, block) int8.
    """

    gaps: NDArray[np.uint8]
    values: NDArray[np.int8]


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


def plan_int8(
    mask: NDArray[np.bool_], *, encodings: Sequence[str] = (DENSE, GAP8, GAP4), blocks: Sequence[int] = BLOCKS
) -> Int8Plan:
    """The smallest encoding of a weight of this mask.

    Args:
        mask: (N, K) bool, 1 = kept.
        encodings: to choose from, in the order in which equals are preferred.
        blocks: to choose from; those that do not fill K are left out.

    Raises:
        ExportError: none of them is possible.
    """
    kept, dtype = int(np.count_nonzero(mask)), np.dtype(np.float32)
    plans = []
    for encoding in encodings:
        for block in (1,) if encoding == DENSE else blocks:
            if mask.shape[1] % block == 0:
                entries = mask.size if encoding == DENSE else _entry_count(mask, encoding, block)
                plans.append(Int8Plan(encoding, entries, np.dtype(np.int8), dtype, mask.shape, kept, block))
    plans = [plan for plan in plans if plan.encoding != GAP4 or plan.entries % 2 == 0]
    if not plans:
        raise ExportError(
            f"a mask of shape {mask.shape} that keeps {kept:,} weights cannot be stored as {' or '.join(encodings)} in blocks "
            f"of {' or '.join(map(str, blocks))}; allow {GAP8} in blocks of 1"
        )
    return min(plans, key=lambda plan: plan.stored_bytes)


def encode_int8(values: NDArray[np.int8], mask: NDArray[np.bool_], plan: Int8Plan) -> EncodedInt8:
    """An int8 weight as ``plan`` says, one of gap8 or gap4.

    Args:
        values: (N, K) int8; zero where pruned.
        mask: (N, K) bool, what the plan was made from.
        plan: of ``plan_int8``.
    """
    limit = LIMITS[plan.encoding]
    places = _kept_places(mask, plan.block)
    if places.size == 0:
        places = np.zeros(1, np.int64)
    distances = np.diff(places, prepend=0)
    # A distance over the limit is broken by stored blocks, ``limit`` places behind the entry before.
    breaks = np.maximum(distances - 1, 0) // limit
    steps = np.insert(distances - breaks * limit, np.repeat(np.arange(distances.size), breaks), limit)
    stored = np.cumsum(steps)
    if stored.size < plan.entries:
        stored = _with_one_more(stored)
        steps = np.diff(stored, prepend=0)
    gaps = steps.astype(np.uint8)
    if plan.encoding == GAP4:
        gaps = (gaps[0::2] << np.uint8(4)) | gaps[1::2]
    return EncodedInt8(gaps, np.ascontiguousarray(values.reshape(-1, plan.block)[stored]))


def decode_int8(encoded: EncodedInt8, plan: Int8Plan) -> NDArray[np.int8]:
    """(N, K) int8, zero where nothing is stored."""
    gaps = encoded.gaps
    if plan.encoding == GAP4:
        gaps = np.stack([gaps >> 4, gaps & 15], axis=1).reshape(-1)
    places = np.zeros((plan.weight_count // plan.block, plan.block), np.int8)
    places[np.cumsum(gaps, dtype=np.int64)] = encoded.values
    return places.reshape(plan.shape)


def _kept_places(mask: NDArray[np.bool_], block: int) -> NDArray[np.int64]:
    """Row-major numbers of the blocks that keep anything."""
    places: NDArray[np.int64] = np.flatnonzero(mask.reshape(-1, block).any(axis=1))
    return places


def _entry_count(mask: NDArray[np.bool_], encoding: str, block: int) -> int:
    """Entries with those that break a distance, and the one that makes them even for gap4 where a place is left."""
    places = _kept_places(mask, block)
    distances = np.diff(places, prepend=0)
    count = max(1, int(places.size + (np.maximum(distances - 1, 0) // LIMITS[encoding]).sum()))
    return count + (encoding == GAP4 and count % 2 == 1 and count < mask.size // block)


def _with_one_more(stored: NDArray[np.int64]) -> NDArray[np.int64]:
    """One place more, the first that is not stored."""
    free = np.flatnonzero(stored != np.arange(stored.size))
    index = int(free[0]) if free.size else int(stored.size)
    result: NDArray[np.int64] = np.insert(stored, index, index)
    return result
