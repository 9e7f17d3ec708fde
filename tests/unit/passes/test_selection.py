"""Exact selection: thresholds of many tensors and the choice of the smallest, against a plain sort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes import bounds, pieces, selection
from mfcompile.passes.selection import Threshold, at_most, kept_bits, magnitude_threshold, score_threshold, smallest

# Few values, so that ties are the rule; both zeros, denormals, and the ends of float32.
TIED = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.0, -1.0, 1.0000001, 2.0, -2.5, 3.4e38])
VALUES = st.one_of(TIED, st.floats(-10, 10, width=32))


BROKEN = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[(-1e9, 1e9), (1e9, 1e9), (0.25, 0.5)], ids=["too low", "too high", "somewhere"])
def missed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that have nothing to do with the values."""
    low, high = map(np.float32, request.param)
    monkeypatch.setattr(selection, "bounds_of", lambda sample, fraction: (low, high))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 24)
    monkeypatch.setattr(bounds, "_STEPS", (3, 3))


def find(tensors: Sequence[Tensor], k: int, *, signed: bool = False) -> Threshold:
    rank = score_threshold if signed else magnitude_threshold
    return rank([lambda tensor=t: tensor for t in tensors], k, [f"w{i}" for i in range(len(tensors))])  # type: ignore[misc]


def check(tensors: Sequence[Tensor], k: int, *, signed: bool = False) -> None:
    """Everything that a threshold says, by a stable sort of all values."""
    flat = np.concatenate([tensor.float().reshape(-1).numpy() for tensor in tensors])
    flat = flat if signed else np.abs(flat)
    owner = np.concatenate([np.full(tensor.numel(), index) for index, tensor in enumerate(tensors)])
    order = np.argsort(flat, kind="stable")
    threshold = flat[order[k - 1]]
    found = find(tensors, k, signed=signed)
    assert found.value == threshold
    for index in range(len(tensors)):
        assert found.below[index] == ((flat < threshold) & (owner == index)).sum()
        assert found.ties[index] == ((flat == threshold) & (owner == index)).sum()
        assert found.pruned_counts(k)[index] == (owner[order[:k]] == index).sum()


def expected_marks(scores: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    expected = np.zeros(scores.size, bool)
    expected[np.argsort(scores.reshape(-1), kind="stable")[: max(k, 0)]] = True
    return expected.reshape(scores.shape)


def tied(generator: torch.Generator, count: int) -> Tensor:
    """Three in five are zeros of both signs, the others of few values and of many, some of them not normal numbers."""
    values = torch.randn(count, generator=generator)
    kind = torch.rand(count, generator=generator)
    values = torch.where(kind < 0.8, (values * 2).round() / 2, values)
    values = torch.where(kind > 0.95, values * 1e-39, values)
    return torch.where(kind < 0.6, values.sign() * 0.0, values)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(VALUES, min_size=0, max_size=12), min_size=1, max_size=4).filter(any), st.booleans(), st.data())
def test_threshold_is_that_of_a_sort(lists: list[list[float]], signed: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, sum(map(len, lists))))
    check([torch.tensor(values, dtype=torch.float32) for values in lists], k, signed=signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.6, 0.63, 0.9, 1.0])
