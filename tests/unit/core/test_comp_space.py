"""Steps of a model through its modes: what goes, what it saves, and that what stands in for a graph computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.comp.modes import TokenMode, UnitMode, left_of, smaller_unit, token_modes, unit_modes
from mfcompile.comp.space import ENOUGH, ModelSpace
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.token_sites import TokenSite
from mfcompile.structure import find_units
from tests.token_models import Encoder, fixed, patches, seeded

IMAGE = {"image": patches()}
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-6}
"""Products over fewer channels are summed in another order."""


@pytest.fixture(scope="module")
def dense() -> CapturedGraph:
    return fixed(seeded(Encoder), IMAGE)


def by_number(captured: CapturedGraph, units: Sequence[StructuralUnit]) -> dict[str, Tensor]:
    """Elements with high numbers score most; channels of the second block less than those of the first."""
    return {unit.name: torch.arange(1.0, unit.count + 1) * (2 if "blocks.0" in unit.name else 1) for unit in units}


def space_of(dense: CapturedGraph, caps: Mapping[str, float] | None = None, score: Any = by_number, **how: Any) -> ModelSpace:
    modes: list[UnitMode | TokenMode] = [
        *unit_modes(find_units(dense).units, caps or {}),
        *token_modes(mfcompile.find_token_sites(dense).sites, caps or {}, (0.0,)),
    ]
    return ModelSpace(dense, modes, score, lambda module: 0.0, **how)


def run(module: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(**IMAGE)
    return result


def test_modes_are_regions_of_units_and_modalities_of_tokens(dense: CapturedGraph) -> None:
    space = space_of(dense)
    assert space.modes == ("parameters:vision", "tokens:vision")
    units = space.by_name["parameters:vision"]
    assert isinstance(units, UnitMode)
    assert [(unit.name, unit.kind, unit.count) for unit in units.units] == [
        ("blocks.0.attention", "heads", 2),
        ("blocks.0", "channels", 32),
        ("blocks.1.attention", "heads", 2),
        ("blocks.1", "channels", 32),
    ]


def test_a_step_takes_what_scores_least_and_saves_no_more_than_it_may(dense: CapturedGraph) -> None:
    space = space_of(dense)
    state = space.step(space.start(), "parameters:vision", 0.1)
    assert state is not None
    saved = 1 - space.flops(state)
    assert 0.08 < saved <= 0.1
    channels = {name: elements for name, elements in state.removed.items() if "attention" not in name}
    assert list(channels.values()) == [tuple(range(len(elements))) for elements in channels.values()]  # the lowest go first
    # scores are relative to the mean of their unit: a factor between blocks changes nothing
    assert len(channels["blocks.0"]) == pytest.approx(len(channels["blocks.1"]), abs=1)


def test_a_step_takes_no_more_than_its_share_of_what_a_mode_has_left(dense: CapturedGraph) -> None:
    """A saving that would empty the mode is cut down, of units by their FLOPs, of tokens by their number."""
    space = space_of(dense, mode_step=0.25)
    start = space.start()
    whole = space.flops(start) - space.flops(space_of(dense, {"tokens:vision": 0.0}).least())
    fewer = space.step(start, "parameters:vision", 1.0)
    assert fewer is not None
    units = space.by_name["parameters:vision"]
    assert isinstance(units, UnitMode)
    dearest = max(space._price(start, unit) for unit in units.units)
    assert 0.25 * whole - dearest < space.flops(start) - space.flops(fewer) <= 0.25 * whole
    tokens = space.by_name["tokens:vision"]
    assert isinstance(tokens, TokenMode)
    gone, state = 0, start
    for _ in range(2):
        further = space.step(state, "tokens:vision", 1.0)
        assert further is not None
        state = further
        gone += max(1, int(0.25 * (tokens.most - gone)))
        assert state.gone == {"tokens:vision": gone}


def test_heads_and_channels_stand_in_one_order(dense: CapturedGraph) -> None:
    """A head goes after all channels that score less, however many FLOPs it has (Eq. 1: one threshold per mode)."""

    def score(captured: CapturedGraph, units: Sequence[StructuralUnit]) -> dict[str, Tensor]:
        spread = {unit.name: torch.linspace(0.05, 1.95, unit.count) for unit in units}
        return {**spread, **{unit.name: torch.tensor([0.9, 1.1]) for unit in units if unit.kind == "heads"}}

    space = space_of(dense, score=score)
    channels = {unit.name for mode in space.by_name.values() if isinstance(mode, UnitMode) for unit in mode.units} - {
        "blocks.0.attention", "blocks.1.attention",
    }  # fmt: skip
    for saving, are_heads_left in ((0.15, True), (0.5, False)):
        state = space.step(space.start(), "parameters:vision", saving)
        assert state is not None
        assert set(state.removed) == channels if are_heads_left else set(state.removed) > channels
        assert all(len(state.removed[name]) <= 14 for name in channels) or not are_heads_left  # 14 of 32 score below .9


def test_the_finest_element_goes_where_none_fits(dense: CapturedGraph) -> None:
    def heads_first(captured: CapturedGraph, units: Sequence[StructuralUnit]) -> dict[str, Tensor]:
        return {unit.name: torch.arange(unit.count) + (0.0 if unit.kind == "heads" else 1e3) for unit in units}

    space = space_of(dense, score=heads_first)
    several: Any = space.step(space.start(), "parameters:vision", 0.2)
    assert any("attention" in name for name in several.removed)
    one: Any = space.step(space.start(), "parameters:vision", 1e-9)
    assert sum(len(elements) for elements in one.removed.values()) == 1
    assert not any("attention" in name for name in one.removed)  # a head is many channels


def test_what_stands_in_for_a_graph_computes_and_counts_as_it_does(dense: CapturedGraph) -> None:
    space = space_of(dense)
    state: Any = space.step(space.start(), "parameters:vision", 0.3)
    predicted, stood_in = state.total, run(state.module)
    assert "captured" not in vars(state)  # nothing was rewritten for it
    assert any("attention" in name for name in state.removed)
    settled = space.settle(state)
    assert settled.total == settled.flops.total == predicted
    torch.testing.assert_close(stood_in, run(settled.captured.module), **CLOSE)
    assert not torch.allclose(stood_in, run(dense.module))
    further: Any = space.step(settled, "parameters:vision", 0.2)
    assert all(set(settled.removed[name]) <= set(further.removed[name]) for name in settled.removed)
    predicted, stood_in = further.total, run(further.module)
    assert "captured" not in vars(further)
    assert space.settle(further).flops.total == predicted
    torch.testing.assert_close(stood_in, run(further.captured.module), **CLOSE)


def test_heads_that_choose_tokens_are_gone_before_they_can(dense: CapturedGraph) -> None:
    def heads_first(captured: CapturedGraph, units: Sequence[StructuralUnit]) -> dict[str, Tensor]:
        scores = by_number(captured, units)
        return {**scores, **{unit.name: torch.tensor([1e-3, 1.0]) for unit in units if unit.kind == "heads"}}

    space = space_of(dense, score=heads_first)
    fewer: Any = space.step(space.start(), "tokens:vision", 0.2)
    state: Any = space.step(space.settle(fewer), "parameters:vision", 0.2)
    assert "blocks.0.attention" in state.removed
    assert state.module is state.captured.module  # zeroed heads would still vote for tokens
    assert state.total == state.flops.total


def test_tokens_go_one_at_least_and_as_many_as_the_saving_allows(dense: CapturedGraph) -> None:
    space = space_of(dense)
    one: Any = space.step(space.start(), "tokens:vision", 1e-6)
    assert one.gone == {"tokens:vision": 1}
    several: Any = space.step(space.start(), "tokens:vision", 0.16)
    assert ENOUGH * 0.16 <= 1 - space.flops(several) <= 0.16
    assert several.gone == {"tokens:vision": 2}
    assert space.keep(several.gone) == {"blocks.0.attention": 7 / 9}
    assert space.changes(one, several) == {"tokens:vision": 1}
    assert "tokens of blocks.0.attention: 8 of 10 stay" in several.captured.specialised  # CLS is one of them


def test_at_its_cap_a_mode_gives_no_step(dense: CapturedGraph) -> None:
    space = space_of(dense, {"parameters:vision": 0.25, "tokens:vision": 0.5})
    least = space.least()
    assert {name: len(elements) for name, elements in least.removed.items()} == {"blocks.0": 8, "blocks.1": 8}
    assert least.gone == {"tokens:vision": 4}
    assert [space.step(least, mode, 0.5) for mode in space.modes] == [None, None]
    whole = space_of(dense).least()
    assert {name: len(elements) for name, elements in whole.removed.items()} == {
        "blocks.0.attention": 1, "blocks.0": 31, "blocks.1.attention": 1, "blocks.1": 31,
    }  # fmt: skip
    assert whole.gone == {"tokens:vision": 8}
    assert space_of(dense).flops(whole) < 0.3


def test_a_unit_of_which_some_is_gone_is_numbered_anew() -> None:
    unit = StructuralUnit("heads", "heads", 3, "vision", "out.weight", ((0, 1), (2, 3), (4, 5)))
    assert left_of(unit, (1,)) == [0, 2]
    smaller = smaller_unit(unit, [0, 2])
    assert (smaller.count, smaller.inputs) == (2, ((0, 1), (2, 3)))
    strided = StructuralUnit("groups", "heads", 2, "vision", "out.weight", ((0, 2), (1, 3)))
    assert smaller_unit(strided, [1]).inputs == ((0, 1),)


def site(name: str, region: str, modality: str, tokens: int = 10, protected: int = 1) -> TokenSite:
    return TokenSite(name, region, tokens, protected, "add", modality=modality)


def test_tokens_that_run_among_others_are_a_mode_of_their_own() -> None:
    sites = [site(f"tower.{index}", "vision", "vision") for index in range(4)]
    sites += [site(f"decoder.{index}", "fusion", "vision") for index in range(8)]
    sites += [site("words", "text", "text"), site("read", "fusion", "text"), site("full", "vision", "vision", 3, 2)]
    modes = token_modes(sites, {"tokens:vision": 0.5}, (0.25, 0.5, 0.75))
    assert [(mode.name, mode.is_text) for mode in modes] == [
        ("tokens:vision", False), ("tokens:vision@fusion", False), ("tokens:text", True), ("tokens:text@fusion", True),
    ]  # fmt: skip
    assert [item.name for item in modes[0].sites] == ["tower.1", "tower.2", "tower.3"]
    assert [item.name for item in modes[1].sites] == ["decoder.2", "decoder.4", "decoder.6"]
    assert [mode.most for mode in modes] == [4, 8, 8, 8]
    assert modes[0].keep(3) == dict.fromkeys(("tower.1", "tower.2", "tower.3"), 6 / 9)
    assert modes[0].keep(0) == {}
    with pytest.raises(InputError, match="give depths between 0 and 1"):
        token_modes(sites, {}, (1.5,))
