"""Exact selection of the smallest values, without a sort and without joining tensors.

The bits of non-negative float32 numbers, read as integers, are in the order of the numbers. Two histogram passes,
one over the upper and one over the lower 16 bits, find the k-th smallest of any number of tensors; the counts add up
over tensors (and could over processes). Ties are broken by position: the lower flat index goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.errors import InputError

_CHUNK = 1 << 20
"""Values handled at a time: small enough for the cache, large enough for NumPy."""

_BINS = 1 << 16
_INFINITY_BIN = 0x7F80


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest magnitude of a group of tensors.

    Attributes:
        value: the magnitude.
        below: per tensor, how many magnitudes are smaller.
        ties: per tensor, how many equal it.
    """

    value: float
    below: tuple[int, ...]
    ties: tuple[int, ...]

    def pruned_counts(self, k: int) -> tuple[int, ...]:
        """Per tensor, how many of the k smallest lie in it; ties go to earlier tensors first."""
        left = k - sum(self.below)
        counts = []
        for below, ties in zip(self.below, self.ties, strict=True):
            taken = min(ties, left)
            left -= taken
            counts.append(below + taken)
        return tuple(counts)


def magnitude_threshold(tensors: Sequence[Callable[[], Tensor]], k: int, names: Sequence[str]) -> Threshold:
    """The k-th smallest magnitude (1-based) over several tensors.

    Args:
        tensors: one function per tensor that gives it, any shape and float dtype; called once per pass, so that
            tensors may be loaded or computed when they are needed.
        k: 1 <= k <= number of all values.
        names: what the tensors are called, for messages.

    Returns:
        The threshold with the counts of every tensor.

    Raises:
        InputError: a value is NaN or infinite (names the tensor), or k is out of range.
    """
    return _threshold(tensors, k, names, _magnitude_keys, [slice(_INFINITY_BIN, None)], lambda key: key)


def score_threshold(tensors: Sequence[Callable[[], Tensor]], k: int, names: Sequence[str]) -> Threshold:
    """The k-th smallest value (1-based) over several tensors of any sign; otherwise like ``magnitude_threshold``."""
    infinite = [slice(0x8000 | _INFINITY_BIN, None), slice(0, 0x8000 - _INFINITY_BIN)]
    return _threshold(tensors, k, names, _score_keys, infinite, lambda key: key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF))


def _threshold(
    tensors: Sequence[Callable[[], Tensor]],
    k: int,
    names: Sequence[str],
    keys: Callable[[NDArray[np.uint32]], NDArray[np.uint32]],
    infinite: Sequence[slice],
    bits_of: Callable[[int], int],
) -> Threshold:
    total, upper = np.zeros(_BINS, np.int64), []
    for tensor, name in zip(tensors, names, strict=True):
        histogram = np.zeros(_BINS, np.int64)
        for bits in _bits(tensor()):
            histogram += np.bincount(keys(bits) >> 16, minlength=_BINS)
        broken = sum(int(histogram[bins].sum()) for bins in infinite)
        if broken:
            raise InputError(f"{name} holds {broken} NaN or infinite values: it cannot be ranked. Check the checkpoint")
        total += histogram
        upper.append(_Counts.of(histogram))
    if not 1 <= k <= int(total.sum()):
        raise InputError(f"cannot take the {k}-th smallest of {int(total.sum())} values")
    cumulative = np.cumsum(total)
    bucket = int(np.searchsorted(cumulative, k))
    before = int(cumulative[bucket - 1]) if bucket else 0
    total, lower = np.zeros(_BINS, np.int64), []
    for counts, tensor in zip(upper, tensors, strict=True):
        histogram = np.zeros(_BINS, np.int64)
        if counts.at(bucket):
            for bits in _bits(tensor()):
                ordered = keys(bits)
                inside = ordered[(ordered >> 16) == bucket]
                histogram += np.bincount(inside & 0xFFFF, minlength=_BINS)
        total += histogram
        lower.append(_Counts.of(histogram))
    place = int(np.searchsorted(np.cumsum(total), k - before))
    below = tuple(high.below(bucket) + low.below(place) for high, low in zip(upper, lower, strict=True))
    value = np.array([bits_of((bucket << 16) | place)], np.uint32).view(np.float32)[0]
    return Threshold(float(value), below, tuple(low.at(place) for low in lower))


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


def _magnitude_keys(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Integers in the order of the magnitudes."""
    return bits & np.uint32(0x7FFFFFFF)


def _score_keys(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Integers in the order of the values; both zeros are one value."""
    bits = np.where(bits == np.uint32(0x80000000), np.uint32(0), bits)
    return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def _bits(tensor: Tensor) -> Iterator[NDArray[np.uint32]]:
    """The bits of float32 values, in chunks; no copy of the tensor is made when it is float32 and contiguous."""
    flat = tensor.detach().cpu().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.float32)
        yield part.numpy().view(np.uint32)


def smallest(scores: Tensor, k: int) -> Tensor:
    """Mark exactly the k smallest scores; among equal scores the lower flat index first.

    Args:
        scores: any shape, float32, no NaN.
        k: 0 <= k <= number of scores.

    Returns:
        bool tensor of the same shape, True at the k smallest.
    """
    flat: NDArray[np.float32] = scores.detach().cpu().reshape(-1).numpy()
    if k <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    if k >= flat.size:
        return torch.ones(scores.shape, dtype=torch.bool)
    threshold = np.partition(flat, k - 1)[k - 1]
    chosen = flat < threshold
    missing = k - int(np.count_nonzero(chosen))
    chosen[np.flatnonzero(flat == threshold)[:missing]] = True
    return torch.from_numpy(chosen.reshape(tuple(scores.shape)))


def at_most(scores: Tensor, k: int) -> Tensor:
    """Mark every score that is not above the k-th smallest (ties are all marked); none when k < 1.

    The rule of the published code; ``smallest`` is the exact one.
    """
    if k < 1:
        return torch.zeros(scores.shape, dtype=torch.bool)
    flat: NDArray[np.float32] = scores.detach().cpu().reshape(-1).numpy()
    threshold = np.partition(flat, k - 1)[k - 1]
    return torch.from_numpy((flat <= threshold).reshape(tuple(scores.shape)))
