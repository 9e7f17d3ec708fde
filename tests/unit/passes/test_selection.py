"""Exact selection: the radix threshold and the choice of the smallest, against a plain sort."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes import selection
from mfcompile.passes.selection import Threshold, at_most, magnitude_threshold, smallest

# Few values, so that ties are the rule; both zeros, denormals, and the ends of float32.
TIED = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.0, -1.0, 1.0000001, 2.0, -2.5, 3.4e38])
VALUES = st.one_of(TIED, st.floats(-10, 10, width=32))


def find(tensors: Sequence[Tensor], k: int) -> Threshold:
    return magnitude_threshold([lambda tensor=t: tensor for t in tensors], k, [f"w{i}" for i in range(len(tensors))])  # type: ignore[misc]


def check(tensors: Sequence[Tensor], k: int) -> None:
    """Everything that a threshold says, by a stable sort of all magnitudes."""
    flat = np.concatenate([tensor.float().abs().reshape(-1).numpy() for tensor in tensors])
    owner = np.concatenate([np.full(tensor.numel(), index) for index, tensor in enumerate(tensors)])
    order = np.argsort(flat, kind="stable")
    threshold = flat[order[k - 1]]
    found = find(tensors, k)
    assert found.value == threshold
    for index in range(len(tensors)):
        assert found.below[index] == ((flat < threshold) & (owner == index)).sum()
        assert found.ties[index] == ((flat == threshold) & (owner == index)).sum()
        assert found.pruned_counts(k)[index] == (owner[order[:k]] == index).sum()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=4), st.data())
def test_threshold_is_that_of_a_sort(lists: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, sum(map(len, lists))))
    check([torch.tensor(values) for values in lists], k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 777, 1999, 2000])
def test_threshold_of_every_dtype(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    check([torch.randn(40, 30, generator=generator).to(dtype), torch.randn(800, generator=generator).to(dtype)], k)


def test_threshold_of_a_transposed_view_counts_its_values_once() -> None:
    check([torch.arange(12.0).reshape(3, 4).t(), torch.arange(5.0)], 9)


def test_threshold_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 7)
    check([torch.randn(5, 5, generator=torch.Generator().manual_seed(1)), torch.randn(3)], 17)


def test_ties_go_to_earlier_tensors_first() -> None:
    ones = torch.ones(2, 2)
    found = find([ones, torch.tensor([0.5, 3.0]), -ones], 6)
    assert found.pruned_counts(6) == (4, 1, 1)
    assert found.pruned_counts(2) == (1, 1, 0)


@pytest.mark.parametrize("k", [0, -1, 7])
def test_a_rank_outside_of_the_values_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=rf"cannot take the {k}-th smallest of 6 values"):
        find([torch.ones(6)], k)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_names_its_tensor(value: float, dtype: torch.dtype) -> None:
    broken = torch.ones(4, dtype=dtype)
    broken[1] = broken[2] = value
    with pytest.raises(InputError, match=r"w1 holds 2 NaN or infinite values.*Check the checkpoint"):
        find([torch.ones(4), broken], 1)


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=30), st.data())
def test_smallest_marks_k_and_ties_by_position(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    scores = np.array(values, np.float32)
    expected = np.zeros(len(values), bool)
    expected[np.argsort(scores, kind="stable")[:k]] = True
    np.testing.assert_array_equal(smallest(torch.from_numpy(scores), k).numpy(), expected)


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
