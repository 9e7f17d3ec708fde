"""Apportionment: whole numbers in given proportions that sum to a total, and never fall when the total rises."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mfcompile.errors import InputError


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> tuple[int, ...]:
    """Divide a total in proportion to weights, by Webster's (Sainte-Laguë's) method.

    Units are given out one by one, each to the receiver whose ``(share + 1/2) / weight`` is the smallest; ties go to the
    earlier. Of all methods that round, those that divide are the ones in which nobody's share falls when the total rises:
    masks of a higher sparsity are then subsets of those of a lower one.

    Args:
        total: 0 <= total <= sum of the caps.
        weights: a non-negative weight each; those of weight 0 receive something only when all others are full.
        caps: the largest share of each.

    Returns:
        Shares that sum to ``total``, none over its cap.

    Raises:
        InputError: the total is more than the caps allow.
    """
    if not 0 <= total <= sum(caps):
        raise InputError(f"cannot share out {total} where at most {sum(caps)} can be taken")
    shares = _safe(total, np.asarray(weights, np.float64), np.asarray(caps, np.int64))
    heap = [
        (_turn(share, weight), index)
        for index, (share, weight, cap) in enumerate(zip(shares, weights, caps, strict=True))
        if share < cap
    ]
    heapq.heapify(heap)
    for _ in range(total - sum(shares)):
        index = heap[0][1]
        shares[index] += 1
        if shares[index] < caps[index]:
            heapq.heapreplace(heap, (_turn(shares[index], weights[index]), index))
        else:
            heapq.heappop(heap)
    return tuple(shares)


def _turn(share: int, weight: float) -> float:
    """When a receiver of ``share`` units gets the next one; the smallest goes first."""
    return (share + 0.5) / weight if weight else float("inf")


def _safe(total: int, weights: NDArray[np.float64], caps: NDArray[np.int64]) -> list[int]:
    """Shares that everyone has for sure: nearly all units, so that few are left to be given out one by one."""

    def at(factor: float) -> NDArray[np.int64]:
        return np.minimum(np.floor(weights * factor + 0.5), caps).astype(np.int64)

    low, high = 0.0, 1.0
    reachable = min(total, int(caps[weights > 0].sum()))
    while at(high).sum() < reachable:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if at(middle).sum() < total:
            low = middle
        else:
            high = middle
        if high < 1e-12:  # a total of nothing
            return [0] * len(caps)
    # The factor and the turns round differently: the last unit of each is left to the turns, which alone decide.
    return [int(share) for share in np.maximum(at(low) - 1, 0)]
