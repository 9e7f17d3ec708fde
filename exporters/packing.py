"""Encodings of one masked weight that standard ONNX operators can decode.

**gap8**: one byte per kept weight, the distance from the previous kept weight in row-major order; a distance over 255
is broken by an explicit zero value at a pruned place. Decoding is a cumulative sum and a scatter.
**gap4**: the same with distances up to 15, two in a byte (the high half first).
**dense**: every weight, with +0.0 at pruned places.

Bytes per weight at density d, with v bytes per value: gap8 d (v + 1), gap4 d (v + 1/2), dense v; broken gaps add at
most (v + 1) / 255 to gap8 and (v + 1/2) / 15 to gap4. gap8 or dense, whichever is smaller, takes at most
0.4625 + 0.005 of the dense fp32 bytes when 63 % of all weights are pruned, however unevenly over the layers, because
min(5 d, 4) is concave in d.

One bit per weight would be smallest at 63 % (0.401 of the dense bytes; gap4 0.417, gap8 0.463), but its decode works
on every place instead of every kept one. Creating a session with onnxruntime 1.31 on 57 M fp32 weights at 63 %, one
thread, least CPU seconds of five runs and peak memory: dense 0.35 s and 0.25 GB, gap8 0.76 s and 0.82 GB, gap4 0.86 s
and 0.85 GB, one bit 2.8 s and 1.64 GB. gap4 costs little over gap8, so it is used where it is smaller; one bit per
weight is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from mfcompile.errors import ExportError, InputError

Array = NDArray[np.generic]

ENCODINGS = ("dense", "gap8", "gap4")
VALUES = ("fp32", "fp16")
GAP_LIMITS = {"gap8": 255, "gap4": 15}
FP16_LARGEST = 65504.0

# onnxruntime 1.27 and later fold a node into a constant only when its output is at most this large.
FOLDABLE_BYTES = 1 << 30

# What a packed form must save of the dense bytes, and gap4 of the gap8 bytes, to be preferred over the simpler one.
LEAST_SAVING = 0.05


@dataclass(frozen=True)
class EncodedWeight:
    """One masked weight as it is stored.

    Attributes:
        name: FQN of the weight.
        encoding: "dense", "gap8" or "gap4".
        shape: shape of the weight.
        dtype: dtype of the decoded weight.
        gaps: gap8: (entries,) uint8; gap4: (entries / 2,) uint8; None for dense.
        values: (entries,) for gap8 and gap4, ``shape`` for dense; ``dtype``, or float16 where stored as fp16.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    gaps: NDArray[np.uint8] | None
    values: Array

    @property
    def stored_bytes(self) -> int:
        """Bytes of gaps and values."""
        return int(self.values.nbytes) + (0 if self.gaps is None else int(self.gaps.nbytes))


@dataclass(frozen=True)
class EncodingPlan:
    """The encoding chosen for one weight, known from its mask alone.

    Attributes:
        encoding: "dense", "gap8" or "gap4".
        entries: stored values: kept weights and explicit zeros; all weights for dense.
        values_dtype: dtype of the stored values.
        dtype: dtype of the decoded weight.
        shape: shape of the weight.
        kept_count: kept weights.
    """

    encoding: str
    entries: int
    values_dtype: np.dtype[np.generic]
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    kept_count: int

    @property
    def gap_bytes(self) -> int:
        """Bytes of the gaps, 0 for dense."""
        return {"dense": 0, "gap8": self.entries, "gap4": self.entries // 2}[self.encoding]

    @property
    def stored_bytes(self) -> int:
        """Bytes of gaps and values."""
        return self.gap_bytes + self.entries * self.values_dtype.itemsize

    @property
    def folded_bytes(self) -> int:
        """Bytes of all intermediates that onnxruntime makes and keeps while it folds the decode nodes.

        With n entries and N weights of w bytes: gap8 8 n (distances and positions, int32), gap4 4 n more (codes,
        halves, steps), values stored in another dtype n w more, and 2 N w for the scattered and the reshaped weight.
        """
        width = self.dtype.itemsize
        if self.encoding == "dense":
            return 0 if self.values_dtype == self.dtype else self.entries * width
        index = 8 * self.entries + (4 * self.entries if self.encoding == "gap4" else 0)
        values = 0 if self.values_dtype == self.dtype else self.entries * width
        return index + values + 2 * self.weight_count * width

    @property
    def weight_count(self) -> int:
        """All places of the weight."""
        return int(np.prod(self.shape, dtype=np.int64))


def stored_dtype(dtype: DTypeLike, values: str) -> np.dtype[np.generic]:
    """The dtype in which a weight's values are stored: float16 for "fp16", the weight's own otherwise.

    Raises:
        InputError: ``values`` is neither "fp32" nor "fp16".
    """
    if values not in VALUES:
        raise InputError(f"values={values!r} is not known; choose one of {', '.join(VALUES)}")
    own: np.dtype[np.generic] = np.dtype(dtype)
    is_float = own.kind == "f" or own == np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.float16) if values == "fp16" and is_float else own


