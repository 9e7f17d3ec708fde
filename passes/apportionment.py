"""Apportionment: whole numbers in given proportions that sum to a total, and never fall when the total rises."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from mfcompile.errors import InputError


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> tuple[int, ...]:
    """Divide a total in proportion to weights, by Webster's (Sainte-Laguë's) method.

    Of all methods that round, those that divide are the ones in which nobody's share falls when the total rises: masks of
    a higher sparsity are then subsets of those of a lower one. Ties go to the earlier.

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
    shares = _rounded(total, weights, caps)
    # The shares are those of one divisor; unit by unit towards the total keeps them Webster's.
    missing = total - sum(shares)
    heap = [
        (_turn(shares[index], weight), index)
        for index, weight in enumerate(weights)
        if missing > 0 and shares[index] < caps[index]
    ]
    if missing < 0:
        heap = [(-_turn(share - 1, weights[index]), -index) for index, share in enumerate(shares) if share > 0]
    heapq.heapify(heap)
    while missing:
        _, key = heapq.heappop(heap)
        if missing > 0:
            shares[key] += 1
            missing -= 1
            if shares[key] < caps[key]:
                heapq.heappush(heap, (_turn(shares[key], weights[key]), key))
        else:
            shares[-key] -= 1
            missing += 1
            if shares[-key] > 0:
                heapq.heappush(heap, (-_turn(shares[-key] - 1, weights[-key]), key))
    return tuple(shares)


def _turn(share: int, weight: float) -> float:
    """When a receiver of ``share`` units gets the next one; the smallest goes first."""
    return (share + 0.5) / weight if weight else float("inf")


def _rounded(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Webster's shares of the factor that comes nearest to the total, none over its cap."""
    low, high = 0.0, 1.0

    def at(factor: float) -> list[int]:
        return [min(cap, int(weight * factor + 0.5)) for weight, cap in zip(weights, caps, strict=True)]

    reachable = sum(cap for weight, cap in zip(weights, caps, strict=True) if weight)
    while sum(at(high)) < min(total, reachable):
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if sum(at(middle)) < total:
            low = middle
        else:
            high = middle
    return at(low)
