"""Where a view has a factor of an axis: told by the product of sizes before it, checked against torch's own order."""

from __future__ import annotations

from math import prod

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfcompile.passes.token_places import Place, place_in_view

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5)


def splits(total: int) -> st.SearchStrategy[list[int]]:
    """Ways to write a number as sizes."""

    def build(cuts: list[int]) -> list[int]:
        sizes, rest = [], total
        for cut in cuts:
            if rest % cut == 0:
                sizes.append(cut)
                rest //= cut
        return [*sizes, rest]

    return st.lists(st.sampled_from([1, 2, 3, 4]), max_size=4).map(build)


@given(st.data())
def test_a_place_is_where_the_numbers_of_the_axis_are(data: st.DataObject) -> None:
    before = data.draw(SHAPES)
    after = data.draw(splits(prod(before)))
    axis = data.draw(st.integers(0, len(before) - 1))
    size = before[axis]
    numbers = torch.arange(size).view([-1 if at == axis else 1 for at in range(len(before))]).expand(before).reshape(after)
    found = place_in_view(before, after, Place(axis), size)
    if found is None:
        return
    assert after[found.axis] == found.outer * size * found.inner
    index = torch.arange(after[found.axis]) // found.inner % size
    wanted = index.view([-1 if at == found.axis else 1 for at in range(len(after))]).expand(after)
    assert torch.equal(numbers, wanted)
    assert place_in_view(after, before, found, size) == Place(axis) or size == 1


@pytest.mark.parametrize(
    ("before", "after", "axis", "expected"),
    [
        ((2, 4, 4), (2, 4, 2, 2), 1, Place(1)),  # width of the size of the tokens
        ((4, 4, 4), (4, 2, 2, 4), 1, None),  # tokens cut into a grid
        ((4, 4, 4), (4, 4, 2, 2), 0, Place(0)),
        ((2, 8, 6), (16, 6), 1, Place(0, outer=2)),
        ((2, 8, 6), (16, 6), 0, Place(0, inner=8)),
        ((2, 3, 8, 6), (6, 8, 6), 2, Place(1)),
        ((2, 8, 6), (2, 1, 8, 6), 1, Place(2)),
        ((2, 8, 6), (4, 4, 6), 1, None),
        ((2, 9, 6), (2, 3, 3, 6), 1, None),
    ],
)
def test_axes_of_equal_sizes(before: tuple[int, ...], after: tuple[int, ...], axis: int, expected: Place | None) -> None:
    assert place_in_view(before, after, Place(axis), before[axis]) == expected


def test_free_sizes() -> None:
    batch = sympy.Symbol("s0", positive=True, integer=True)
    assert place_in_view((batch, 8, 6), (batch, 8, 2, 3), Place(1), 8) == Place(1)
    assert place_in_view((batch, 8, 6), (8 * batch, 6), Place(1), 8) == Place(0, outer=batch)
    assert place_in_view((8 * batch, 6), (batch, 8, 6), Place(0, outer=batch), 8) == Place(1)
    assert place_in_view((batch, 8, 6), (4 * batch, 2, 6), Place(1), 8) is None
    assert place_in_view((batch, 8, 6), (batch, 48), Place(0), batch) == Place(0)