@pytest.mark.usefixtures("small_pieces", "threads")
def test_threshold_between_bounds_of_a_sample(fraction: float, signed: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = [tied(generator, 700).reshape(35, 20), tied(generator, 90).reshape(3, 30), tied(generator, 40).reshape(8, 5).t()]
    check(tensors, max(1, round(fraction * 830)), signed=signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("k", [1, 415, 600, 830])
@pytest.mark.usefixtures("missed", "small_pieces")
def test_threshold_that_the_bounds_miss(k: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = [tied(generator, 700).reshape(35, 20), tied(generator, 90), tied(generator, 40).reshape(8, 5).t()]
    check(tensors, k, signed=signed)
    scores = torch.cat([tensor.reshape(-1) for tensor in tensors])
    np.testing.assert_array_equal(smallest(scores, k).numpy(), expected_marks(scores.numpy(), k))


def test_bounds_that_hold_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(selection, "kth_by_histograms")
    generator = torch.Generator().manual_seed(5)
    for values in (torch.randn(300_000, generator=generator), tied(generator, 300_000), torch.full((300_000,), 7.0)):
        for k in (1, 100, 189_000, 299_900, 300_000):
            check([values[:40_000], values[40_000:]], k)
            check([values[:40_000], values[40_000:]], k, signed=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 777, 1999, 2000])
def test_threshold_of_every_dtype(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    check([torch.randn(40, 30, generator=generator).to(dtype), torch.randn(800, generator=generator).to(dtype)], k)


def test_threshold_of_a_transposed_view_counts_its_values_once() -> None:
    check([torch.arange(12.0).reshape(3, 4).t(), torch.arange(5.0)], 9)


def test_ties_go_to_earlier_tensors_first() -> None:
    ones = torch.ones(2, 2)
    found = find([ones, torch.tensor([0.5, 3.0]), -ones], 6)
    assert found.pruned_counts(6) == (4, 1, 1)
    assert found.pruned_counts(2) == (1, 1, 0)


@pytest.mark.parametrize("k", [0, -1, 7])
def test_a_rank_outside_of_the_values_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=rf"cannot take the {k}-th smallest of 6 values"):
        find([torch.ones(6)], k)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_names_its_tensor(value: float, dtype: torch.dtype, signed: bool) -> None:
    broken = torch.ones(4, dtype=dtype)
    broken[1] = broken[2] = value
    with pytest.raises(InputError, match=r"w1 holds 2 NaN or infinite values.*Check the checkpoint"):
        find([torch.ones(4), broken, broken], 1, signed=signed)


@pytest.mark.parametrize("k", [1, 700, 1400])
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.usefixtures("small_pieces", "threads")
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(value: float, k: int) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = [tied(generator, 700), tied(generator, 700), tied(generator, 700)]
    tensors[1][333] = tensors[2][3] = value
    for signed in (False, True):
        with pytest.raises(InputError, match=r"^w1 holds 1 NaN or infinite"):
            find(tensors, k, signed=signed)


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=30), st.data())
def test_smallest_marks_k_and_ties_by_position(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    scores = np.array(values, np.float32)
    np.testing.assert_array_equal(smallest(torch.from_numpy(scores), k).numpy(), expected_marks(scores, k))
    np.testing.assert_array_equal(kept_bits(torch.from_numpy(scores), k), np.packbits(~expected_marks(scores, k)))


@pytest.mark.parametrize("shape", [(41, 20), (20, 41), (3, 100), (820,), (2, 41, 10), (41, 2, 10)])
@pytest.mark.parametrize("k", [0, 1, 7, 200, 240, 492, 520, 600, 819, 820])
@pytest.mark.usefixtures("small_pieces", "threads")
def test_smallest_over_many_pieces_in_every_layout(shape: tuple[int, ...], k: int) -> None:
    scores = tied(torch.Generator().manual_seed(6), 820)[: prod(shape)].reshape(shape)
    k = min(k, scores.numel())
    for view in (scores, scores.transpose(0, -1), scores.transpose(0, -1).contiguous().transpose(0, -1)):
        expected = expected_marks(view.numpy(), k)
        np.testing.assert_array_equal(smallest(view, k).numpy(), expected)
        np.testing.assert_array_equal(kept_bits(view, k), np.packbits(~expected))
        if k:
            flat = np.sort(view.numpy().reshape(-1))
            np.testing.assert_array_equal(at_most(view, k).numpy(), view.numpy() <= flat[k - 1])
            np.testing.assert_array_equal(kept_bits(view, k, take_ties=True), np.packbits(view.numpy() > flat[k - 1]))


@pytest.mark.parametrize("k", [1, 40, 80, 99, 120])
def test_infinite_scores_have_their_place(k: int) -> None:
    scores = torch.randn(120, generator=torch.Generator().manual_seed(1))
    scores[::3], scores[::5] = float("-inf"), float("inf")
    np.testing.assert_array_equal(smallest(scores, k).numpy(), expected_marks(scores.numpy(), k))


@pytest.mark.parametrize("k", [1, 70, 119])
@pytest.mark.parametrize("place", [0, 57, 119])
def test_a_score_that_is_no_number_is_refused(place: int, k: int) -> None:
    scores = torch.randn(120, generator=torch.Generator().manual_seed(1))
    scores[place] = float("nan")
    for select in (smallest, at_most, kept_bits):
        with pytest.raises(InputError, match="1 of the scores are NaN"):
            select(scores, k)


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=30), st.data())
def test_at_most_marks_all_ties(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    scores = np.array(values, np.float32)
    np.testing.assert_array_equal(at_most(torch.from_numpy(scores), k).numpy(), scores <= np.sort(scores)[k - 1])


def test_shapes_are_kept() -> None:
    scores = torch.tensor([[3.0, 1.0], [2.0, 1.0], [0.0, 5.0]])
    assert smallest(scores, 2).tolist() == [[False, True], [False, False], [True, False]]
    assert at_most(scores, 2).tolist() == [[False, True], [False, True], [True, False]]
    # Flat indices are those of the tensor as it is given, also for a view that lies otherwise in memory.
    assert smallest(scores.t(), 2).tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.parametrize("k", [0, -3])
def test_nothing_to_mark(k: int) -> None:
    assert not smallest(torch.zeros(2, 3), k).any()
    assert not at_most(torch.zeros(2, 3), k).any()
    assert smallest(torch.zeros(2, 3), 6).all()
