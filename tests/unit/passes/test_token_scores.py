"""Scores and choices of tokens as plain functions: masks of every form, ties, and the formulas."""

from __future__ import annotations

import pytest
import torch

from mfcompile.passes.token_attention import NEGLIGIBLE
from mfcompile.passes.token_cutting import put_back, take
from mfcompile.passes.token_merging import merge_rest
from mfcompile.passes.token_places import Place
from mfcompile.passes.token_scores import Cit, TokenEvidence, keep_best, weigh
from tests.token_reference import attention_weights

MASKS = [float("-inf"), torch.finfo(torch.float32).min, -1e9, -10000.0]


@pytest.mark.parametrize("lowest", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_are_those_of_the_tokens_that_may_be_seen_whatever_the_mask_is(lowest: float, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 2, 6, 4, generator=generator)
    seen = torch.ones(2, 6, 6, dtype=torch.bool)
    seen[1, :, :2] = False  # two tokens of padding in front: in a causal mask their rows see nothing at all
    seen = seen.tril() if is_causal else seen
    logits = query @ key.transpose(-1, -2) / 2 + torch.where(seen, 0.0, lowest)[:, None]
    weights, valid = weigh(logits, 2, True, NEGLIGIBLE)
    torch.testing.assert_close(weights, attention_weights(query, key, seen))
    assert valid.tolist() == [[True] * 6, [False] * 2 + [True] * 4]
    merged, _ = weigh(logits.flatten(0, 1), 2, True, NEGLIGIBLE)  # samples and heads in one axis
    assert torch.equal(merged, weights)


def test_a_sample_without_any_token_scores_zero() -> None:
    weights, valid = weigh(torch.full((1, 1, 3, 3), float("-inf")), 1, True, NEGLIGIBLE)
    assert not valid.any()
    assert not weights.any()


def test_an_unmasked_attention_is_a_softmax() -> None:
    logits = torch.tensor([[[[-600.0, -601.0], [0.0, 1.0]]]])  # far below what a mask is, and no mask
    weights, valid = weigh(logits, 1, False, NEGLIGIBLE)
    assert torch.equal(weights, logits.softmax(-1))
    assert valid.all()


def test_a_uniform_head_would_turn_ranks_round() -> None:
    live = torch.zeros(1, 1, 10, 10)
    live[..., 0] = 0.09  # a little from each of ten queries
    live[0, 0, 3, 1] = 0.5  # much from one
    both = torch.cat([live, torch.full((1, 1, 10, 10), 0.1)], dim=1)

    def score(attention: torch.Tensor) -> list[float]:
        evidence = TokenEvidence(attention, torch.zeros(1, 10, 4), torch.ones(1, 10, dtype=torch.bool), None)
        return Cit()(evidence)[0, :2].tolist()

    assert score(live) == pytest.approx([0.9, 0.5])
    assert score(both) == pytest.approx([1.0, 1.4])


def test_protected_tokens_come_first_and_padding_last() -> None:
    score = torch.tensor([[0.0, 5.0, 3.0, float("nan"), 9.0, 1.0]])
    protected = torch.tensor([[True, False, False, False, False, False]])
    valid = torch.tensor([[True, True, True, True, False, True]])
    kept = [keep_best(score, protected, valid, count)[0].tolist() for count in range(1, 7)]
    assert kept == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]


def test_of_equal_scores_the_first_stays() -> None:
    nothing = torch.zeros(2, 300)
    assert keep_best(nothing, nothing.bool(), ~nothing.bool(), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_what_is_taken_and_put_back_is_where_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 5, 5, generator=generator)
    kept = torch.tensor([[0, 2], [1, 4], [3, 4]])
    both = take(table, kept, [1, 2], Place(0))
    assert all(
        both[row, i, j] == table[row, a, b]
        for row in range(3)
        for i, a in enumerate(kept[row])
        for j, b in enumerate(kept[row])
    )
    back = put_back(both, kept, [1, 2], Place(0), 5)
    assert torch.equal(take(back, kept, [1, 2], Place(0)), both)
    assert int((back != 0).sum()) == 3 * 4
    shared = take(torch.arange(5.0)[:, None], kept, [1], Place(0), lead=1)  # one for all samples becomes one for each
    assert torch.equal(shared[..., 0], kept.float())
    heads = take(torch.arange(30.0).view(6, 5), kept, [1], Place(0, inner=2))
    assert heads.tolist()[2:4] == [[11.0, 14.0], [16.0, 19.0]]
    last = put_back(table[:, :2], kept, [1], Place(0), 5, torch.ones(3, 5, 5))
    assert torch.equal(last[1, [0, 2, 3]], torch.ones(3, 5))


def test_merging_leaves_padding_out() -> None:
    states = torch.eye(4)[None]
    score, valid = torch.tensor([[1.0, 1.0, 3.0, 8.0]]), torch.tensor([[True, True, True, False]])
    merged = merge_rest(states, torch.tensor([[0]]), score, valid)
    torch.testing.assert_close(merged[0, 0], torch.tensor([0.0, 0.25, 0.75, 0.0]))
    assert torch.equal(merge_rest(states, torch.tensor([[0, 1, 2]]), score, valid)[0, 0], torch.zeros(4))