def entry_count(mask: NDArray[np.bool_], encoding: str) -> int:
    """Values that ``encode`` stores for this mask: kept weights and explicit zeros; all weights for dense."""
    if encoding == "dense" or mask.size == 0:
        return int(mask.size)
    limit = GAP_LIMITS[encoding]
    gaps = np.diff(np.flatnonzero(mask), prepend=0)
    entries = max(1, int(gaps.size + np.maximum(gaps - 1, 0).__floordiv__(limit).sum()))
    is_padded = encoding == "gap4" and entries % 2 == 1 and entries < mask.size
    return entries + int(is_padded)


def plan_encoding(
    mask: NDArray[np.bool_], dtype: DTypeLike, values: str, *, allowed: tuple[str, ...] = ENCODINGS
) -> EncodingPlan:
    """The encoding for a weight of this mask and dtype: the simplest that is small.

    In the order dense, gap8, gap4, a later one is taken when it saves 5 % over the earlier. So fp32 values stay dense
    over a density of 0.84, and gap8 wins below about 0.17, where gaps over 15 become common. Dense is
    kept where onnxruntime would refuse to fold the decoded weight (over 1 GiB), and where gap4 would need an even
    number of entries and no place is left to add one.

    Args:
        mask: bool, 1 = kept, in the layout of the parameter.
        dtype: dtype of the weight.
        values: "fp32" or "fp16".
        allowed: encodings to choose from; "dense" is always possible.
    """
    own: np.dtype[np.generic] = np.dtype(dtype)
    stored = stored_dtype(own, values)
    kept = int(np.count_nonzero(mask))
    best = EncodingPlan("dense", mask.size, stored, own, mask.shape, kept)
    if mask.size * own.itemsize > FOLDABLE_BYTES:
        return best
    for encoding in ("gap8", "gap4"):
        if encoding in allowed:
            plan = EncodingPlan(encoding, entry_count(mask, encoding), stored, own, mask.shape, kept)
            is_possible = encoding != "gap4" or plan.entries % 2 == 0
            if is_possible and plan.stored_bytes < (1 - LEAST_SAVING) * best.stored_bytes:
                best = plan
    return best


