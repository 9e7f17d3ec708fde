"""What may be asked of token pruning: how many tokens stay, scored by what, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.passes.token_site_cut import kept_count
from tests.token_models import Encoder, fixed, patches, seeded


@cache
def encoder() -> CapturedGraph:
    """A model that no test changes, exported once."""
    return fixed(seeded(Encoder), {"image": patches()})


@pytest.mark.parametrize(
    ("keep", "tokens", "protected", "count"),
    [(0.7, 197, 1, 139), (0.7, 139, 1, 98), (1.0, 9, 2, 9), (0.01, 9, 1, 2), (4, 9, 1, 4)],
)
def test_shares_count_what_is_not_protected(keep: int | float, tokens: int, protected: int, count: int) -> None:
    assert kept_count(keep, tokens, protected, "here") == count


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "1 to 10 can stay"),
        (11, "1 to 10 can stay"),
        (0.0, "a share is above 0"),
        (1.5, "a share is above 0"),
        (True, "give a number"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(keep: Any, message: str) -> None:
    captured = encoder()
    with pytest.raises(mfcompile.InputError, match=message):
        mfcompile.prune_tokens(captured, {"blocks.0.attention": keep})


def test_a_scorer_of_another_shape_is_refused() -> None:
    captured = encoder()
    with pytest.raises(mfcompile.InputError, match=r"not \(batch, tokens\)"):
        mfcompile.prune_tokens(captured, {"blocks.0.attention": 5}, scorer=lambda evidence: evidence.states)
    with pytest.raises(mfcompile.InputError, match="choose one of cit"):
        mfcompile.prune_tokens(captured, {"blocks.0.attention": 5}, scorer="best")
    with pytest.raises(mfcompile.InputError, match="rest='mean'"):
        mfcompile.prune_tokens(captured, {"blocks.0.attention": 5}, rest="mean")
