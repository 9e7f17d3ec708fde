"""Encodings of one masked weight that standard ONNX operators can decode.

**gap8**: one byte per kept weight, the distance from the previous kept weight in row-major order; a distance over 255
is broken by an explicit zero value at a pruned place. Decoding is a cumulative sum and a scatter.
**gap4**: the same with distances up to 15, two in a byte (the high half first).
**mask**: one bit per weight, 1 = kept, row-major, the lowest bit of a byte first; the kept values, and one +0.0 behind
them, which decoding puts at every pruned place.
**dense**: every weight, with +0.0 at pruned places.

Bytes per weight at density d, with v bytes per value: gap8 d (v + 1), gap4 d (v + 1/2), mask d v + 1/8, dense v; broken gaps
add at most (v + 1) / 255 to gap8 and (v + 1/2) / 15 to gap4. mask is the smallest between a density of about 1/4 and 1, and
its decode is the dearest, because it works on every place instead of every kept one (``EncodingPlan.folded_bytes``;
measured by ``python -m benchmarks.formats``). So of all that are within 5 % of the smallest, the one that is decoded with
the least memory is taken, and a weight takes at most 1.05 (d v + 1/8) bytes per place; ``choose_encodings`` keeps the whole
file under a load budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from mfcompile.errors import ExportError, InputError

Array = NDArray[np.generic]

ENCODINGS = ("dense", "gap8", "gap4", "mask")
VALUES = ("fp32", "fp16")
GAP_LIMITS = {"gap8": 255, "gap4": 15}
FP16_LARGEST = 65504.0

# onnxruntime 1.27 and later fold a node into a constant only when its output is at most this large.
FOLDABLE_BYTES = 1 << 30

# How much larger than the smallest an encoding may be, to be preferred because it is decoded with less memory.
SIZE_TOLERANCE = 0.05


@dataclass(frozen=True)
class EncodedWeight:
    """One masked weight as it is stored.

    Attributes:
        name: FQN of the weight.
        encoding: one of ``ENCODINGS``.
        shape: shape of the weight.
        dtype: dtype of the decoded weight.
        gaps: where the values are. gap8: (entries,) uint8; gap4: (entries / 2,) uint8; mask: (ceil(places / 8),) uint8;
            None for dense.
        values: ``shape`` for dense, (entries,) otherwise; ``dtype``, or float16 where stored as fp16.
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
        encoding: one of ``ENCODINGS``.
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
        """Bytes of the gaps or of the mask, 0 for dense."""
        mask_bytes = (self.weight_count + 7) // 8
        return {"dense": 0, "gap8": self.entries, "gap4": self.entries // 2, "mask": mask_bytes}[self.encoding]

    @property
    def stored_bytes(self) -> int:
        """Bytes of gaps or mask, and values."""
        return self.gap_bytes + self.entries * self.values_dtype.itemsize

    @property
    def folded_bytes(self) -> int:
        """Bytes of all intermediates that onnxruntime makes and keeps while it folds the decode nodes.

        With n entries and N weights of w bytes: gap8 8 n (distances and positions, int32), gap4 4 n more (codes,
        halves, steps), mask 14 N (four numbers per byte, three indices per place; int32); values stored in another dtype
        n w more, and 3 N w for the flat and the reshaped weight and the copy that kernels pack or a Transpose makes.
        """
        width = self.dtype.itemsize
        values = 0 if self.values_dtype == self.dtype else self.entries * width
        if self.encoding == "dense":
            return values
        index = {"gap8": 8 * self.entries, "gap4": 12 * self.entries, "mask": 14 * self.weight_count}[self.encoding]
        return index + values + 3 * self.weight_count * width

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
    if encoding == "mask":
        return int(np.count_nonzero(mask)) + 1
    limit = GAP_LIMITS[encoding]
    gaps = np.diff(np.flatnonzero(mask), prepend=0)
    entries = max(1, int(gaps.size + np.maximum(gaps - 1, 0).__floordiv__(limit).sum()))
    is_padded = encoding == "gap4" and entries % 2 == 1 and entries < mask.size
    return entries + int(is_padded)


def possible_encodings(
    mask: NDArray[np.bool_], dtype: DTypeLike, values: str, *, allowed: tuple[str, ...] = ENCODINGS
) -> tuple[EncodingPlan, ...]:
    """The encodings that a weight of this mask and dtype can have, dense first.

    None but dense where onnxruntime would refuse to fold the decoded weight (over 1 GiB). gap4 is missing where it would need
    an even number of entries and no place is left to add one, mask where the places do not fill whole bytes.

    Args:
        mask: bool, 1 = kept, in the layout of the parameter.
        dtype: dtype of the weight.
        values: "fp32" or "fp16".
        allowed: encodings to choose from; "dense" is always possible.
    """
    own: np.dtype[np.generic] = np.dtype(dtype)
    stored = stored_dtype(own, values)
    kept = int(np.count_nonzero(mask))
    dense = EncodingPlan("dense", mask.size, stored, own, mask.shape, kept)
    if mask.size == 0 or mask.size * own.itemsize > FOLDABLE_BYTES:
        return (dense,)
    others = (
        EncodingPlan(encoding, entry_count(mask, encoding), stored, own, mask.shape, kept)
        for encoding in ("gap8", "gap4", "mask")
        if encoding in allowed
    )
    return dense, *(plan for plan in others if _is_possible(plan))


def estimate_encodings(
    weight_count: int, kept_count: int, dtype: DTypeLike, values: str, *, allowed: tuple[str, ...] = ENCODINGS
) -> tuple[EncodingPlan, ...]:
    """``possible_encodings`` of weights whose masks are not known yet, if they are kept at random.

    A distance is over k limits with probability q^(k limit), where q is the sparsity, so that each kept weight has
    q^limit / (1 - q^limit) explicit zeros.

    Args:
        weight_count: places.
        kept_count: kept weights.
        dtype, values, allowed: as in ``possible_encodings``.
    """
    own: np.dtype[np.generic] = np.dtype(dtype)
    stored = stored_dtype(own, values)
    pruned = 1 - kept_count / weight_count if weight_count else 0.0
    zeros = {name: pruned**limit / (1 - pruned**limit) if pruned < 1 else 0.0 for name, limit in GAP_LIMITS.items()}
    entries = {name: round(kept_count * (1 + share)) for name, share in zeros.items()}
    counts = {"dense": weight_count, **entries, "mask": kept_count + 1}
    return tuple(
        EncodingPlan(encoding, counts[encoding], stored, own, (weight_count,), kept_count)
        for encoding in ENCODINGS
        if encoding == "dense" or (encoding in allowed and weight_count)
    )


def _is_possible(plan: EncodingPlan) -> bool:
    if plan.encoding == "gap4":
        return plan.entries % 2 == 0
    return plan.encoding != "mask" or plan.weight_count % 8 == 0


def choose_encoding(plans: Sequence[EncodingPlan]) -> EncodingPlan:
    """Of all that are within 5 % of the smallest, the one that onnxruntime decodes with the least memory."""
    limit = (1 + SIZE_TOLERANCE) * min(plan.stored_bytes for plan in plans)
    return min((plan for plan in plans if plan.stored_bytes <= limit), key=lambda plan: (plan.folded_bytes, plan.stored_bytes))


def choose_encodings(
    possible: Mapping[str, Sequence[EncodingPlan]], load_bytes: Callable[[EncodingPlan], int], budget_bytes: float
) -> dict[str, EncodingPlan]:
    """The encoding of every weight of a file, so that all of them together can be loaded within a budget.

    Starts from ``choose_encoding`` for each. While the sum of load bytes is over the budget, the one exchange is made that
    costs the fewest stored bytes for each byte of load memory that it saves; where two cost the same, the earlier weight's.
    It is exact for every sum that an exchange ends at, and a function of its arguments alone.

    Args:
        possible: name -> ``possible_encodings``.
        load_bytes: bytes that onnxruntime needs to load a weight that is stored so.
        budget_bytes: what the load bytes of all weights may sum up to; where not even dense weights fit, they are dense.
    """
    chosen = {name: choose_encoding(plans) for name, plans in possible.items()}
    total = sum(load_bytes(plan) for plan in chosen.values())
    queue = [
        (cost, order, name, plan)
        for order, (name, plans) in enumerate(possible.items())
        for cost, plan in _exchanges(chosen[name], plans, load_bytes)
    ]
    for _, _, name, plan in sorted(queue, key=lambda item: item[:2]):
        if total <= budget_bytes:
            break
        total += load_bytes(plan) - load_bytes(chosen[name])
        chosen[name] = plan
    return chosen


def _exchanges(
    start: EncodingPlan, plans: Sequence[EncodingPlan], load_bytes: Callable[[EncodingPlan], int]
) -> list[tuple[float, EncodingPlan]]:
    """What a weight may be exchanged for in turn, each with its stored bytes per load byte saved, the cheapest first."""
    found: list[tuple[float, EncodingPlan]] = []
    while True:
        steps = [
            ((plan.stored_bytes - start.stored_bytes) / (load_bytes(start) - load_bytes(plan)), order)
            for order, plan in enumerate(plans)
            if load_bytes(plan) < load_bytes(start)
        ]
        if not steps:
            return found
        cost, order = min(steps)
        start = plans[order]
        found.append((cost, start))


def encode(weight: Array, mask: NDArray[np.bool_], values: str, *, encoding: str, name: str = "weight") -> EncodedWeight:
    """The masked weight in one of the encodings.

    Kept values are stored bit for bit (NaN, -0.0 and denormals included) unless ``values`` is "fp16".

    Args:
        weight: any shape, any float dtype; not changed.
        mask: bool of the same shape, 1 = kept.
        values: "fp32" (the weight's own dtype) or "fp16".
        encoding: one of ``ENCODINGS``.
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
    if encoding == "mask":
        kept = _convert(weight.reshape(-1)[mask.reshape(-1)], stored, name)
        bits = np.packbits(mask.reshape(-1), bitorder="little")
        return EncodedWeight(name, encoding, weight.shape, weight.dtype, bits, np.append(kept, np.zeros((), stored)))
    positions = np.flatnonzero(mask)
    kept = _convert(weight.reshape(-1)[positions], stored, name)
    gaps, entries = _break_gaps(np.diff(positions, prepend=0), kept, GAP_LIMITS[encoding])
    if encoding == "gap4":
        if entries.size % 2:
            gaps, entries = _add_zero(gaps, entries, mask.reshape(-1), name)
        gaps = (gaps[0::2] << np.uint8(4)) | gaps[1::2]
    return EncodedWeight(name, encoding, weight.shape, weight.dtype, gaps, entries)


def decode(encoded: EncodedWeight) -> Array:
    """The dense weight, ``encoded.shape`` in ``encoded.dtype``, with +0.0 at pruned places.

    Raises:
        InputError: the stored tensors do not fit each other or the shape: names the weight.
    """
    values = encoded.values.astype(encoded.dtype, copy=False)
    places = int(np.prod(encoded.shape, dtype=np.int64))
    if encoded.gaps is None:
        if values.size != places:
            raise _misfit(encoded, f"{values.size} values for {places} places")
        return values.reshape(encoded.shape)
    if encoded.encoding == "mask":
        return _decode_mask(encoded, values, places)
    gaps = encoded.gaps
    if encoded.encoding == "gap4":
        gaps = np.stack([gaps >> 4, gaps & 15], axis=1).reshape(-1)
    if gaps.size != values.size:
        raise _misfit(encoded, f"{gaps.size} gaps for {values.size} values")
    positions = np.cumsum(gaps, dtype=np.int64)
    if positions.size and positions[-1] >= places:
        raise _misfit(encoded, f"the last value is at place {positions[-1]} of {places}")
    weight = np.zeros(places, encoded.dtype)
    weight[positions] = values
    return weight.reshape(encoded.shape)


def _decode_mask(encoded: EncodedWeight, values: Array, places: int) -> Array:
    assert encoded.gaps is not None  # a mask
    if encoded.gaps.size != (places + 7) // 8:
        raise _misfit(encoded, f"{encoded.gaps.size} bytes of mask for {places} places")
    kept = np.unpackbits(encoded.gaps, count=places, bitorder="little").view(np.bool_)
    if np.count_nonzero(kept) + 1 != values.size:
        raise _misfit(encoded, f"{np.count_nonzero(kept)} kept places for {values.size - 1} values and the zero behind them")
    weight = np.zeros(places, encoded.dtype)
    weight[kept] = values[:-1]
    return weight.reshape(encoded.shape)


def _misfit(encoded: EncodedWeight, reason: str) -> InputError:
    return InputError(
        f"{encoded.name} {encoded.shape} cannot be decoded as {encoded.encoding}: {reason}. The file is damaged or was "
        f"changed; export it again"
    )


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