def encode(weight: Array, mask: NDArray[np.bool_], values: str, *, encoding: str, name: str = "weight") -> EncodedWeight:
    """The masked weight in one of the encodings.

    Kept values are stored bit for bit (NaN, -0.0 and denormals included) unless ``values`` is "fp16".

    Args:
        weight: any shape, any float dtype; not changed.
        mask: bool of the same shape, 1 = kept.
        values: "fp32" (the weight's own dtype) or "fp16".
        encoding: "dense", "gap8" or "gap4".
        name: FQN of the weight, for error messages.

    Raises:
        InputError: mask and weight differ in shape, or encoding or values is unknown.
        ExportError: a kept value does not fit fp16 (|value| > 65504 or NaN), or gap4 cannot hold this mask.
    """
    if mask.shape != weight.shape:
        raise InputError(f"the mask of {name} has shape {mask.shape}, but the weight has {weight.shape}")
    if encoding not in ENCODINGS:
        raise InputError(f"encoding {encoding!r} of {name} is not known; choose one of {', '.join(ENCODINGS)}")
    stored = stored_dtype(weight.dtype, values)
    if encoding == "dense" or mask.size == 0:
        masked = np.where(mask, weight, np.zeros((), weight.dtype))
        return EncodedWeight(name, "dense", weight.shape, weight.dtype, None, _convert(masked, stored, name))
    positions = np.flatnonzero(mask)
    kept = _convert(weight.reshape(-1)[positions], stored, name)
    gaps, entries = _break_gaps(np.diff(positions, prepend=0), kept, GAP_LIMITS[encoding])
    if encoding == "gap4":
        if entries.size % 2:
            gaps, entries = _add_zero(gaps, entries, mask.reshape(-1), name)
        gaps = (gaps[0::2] << np.uint8(4)) | gaps[1::2]
    return EncodedWeight(name, encoding, weight.shape, weight.dtype, gaps, entries)


def decode(encoded: EncodedWeight) -> Array:
    """The dense weight, ``encoded.shape`` in ``encoded.dtype``, with +0.0 at pruned places."""
    values = encoded.values.astype(encoded.dtype, copy=False)
    if encoded.gaps is None:
        return values.reshape(encoded.shape)
    gaps = encoded.gaps
    if encoded.encoding == "gap4":
        gaps = np.stack([gaps >> 4, gaps & 15], axis=1).reshape(-1)
    weight = np.zeros(int(np.prod(encoded.shape, dtype=np.int64)), encoded.dtype)
    weight[np.cumsum(gaps, dtype=np.int64)] = values
    return weight.reshape(encoded.shape)


def _convert(kept: Array, stored: np.dtype[np.generic], name: str) -> Array:
    if kept.dtype == stored:
        return kept
    wide = kept.astype(np.float64)
    refused = ~(np.abs(wide) <= FP16_LARGEST)
    if refused.any():
        worst = wide[refused][0]
        raise ExportError(
            f"{name}: {int(refused.sum())} kept weights do not fit fp16 (the first is {worst:g}; "
            f"fp16 holds at most {FP16_LARGEST:g} and no NaN is accepted). Export with values='fp32'"
        )
    return kept.astype(stored)


def _break_gaps(gaps: NDArray[np.int64], kept: Array, limit: int) -> tuple[NDArray[np.uint8], Array]:
    """Break gaps over ``limit`` by explicit zero values.

    gap   600          ->  gaps   255  255  90
    value w                values   0    0   w
    """
    if gaps.size == 0:  # nothing is kept: one explicit zero at the first place
        return np.zeros(1, np.uint8), np.zeros(1, kept.dtype)
    breaks = np.maximum(gaps - 1, 0) // limit
    before = np.repeat(np.flatnonzero(breaks), breaks[breaks > 0])
    short = (gaps - breaks * limit).astype(np.uint8)
    if before.size == 0:
        return short, kept
    return np.insert(short, before, np.uint8(limit)), np.insert(kept, before, np.zeros((), kept.dtype))


def _add_zero(gaps: NDArray[np.uint8], entries: Array, mask: NDArray[np.bool_], name: str) -> tuple[NDArray[np.uint8], Array]:
    """One explicit zero more, at the first place that has no entry."""
    positions = np.cumsum(gaps, dtype=np.int64)
    if positions.size == mask.size:
        raise ExportError(f"{name}: gap4 stores an even number of entries, and all {mask.size} places have one. Use gap8")
    gapless = np.flatnonzero(positions != np.arange(positions.size))
    index = int(gapless[0]) if gapless.size else positions.size  # entries before ``index`` fill places 0 .. index - 1
    positions = np.insert(positions, index, index)
    return np.diff(positions, prepend=0).astype(np.uint8), np.insert(entries, index, np.zeros((), entries.dtype))
