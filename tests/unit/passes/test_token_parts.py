"""Tokens cut in every part of a model at once, and where all sizes are equal, against eager references."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LxmertConfig, LxmertModel

import mfcompile
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import output_tensors
from tests.equal_sizes import EQUAL, SIZE
from tests.family_reference import REFERENCES
from tests.token_models import IMAGE, PAD, Batch, blip_like, clip_like, fixed, llava_like

CLOSE: Any = {"rtol": 1e-4, "atol": 2e-5}
"""Fused attention sums in another order than loops do; float32 over three layers."""

FAMILIES = {"clip": clip_like, "blip": blip_like, "llava": llava_like}

VISION = {
    "clip": {"vision_model.encoder.layers.0.self_attn": 11, "vision_model.encoder.layers.1.self_attn": 6},
    "blip": {"vision_model.encoder.layers.0.self_attn": 9, "vision_model.encoder.layers.1.self_attn": 5},
    "llava": {"model.vision_tower.encoder.layers.0.self_attn": 11, "model.vision_tower.encoder.layers.1.self_attn": 6},
}
TEXT = {
    "clip": {"text_model.encoder.layers.0.self_attn": 7, "text_model.encoder.layers.1.self_attn": 4},
    "blip": {"text_encoder.encoder.layer.0.attention.self": 6, "text_encoder.encoder.layer.1.attention.self": 4},
    "llava": {"model.language_model.layers.0.self_attn": 17, "model.language_model.layers.1.self_attn": 12},
}
"""Sites behind the text: in a decoder, image tokens among it."""


@cache
def built(name: str) -> tuple[Any, Batch, CapturedGraph]:
    """A model that no test changes, exported once."""
    model, batch = FAMILIES[name]()
    return model, batch, fixed(model, batch)


def run(module: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return output_tensors(module(**batch))


def compare(model: Any, batch: Batch, captured: CapturedGraph, name: str, keep: Mapping[str, int]) -> None:
    """A pruned module gives what the reference does, which is not what the whole model gives."""
    found, dense = run(mfcompile.prune_tokens(captured, keep).module, batch), run(model, batch)
    with torch.no_grad():
        expected = REFERENCES[name](model, batch, keep)
        every = REFERENCES[name](model, batch, {})
    changed = []
    for output, value in expected.items():
        rows = batch["input_ids"] != PAD if output == "logits" else torch.ones(len(value), dtype=torch.bool)
        torch.testing.assert_close(every[output][rows], dense[output][rows], **CLOSE)  # the reference is of this model
        torch.testing.assert_close(found[output][rows], value[rows], **CLOSE)
        changed += [] if torch.allclose(value[rows], every[output][rows], **CLOSE) else [output]
    assert changed  # the reference cut something


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        pytest.param("blip", VISION["blip"], id="blip-vision"),
        pytest.param("blip", TEXT["blip"], id="blip-text"),
        pytest.param("llava", VISION["llava"], id="llava-vision"),
    ],
)
def test_two_sites_in_sequence_equal_the_reference(name: str, keep: Mapping[str, int]) -> None:
    compare(*built(name), name, keep)


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_in_every_modality_at_once_equal_the_reference(name: str) -> None:
    model, batch, captured = built(name)
    keep = {**VISION[name], **TEXT[name]}
    modalities = {site.modality for site in mfcompile.find_token_sites(captured).sites if site.name in keep}
    assert modalities == ({"vision", "text"} if name != "llava" else {"vision"})
    compare(model, batch, captured, name, keep)


def test_image_tokens_of_a_decoder_are_chosen_by_attention_and_not_by_place() -> None:
    """Flat causal attention favours what comes first, so that any score would keep the same; this one is sharp."""
    model, batch = llava_like()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(12.0)
        keep = {"model.language_model.layers.0.self_attn": 12}
        kept = REFERENCES["llava"](model, batch, keep)["logits"].abs().sum(-1) > 0
    for row, words in zip(kept, batch["input_ids"], strict=True):
        places = (words == IMAGE).nonzero().flatten()
        chosen = row[places].nonzero().flatten().tolist()
        assert chosen != list(range(len(chosen)))
    compare(model, batch, fixed(model, batch), "llava", keep)


@pytest.mark.parametrize("name", FAMILIES)
def test_width_heads_tokens_and_samples_of_one_size_are_told_apart(name: str) -> None:
    model, batch = EQUAL[name]()
    captured = fixed(model, batch)
    sites = mfcompile.find_token_sites(captured).sites
    assert {site.tokens for site in sites} == {SIZE}
    assert len(batch["input_ids"]) == SIZE
    first = {site.region: site.name for site in reversed(sites)}
    compare(model, batch, captured, name, dict.fromkeys(first.values(), SIZE - 3))


def test_where_one_token_is_left_the_next_sites_have_nothing_to_cut() -> None:
    """LXMERT's regions: no token of them is protected, so that a small share leaves one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "visual_feat_dim": 12}
    config = LxmertConfig(vocab_size=50, l_layers=1, x_layers=1, r_layers=2, max_position_embeddings=16, **sizes)
    batch = {
        "input_ids": torch.randint(1, 50, (2, 7)),
        "visual_feats": torch.randn(2, 6, 12),
        "visual_pos": torch.rand(2, 6, 4),
    }
    model: nn.Module = LxmertModel(config)
    captured = fixed(model.eval(), batch)
    first, second = (f"encoder.r_layers.{layer}.attention.self" for layer in range(2))
    once = mfcompile.prune_tokens(captured, {first: 1})
    for keep in (0.5, 1):
        again = mfcompile.prune_tokens(captured, {first: 0.1, second: keep})
        assert [str(item) for item in again.diagnostics] == [f"{second}: sites before it leave one token, which stays"]
        expected, found = run(once.module, batch), run(again.module, batch)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(InputError, match=re.escape(second)):
        mfcompile.prune_tokens(captured, {first: 1, second: 2})
