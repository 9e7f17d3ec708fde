"""Apportionment: Webster's method, against seats that are given out one by one in exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfcompile.errors import InputError
from mfcompile.passes.apportionment import apportion

RECEIVERS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=6)


def one_by_one(total: int, weights: Sequence[int], caps: Sequence[int]) -> tuple[int, ...]:
    """Webster's method as it is defined: every unit goes to whoever is below the cap and next in turn."""
    shares = [0] * len(weights)
    for _ in range(total):
        open_ = [index for index, share in enumerate(shares) if share < caps[index]]
        weighty = [index for index in open_ if weights[index]] or open_
        next_ = min(weighty, key=lambda i: (Fraction(2 * shares[i] + 1, 2 * weights[i]) if weights[i] else 0, i))
        shares[next_] += 1
    return tuple(shares)


@settings(deadline=None, max_examples=300)
@given(RECEIVERS, st.floats(0, 1))
def test_seats_are_those_given_out_one_by_one(receivers: list[tuple[int, int]], fraction: float) -> None:
    weights, caps = zip(*receivers, strict=True)
    total = round(fraction * sum(caps))
    assert apportion(total, weights, caps) == one_by_one(total, weights, caps)


@settings(deadline=None, max_examples=60)
@given(RECEIVERS)
def test_nobody_loses_when_there_is_more(receivers: list[tuple[int, int]]) -> None:
    weights, caps = zip(*receivers, strict=True)
    shares = [apportion(total, weights, caps) for total in range(sum(caps) + 1)]
    for total, (fewer, more) in enumerate(pairwise(shares)):
        assert sum(fewer) == total
        assert all(before <= after <= cap for before, after, cap in zip(fewer, more, caps, strict=True))


LAYERS = [768 * 768] * 4 + [768 * 3072] * 2 + [50257 * 768, 10, 3, 1]


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 1), st.integers(1, 3), st.permutations(LAYERS))
def test_large_totals_are_fair_and_nobody_loses(fraction: float, more: int, sizes: list[int]) -> None:
    total = min(int(fraction * sum(sizes)), sum(sizes) - more)
    shares, later = apportion(total, sizes, sizes), apportion(total + more, sizes, sizes)
    assert (sum(shares), sum(later)) == (total, total + more)
    assert all(before <= after for before, after in zip(shares, later, strict=True))
    for share, size in zip(shares, sizes, strict=True):  # half a unit each, of which a large receiver takes its part
        assert abs(share - total * size / sum(sizes)) <= 0.5 + len(sizes) / 2 * size / sum(sizes)


def test_weights_that_round_badly_leave_no_unit_out_of_turn() -> None:
    """Weights whose turns differ by less than float64 can tell from a factor: the order of the turns alone decides."""
    weights, caps = [1 / 3, 1 / 3 + 5e-17, 2 / 3, 1e-9, 1e9], [50] * 5
    for total in range(250):
        fewer, more = apportion(total, weights, caps), apportion(total + 1, weights, caps)
        assert sum(after - before for before, after in zip(fewer, more, strict=True)) == 1
        assert all(before <= after for before, after in zip(fewer, more, strict=True))


def test_the_earlier_of_two_equals_is_first() -> None:
    assert apportion(1, [2, 2, 2], [9, 9, 9]) == (1, 0, 0)
    assert apportion(5, [2, 2, 2], [9, 9, 9]) == (2, 2, 1)


def test_no_weight_is_served_last() -> None:
    assert apportion(3, [0, 1, 0], [2, 3, 2]) == (0, 3, 0)
    assert apportion(6, [0, 1, 0], [2, 3, 2]) == (2, 3, 1)
    assert apportion(2, [0, 0], [2, 2]) == (2, 0)


@pytest.mark.parametrize("total", [-1, 8])
def test_more_than_there_is_room_for_is_refused(total: int) -> None:
    with pytest.raises(InputError, match=f"cannot share out {total} where at most 7 can be taken"):
        apportion(total, [1, 1], [3, 4])


def test_nothing_to_share_out() -> None:
    assert apportion(0, [], []) == ()
    assert apportion(0, [1, 2], [3, 4]) == (0, 0)
