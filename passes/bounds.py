"""Two bounds that the k-th smallest of many values lies between almost surely, from a sample of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor, isqrt

import numpy as np
from numpy.typing import NDArray

from mfcompile.passes.pieces import Values, count_of, spread

_STEPS = (64, 256)
"""At least and at most so many values share one that is looked at for the bounds."""

_DEVIATIONS = 4.0
"""How far the bounds lie from the rank that is sought, in standard deviations of a random sample."""


def sample_of(group: Sequence[Callable[[], Values]], k: int) -> tuple[NDArray[np.float32], int]:
    """One value of every ``step`` of the joined tensors, and the number of all; the place within a step varies."""
    total, step = 0, _step(k)

    def offsets() -> Iterator[tuple[Values, int]]:
        nonlocal total
        for make in group:
            values = make()
            total += count_of(values)
            yield values, total - count_of(values)

    def look(queue: Iterator[tuple[Values, int]]) -> list[NDArray[np.float32]]:
        return [values.at(_places(offset, count_of(values), step)) for values, offset in queue]

    seen = spread(look, offsets() if len(group) > 1 else list(offsets()))
    return np.concatenate([np.empty(0, np.float32), *(found for part in seen for found in part)]), total


def _places(offset: int, size: int, step: int) -> NDArray[np.int64]:
    """A place in each step of a tensor that begins at ``offset``; scattered, so that no pattern of rows is followed."""
    steps = np.arange(offset // step, ceil((offset + size) / step), dtype=np.uint64)
    mixed = steps * np.uint64(0x9E3779B97F4A7C15)  # splitmix64 (Steele et al., OOPSLA 2014)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    places = (steps * np.uint64(step) + (mixed >> np.uint64(31)) % np.uint64(step)).astype(np.int64) - offset
    return places[(places >= 0) & (places < size)]


def bounds_of(sample: NDArray[np.float32], fraction: float) -> tuple[np.float32, np.float32]:
    """Values that the one at this fraction of all lies between, as far as a sample can tell."""
    rank, size = fraction * sample.size, sample.size
    reach = _DEVIATIONS * (size * fraction * (1 - fraction)) ** 0.5 + _DEVIATIONS
    first, last = floor(rank - reach), ceil(rank + reach)
    wanted = [place for place in (first, last) if 0 <= place < size]
    if wanted:
        sample = np.partition(sample, wanted)
    low = sample[first] if first >= 0 else np.float32(-np.inf)
    high = sample[last] if last < size else np.float32(np.inf)
    return low, high


def _step(k: int) -> int:
    """How many values share one that is looked at: what a sample costs and what it saves between the bounds weigh the same."""
    return min(max(isqrt(max(k, 0)) // 8, _STEPS[0]), _STEPS[1])
