"""Pruners in one word: the grammar, labels, defaults, and refusals."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes.criteria.base import Criterion, Need, SiteData
from mfcompile.passes.criteria.registry import names, pruner
from mfcompile.passes.variants import default_criteria, parse_word, read_variant, read_variants


@dataclass(frozen=True)
class Mine(Criterion):
    """A user's own criterion."""

    power: float = 2.0
    name: ClassVar[str] = "mine"

    def score(self, site: SiteData) -> Tensor:
        return site.weight.abs() ** self.power


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("multiflow", {"criterion": "multiflow"}),
        ("multiflow@score-global", {"criterion": "multiflow", "allocation": "score-global"}),
        ("wanda:2:4", {"criterion": "wanda", "pattern": "2:4"}),
        ("magnitude@uniform:4x1", {"criterion": "magnitude", "allocation": "uniform", "pattern": "4x1"}),
        ("multiflow+sparsegpt", {"criterion": "multiflow", "update": "sparsegpt"}),
        ("wanda:2:4+sparsegpt", {"criterion": "wanda", "pattern": "2:4", "update": "sparsegpt"}),
        ("chita++", {"criterion": "chita++"}),
        ("chita+++sparsegpt", {"criterion": "chita++", "update": "sparsegpt"}),
        ("itersnip,steps=20", {"criterion": "itersnip", "criterion_options": {"steps": 20}}),
        ("chita++,steps=2,ridge=1e-5", {"criterion": "chita++", "criterion_options": {"steps": 2, "ridge": 1e-5}}),
        ("lamp+sparsegpt,damping=0.1", {"criterion": "lamp", "update": "sparsegpt", "update_options": {"damping": 0.1}}),
        ("a,x=no@b:c+d,y=true", {"criterion": "a", "allocation": "b", "pattern": "c", "update": "d",
                                 "criterion_options": {"x": "no"}, "update_options": {"y": True}}),
    ],
)  # fmt: skip
def test_words_are_taken_apart(word: str, parts: dict[str, Any]) -> None:
    given = {key: value for key, value in parse_word(word).items() if value}
    assert given == {**parts, "label": word}


@pytest.mark.parametrize("word", ["", "@uniform", ":2:4", "multiflow@", "wanda:", "a@b@c:d@e", "lamp+a+b,c"])
def test_a_word_that_does_not_follow_the_grammar_is_answered_with_it(word: str) -> None:
    with pytest.raises(InputError, match=r"CRITERION\[,OPTION|is unknown|is no option"):
        read_variant(word)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("multiflw", "'multiflw'.*did you mean multiflow"),
        ("multiflow@elsewhere", "'multiflow@elsewhere'.*allocation='elsewhere' is unknown"),
        ("multiflow:3:2", r"1 <= N < M"),
        ("multiflow+magic", "update='magic' is unknown"),
        ("wanda@uniform:2:4", "there is nothing to allocate"),
        ("itersnip,stepps=3", "has no option 'stepps'"),
        ("itersnip,steps", "'steps' is no option"),
        (Mine, r"make an object of it: Mine\(\)"),
        ({"criterium": "lamp"}, "unknown key 'criterium'"),
        ({"pattern": "2:4"}, "names no criterion"),
    ],
)
def test_mistakes_are_named(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_variant(given)


def test_objects_and_mappings_get_a_label() -> None:
    assert read_variant(Mine()).label == "mine"
    built = read_variant({"criterion": Mine(3.0), "allocation": {"*": 0.5}, "pattern": "4x1"})
    assert (built.label, built.sets_sparsity) == ("mine@layers:4x1", True)
    words = {"criterion": "itersnip", "criterion_options": {"steps": 2}, "update": "sparsegpt", "update_options": {"passes": 1}}
    assert read_variant(words).label == "itersnip,steps=2+sparsegpt,passes=1"
    assert read_variant({"criterion": "lamp", "label": "other"}).label == "other"


def test_a_variant_says_what_it_stands_for() -> None:
    told = read_variant("multiflow").describe()
    assert (told["allocation"], told["is_allocation_chosen"], told["needs"]) == ("magnitude-per-region", False, ["statistics"])
    assert read_variant("wanda:2:4").describe()["allocation"] == "set by the pattern"
    assert read_variant("random").describe()["is_floor"] is True


def test_a_pattern_that_sets_its_sparsity_is_asked_for_none() -> None:
    assert read_variant("wanda:2:4").options(0.9, 0).sparsity is None
    assert read_variant("wanda:4x1").options(0.9, 0).sparsity == 0.9


def test_an_update_gets_the_padding_mask_and_options_of_its_own_win() -> None:
    assert read_variant("lamp").options(0.5, 0, padding_mask="m").update_options == {}
    assert read_variant("lamp+sparsegpt").options(0.5, 0, padding_mask="m").update_options == {"padding_mask": "m"}
    own = read_variant("lamp+sparsegpt,padding_mask=n")
    assert own.options(0.5, 0, padding_mask="m").update_options == {"padding_mask": "n"}


def test_defaults_need_no_gradients_unless_there_is_a_loss() -> None:
    without = read_variants(None, has_loss=False)
    assert {item.label for item in without} == {
        name for name in names() if Need.GRADIENTS not in pruner(name).needs and name != "multiflow-inverted"
    }
    assert without[-1].label == "random"
    with_loss = [item.label for item in read_variants(None, has_loss=True)]
    assert set(with_loss) == {item.label for item in without} | {"snip"}


def test_the_floor_is_added_once() -> None:
    assert [item.label for item in read_variants(["lamp"], has_loss=False)] == ["lamp", "random"]
    assert [item.label for item in read_variants(["random", "lamp"], has_loss=False)] == ["random", "lamp"]
    assert [item.label for item in read_variants(["lamp"], has_loss=False, floor=False)] == ["lamp"]


def test_a_criterion_that_the_source_brings_is_meant_by_its_name() -> None:
    mine = Mine(5.0)
    assert default_criteria(has_loss=False, own=mine)[0] is mine
    chosen = read_variants(["mine@uniform"], has_loss=False, own=mine, floor=False)[0]
    assert (chosen.criterion, chosen.allocation, chosen.label) == (mine, "uniform", "mine@uniform")


@pytest.mark.parametrize(
    ("given", "message"), [([], "is empty"), ("multiflow", "give a list"), (["lamp", "lamp"], "'lamp' is there twice")]
)
def test_lists_that_cannot_be_compared(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_variants(given, has_loss=False)
