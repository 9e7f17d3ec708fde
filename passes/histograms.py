"""The k-th smallest by counting: slow, sure, and in the same little memory whatever the values are.

The bits of float32 numbers, turned so that they are ordered as integers, are counted by their upper 16 bits, and those of
one upper half by their lower 16. Counts add up over tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mfcompile.passes.pieces import Values, scratch

_BINS = 1 << 16


def kth_by_histograms(group: Sequence[Callable[[], Values]], k: int) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """The k-th smallest value (1-based) over several tensors without NaN.

    Args:
        group: one function per tensor; called twice.
        k: 1 <= k <= number of all values.

    Returns:
        (the value, per tensor how many are smaller, per tensor how many equal it).
    """
    total, upper = np.zeros(_BINS, np.int64), []
    for make in group:
        histogram = np.zeros(_BINS, np.int64)
        for keys in _keys(make()):
            histogram += np.bincount(keys >> 16, minlength=_BINS)
        total += histogram
        upper.append(_Counts.of(histogram))
    cumulative = np.cumsum(total)
    bucket = int(np.searchsorted(cumulative, k))
    before = int(cumulative[bucket - 1]) if bucket else 0
    total, lower = np.zeros(_BINS, np.int64), []
    for counts, make in zip(upper, group, strict=True):
        histogram = np.zeros(_BINS, np.int64)
        if counts.at(bucket):
            for keys in _keys(make()):
                inside = keys[(keys >> 16) == bucket]
                histogram += np.bincount(inside & 0xFFFF, minlength=_BINS)
        total += histogram
        lower.append(_Counts.of(histogram))
    place = int(np.searchsorted(np.cumsum(total), k - before))
    below = tuple(high.below(bucket) + low.below(place) for high, low in zip(upper, lower, strict=True))
    return _value((bucket << 16) | place), below, tuple(low.at(place) for low in lower)


@dataclass(frozen=True)
class _Counts:
    """A histogram without its empty bins: there may be thousands of experts, each with one."""

    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, histogram: NDArray[np.int64]) -> _Counts:
        filled = np.flatnonzero(histogram != 0)  # many times faster than on the counts themselves
        return cls(filled.astype(np.uint16), histogram[filled])

    def below(self, place: int) -> int:
        """How many lie in bins under ``place``."""
        return int(self.counts[: np.searchsorted(self.bins, place)].sum())

    def at(self, place: int) -> int:
        """How many lie in the bin ``place``."""
        return self.below(place + 1) - self.below(place)


def _keys(values: Values) -> Iterator[NDArray[np.uint32]]:
    """Integers in the order of the values, piece by piece; both zeros are one value."""
    for piece in values.pieces():
        bits = (values.read(piece, scratch.numbers) + np.float32(0)).view(np.uint32)
        yield bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def _value(key: int) -> float:
    bits = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
    return float(np.array([bits], np.uint32).view(np.float32)[0])
