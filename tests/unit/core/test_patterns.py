"""Patterns: what each kind matches, which one wins, and what a pattern without a match is told."""

from __future__ import annotations

import pytest
from torch import nn

from mfcompile.errors import InputError
from mfcompile.patterns import WeightNames, matches, select, specificity, weight_names


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(2, 2)


MODEL = Tower()
WEIGHTS = {
    "layers.0.up.weight": weight_names(MODEL, "layers.0.up.weight", region="vision"),
    "layers.1.up.weight": weight_names(MODEL, "layers.1.up.weight", region="text"),
    "head.weight": weight_names(MODEL, "head.weight", ["layers.0.up.weight"], "text"),
}
FIRST, SECOND, HEAD = WEIGHTS


def test_names_hold_aliases_and_the_classes_around_them() -> None:
    assert WEIGHTS[FIRST] == WeightNames((FIRST,), frozenset({"Linear", "Block", "ModuleList"}), "vision")
    assert WEIGHTS[HEAD].fqns == (HEAD, FIRST)
    assert WEIGHTS[HEAD].classes == {"Linear", "Block", "ModuleList"}
    assert weight_names(nn.Linear(2, 2), "weight").classes == frozenset()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.1.up.weight", {SECOND}),
        ("layers.1", {SECOND}),
        ("layers", {FIRST, SECOND, HEAD}),  # the head is tied to the first layer
        ("layer", set()),
        ("layers.1.u", set()),
        ("layers.*", {FIRST, SECOND, HEAD}),
        ("*.1.*", {SECOND}),
        ("layers.[1-9].up.weight", {SECOND}),
        ("*.1", {SECOND}),  # a glob over the path of a submodule
        ("*[0-1].up", {FIRST, SECOND, HEAD}),
        ("lay*s", {FIRST, SECOND, HEAD}),
        ("*.u", set()),
        ("LAYERS.*", set()),
        ("re:layers", {FIRST, SECOND, HEAD}),
        (r"re:layers\.1\.", {SECOND}),
        ("re:up", set()),  # from the start
        (r"re:.*up\.weight$", {FIRST, SECOND, HEAD}),
        ("region:text", {SECOND, HEAD}),
        ("region:tex", set()),
        ("Block", {FIRST, SECOND, HEAD}),
        ("Linear", {FIRST, SECOND, HEAD}),
        ("Lin", set()),
        ("Tower", set()),
    ],
)
def test_what_a_pattern_matches(pattern: str, expected: set[str]) -> None:
    assert {name for name, names in WEIGHTS.items() if matches(pattern, names)} == expected


def test_a_bad_expression_is_refused() -> None:
    with pytest.raises(InputError, match=r"the pattern 're:layers\.\(' is not a valid regular expression: missing \)"):
        matches("re:layers.(", WEIGHTS[FIRST])


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [("layers.1.*", "layers.*"), ("layers.1.up.weight", "layers.1.*"), ("layers.1", "*"), (r"re:layers\.1.*", "re:.*")],
)
def test_literal_characters_make_a_pattern_narrow(narrow: str, wide: str) -> None:
    assert specificity(narrow) > specificity(wide)


@pytest.mark.parametrize("order", [1, -1])
def test_the_most_specific_pattern_wins_wherever_it_stands(order: int) -> None:
    patterns = ["*", "layers.1.*", "layers.1.up.weight"][::order]
    assert select(patterns, WEIGHTS, what="regions") == {FIRST: "*", SECOND: "layers.1.up.weight", HEAD: "*"}


def test_among_equals_the_later_wins() -> None:
    assert select(["*.1.*", "*.up*"], WEIGHTS, what="regions")[SECOND] == "*.up*"
    assert select(["*.up*", "*.1.*"], WEIGHTS, what="regions")[SECOND] == "*.1.*"
    assert select(["*.0.*", "*0.u*"], WEIGHTS, what="regions")[FIRST] == "*0.u*"


def test_nothing_matches_nothing() -> None:
    assert select([], WEIGHTS, what="ignore") == {}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layers.1.upp.weight", "layers.1.up.weight"),
        ("layer.*", "layers"),
        ("re:hed.*", "head"),
        ("Linaer", "the class Linear"),
        ("up", "layers.0.up"),  # the whole path of what is called so further down
    ],
)
def test_a_pattern_without_a_match_names_near_ones(pattern: str, near: str) -> None:
    with pytest.raises(InputError, match=r"ignore: the pattern '.*' matches no linear weight of the model\. Nearest") as caught:
        select(["*", pattern], WEIGHTS, what="ignore")
    assert near in str(caught.value).partition("Nearest names: ")[2].partition(". Use")[0].split(", ")


@pytest.mark.parametrize("pattern", ["blocks.*", "re:bloc", "block.up"])
def test_classes_are_no_near_names_of_a_path(pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        select([pattern], WEIGHTS, what="ignore")
    assert "Block" not in str(caught.value)


def test_an_unknown_region_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"targets: the pattern 'region:audio' matches no weight; .* regions are text, vision"):
        select(["region:audio"], WEIGHTS, what="targets")


def test_one_pattern_may_be_given_as_it_is() -> None:
    """A string is one pattern, not a sequence of letters."""
    assert select("layers.1.*", WEIGHTS, what="targets") == {SECOND: "layers.1.*"}
