"""Patterns: what a unit is, which weights go with it, and what of a layer does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfcompile.passes.mask_selection import pruned_by_row
from mfcompile.passes.sparsity_patterns import Blocks, NOfM, Unstructured, parse_pattern


@pytest.mark.parametrize(("text", "pattern"), [
    ("unstructured", Unstructured()), ("2:4", NOfM(2, 4)), (" 1:4 ", NOfM(1, 4)), ("63:64", NOfM(63, 64)), ("4x1", Blocks(4)),
    ("16x1", Blocks(16)), ("1x4", Blocks(1, 4)),
])  # fmt: skip
def test_patterns_are_known_by_name(text: str, pattern: object) -> None:
    assert parse_pattern(text) == pattern


def few_values(*shape: int, seed: int) -> Tensor:
    """With many ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 12), st.data())
def test_n_of_m_marks_the_smallest_of_every_group(rows: int, columns: int, of: int, data: st.DataObject) -> None:
    kept, scores = data.draw(st.integers(1, of - 1)), few_values(rows, columns, seed=data.draw(st.integers(0, 99)))
    found = NOfM(kept, of).smallest(scores)
    assert found.shape == scores.shape
    for row in range(rows):
        for start in range(0, columns, of):
            group = scores[row, start : start + of].tolist()
            order = sorted(range(len(group)), key=lambda index: (group[index], index))
            expected = set(order[: max(len(group) - kept, 0)])
            assert set(found[row, start : start + of].nonzero().flatten().tolist()) == expected


def test_n_of_m_reads_transposed_scores() -> None:
    scores = few_values(8, 6, seed=1)
    assert torch.equal(NOfM(2, 4).smallest(scores.T), NOfM(2, 4).smallest(scores.T.contiguous()))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_rows_lose_the_smallest_and_the_first_of_equals(rows: int, columns: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    scores = few_values(rows, columns, seed=data.draw(st.integers(0, 99)))
    found = pruned_by_row(scores, counts)
    for row, count in enumerate(counts):
        values = scores[row].tolist()
        order = sorted(range(columns), key=lambda index: (values[index], index))
        assert set(found[row].nonzero().flatten().tolist()) == set(order[:count])


def test_many_rows_are_ranked_in_parts() -> None:
    scores = few_values(1000, 7, seed=2)
    counts = [index % 8 for index in range(1000)]
    whole = pruned_by_row(scores, counts)
    assert torch.equal(whole.sum(1), torch.tensor(counts))
    assert torch.equal(whole[900:], pruned_by_row(scores[900:], counts[900:]))
    assert pruned_by_row(torch.zeros(3, 0), [0, 0, 0]).shape == (3, 0)


def test_blocks_are_sums_over_outputs() -> None:
    scores = torch.arange(30.0).reshape(10, 3)
    pattern = Blocks(4)
    assert pattern.unit_grid(10, 3) == (2, 3)
    assert torch.equal(pattern.unit_scores(scores), torch.stack([scores[:4].sum(0), scores[4:8].sum(0)]))
    units = torch.tensor([[True, False, False], [False, False, True]])
    pruned = pattern.pruned_weights(units, (10, 3))
    assert pruned[:, 0].tolist() == [True] * 4 + [False] * 6
    assert pruned[:, 2].tolist() == [False] * 4 + [True] * 4 + [False] * 2
    assert not pruned[:, 1].any()


def test_blocks_are_sums_over_inputs() -> None:
    scores = torch.arange(20.0).reshape(2, 10)
    pattern = Blocks(1, 4)
    assert pattern.unit_weights == 4
    assert pattern.unit_grid(2, 10) == (2, 2)
    assert torch.equal(pattern.unit_scores(scores), torch.stack([scores[:, :4].sum(1), scores[:, 4:8].sum(1)], dim=1))
    pruned = pattern.pruned_weights(torch.tensor([[True, False], [False, True]]), (2, 10))
    assert pruned[0].tolist() == [True] * 4 + [False] * 6
    assert pruned[1].tolist() == [False] * 4 + [True] * 4 + [False] * 2


def test_what_does_not_fit_is_said() -> None:
    assert Blocks(1, 4).remainder(3, 10) == "its last 2 of 10 inputs fill no block of 4 and stay dense"
    assert Blocks(4).remainder(10, 3) == "its last 2 of 10 rows fill no block of 4 and stay dense"
    assert NOfM(2, 4).remainder(3, 10) == "its last 2 of 10 inputs are no group of 4: at most 2 stay"
    for pattern in (Blocks(4), Blocks(1, 4), NOfM(2, 4), Unstructured()):
        assert pattern.remainder(8, 8) is None


def test_a_layer_of_less_than_a_block_has_no_unit() -> None:
    assert Blocks(1, 4).unit_scores(torch.ones(5, 3)).shape == (5, 0)
    pattern = Blocks(16)
    assert pattern.unit_grid(15, 4) == (0, 4)
    assert pattern.unit_scores(torch.ones(15, 4)).shape == (0, 4)
    assert not pattern.pruned_weights(torch.zeros(0, 4, dtype=torch.bool), (15, 4)).any()
