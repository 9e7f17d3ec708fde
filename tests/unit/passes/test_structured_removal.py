"""Structured removal: equal to zeros in W_out, in every part of a model; and requests that cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mfcompile
from mfcompile.graph import CapturedGraph
from tests.structured_models import check_removal, largest_difference, outputs, spread_out
from tests.token_models import clip_like, llava_like


@pytest.fixture(scope="module")
def clip() -> tuple[Any, dict[str, torch.Tensor], CapturedGraph]:
    model, batch = clip_like()
    spread_out(model)
    return model, batch, mfcompile.with_token_program(mfcompile.capture(model, batch))


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, torch.Tensor], CapturedGraph]:
    model, batch = llava_like()
    spread_out(model)
    return model, batch, mfcompile.with_token_program(mfcompile.capture(model, batch))


def test_a_clip_like_model_loses_channels_and_heads_of_both_towers(clip: Any) -> None:
    units, smaller = check_removal(*clip)
    assert [(unit.kind, unit.count, unit.region) for unit in units.units] == [
        *[("heads", 4, "vision"), ("channels", 48, "vision")] * 3, *[("heads", 4, "text"), ("channels", 48, "text")] * 2,
    ]  # fmt: skip
    assert not units.refused
    state = smaller.module.state_dict()
    assert list(state) == list(clip[0].state_dict())
    assert state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape == (24, 32)
    assert state["vision_model.encoder.layers.0.mlp.fc1.bias"].shape == (24,)
    assert state["text_model.encoder.layers.1.self_attn.q_proj.bias"].shape == (16,)
    assert state["text_model.encoder.layers.1.self_attn.out_proj.weight"].shape == (32, 16)


def test_a_llava_like_model_loses_groups_of_query_heads_with_their_key_and_value(llava: Any) -> None:
    units, smaller = check_removal(*llava)
    own = [(unit.kind, unit.count, unit.region) for unit in units.units if "language" in unit.name]
    assert own == [("heads", 2, "fusion"), ("channels", 48, "fusion")] * 3
    state = smaller.module.state_dict()
    assert state["model.language_model.layers.0.self_attn.q_proj.weight"].shape == (16, 32)
    assert state["model.language_model.layers.0.self_attn.k_proj.weight"].shape == (8, 32)
    assert state["model.language_model.layers.0.mlp.up_proj.weight"].shape == (24, 32)


def test_nothing_removed_is_the_model_bit_by_bit(clip: Any) -> None:
    model, batch, captured = clip
    same = mfcompile.remove_units(captured, {"vision_model.encoder.layers.0.mlp": ()})
    assert largest_difference(outputs(model, batch), outputs(same.module, batch)) == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.module.state_dict().items())


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ({"vision_model.encoder.layers.0.mlp": range(48)}, "all 48 channels .* at least one has to stay"),
        ({"vision_model.encoder.layers.0.mlp": [48]}, "has channels 0 to 47, and no 48"),
        ({"vision_model.encoder.layers.0.self_attn": [-1]}, "has heads 0 to 3, and no -1"),
        ({"vision_model.encoder.layers.7.mlp": [0]}, "there is no unit of that name.*Units are vision_model.encoder.layers.0"),
    ],
)
def test_requests_that_cannot_be_met(clip: Any, remove: Any, message: str) -> None:
    with pytest.raises(mfcompile.InputError, match=message):
        mfcompile.remove_units(clip[2], remove)
