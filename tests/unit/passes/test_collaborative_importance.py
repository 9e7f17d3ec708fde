"""Scores that know of each other (CIM of CoMP), on CLIP-, BLIP- and LLaVA-like models: what Eq. 4 and 7 imply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.passes.unit_scores import unit_scores
from tests.token_models import Batch, blip_like, clip_like, fixed, llava_like
from tests.token_weighting_reference import Array, Heard

FAMILIES = {"clip": clip_like, "blip": blip_like, "llava": llava_like}
TOWERS = {"clip": "vision_model", "blip": "vision_model", "llava": "model.vision_tower"}


def image_attentions(model: nn.Module, name: str) -> list[Any]:
    """Of every layer of the image encoder."""
    return [layer.self_attn for layer in model.get_submodule(f"{TOWERS[name]}.encoder").layers]  # type: ignore[union-attr]


def query_and_key(attention: Any) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of queries and of keys, as views that can be written to."""
    if hasattr(attention, "qkv"):
        width = attention.qkv.weight.shape[1]
        rows = [slice(0, width), slice(width, 2 * width)]
        return [(attention.qkv.weight.data[at], attention.qkv.bias.data[at]) for at in rows]
    return [(layer.weight.data, layer.bias.data) for layer in (attention.q_proj, attention.k_proj)]


def norms(captured: CapturedGraph, batch: Batch, weighting: str) -> dict[str, Tensor]:
    found = mfcompile.calibrate(captured, [batch], weighting=weighting)
    return {name: site.input_norm() for name, site in found.sites.items()}


def first_sample(batch: Batch) -> Batch:
    return {name: tensor[:1] for name, tensor in batch.items()}


def sees_itself_alone(decoder: Any) -> None:
    """Queries and keys that are alike everywhere: rotated, a token's product with itself is far above all others."""
    for layer in decoder.layers:
        for name in ("q_proj", "k_proj"):
            old = getattr(layer.self_attn, name)
            same = nn.Linear(old.in_features, old.out_features)
            nn.init.zeros_(same.weight)
            nn.init.constant_(same.bias, 30.0)
            setattr(layer.self_attn, name, same)


@pytest.mark.parametrize("name", FAMILIES)
def test_uniform_token_scores_rank_units_like_plain_norms_of_tokens_that_are_not_read(name: str) -> None:
    model, batch = FAMILIES[name]()
    for attention in image_attentions(model, name):
        for tensor in query_and_key(attention)[0]:
            tensor.zero_()
    parts = {rf"{re.escape(TOWERS[name])}\.encoder": 17}
    batch = first_sample(batch)
    if name == "llava":
        sees_itself_alone(model.model.language_model)
        parts[r"model\.language_model"] = int(batch["attention_mask"].sum())
    captured = mfcompile.capture(model, batch)
    plain, weighted = norms(captured, batch, "none"), norms(captured, batch, "cip")
    heard = Heard(model, batch)
    for part, tokens in parts.items():
        own = [site for site in plain if re.match(part, site)]
        assert len(own) >= 8
        for site in own:
            read, others = np.zeros(len(plain[site])), tokens
            if name == "clip":  # CLS weighs one, and the others one in all
                read, others = heard.given[site.removesuffix(".weight")][0][0, 0] ** 2, tokens - 1
            rest = plain[site].double().numpy() ** 2 - read
            np.testing.assert_allclose((weighted[site].double().numpy() ** 2 - read) * others, rest, rtol=1e-4, err_msg=site)
            if site.endswith(("fc2.weight", "down_proj.weight")):
                assert_same_ranks(captured, site, plain[site].numpy(), weighted[site].numpy(), read)


def assert_same_ranks(captured: CapturedGraph, site: str, plain: Array, weighted: Array, read: Array) -> None:
    """Eq. 4 and Eq. 3 put channels in one order, without the token that is read."""
    columns = Columns(site, plain.size)
    weights = {site: captured.parameter(site)}
    scores = []
    for found in (plain, weighted):
        rest = torch.from_numpy(np.sqrt(found.astype(np.float64) ** 2 - read))
        scores.append(unit_scores([columns], weights, {site: rest})["mlp"])
    assert torch.equal(scores[0].argsort(), scores[1].argsort())


class Columns:
    """A unit of single channels."""

    name = "mlp"

    def __init__(self, output_weight: str, count: int) -> None:
        self.output_weight, self.count = output_weight, count

    def columns(self, element: int) -> tuple[int]:
        return (element,)


def hide_a_patch(model: nn.Module, name: str, patch: int = 4) -> None:
    """Nobody looks at the patch: its first feature stands out, and keys with such a feature are far from all queries."""
    table = next(item for path, item in model.named_parameters() if "vision" in path and "position_embedding" in path)
    convolution = next(item for path, item in model.named_parameters() if "patch_embedding.weight" in path)
    convolution.data[0] = 0
    table.data[..., 0] = 0
    table.data[..., 1 + patch, 0] = 500.0
    for attention in image_attentions(model, name):
        (query, query_bias), (key, key_bias) = query_and_key(attention)
        for tensor in (query, key, key_bias):
            tensor.zero_()
        query_bias.fill_(1.0)
        key[:, 0] = -9.0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_patch_that_nobody_looks_at_changes_no_weighted_norm(name: str) -> None:
    model, batch = FAMILIES[name]()
    hide_a_patch(model, name)
    other = {**batch, "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][:, :, 8:16, 0:8] *= 100.0  # the fifth of four by four patches
    captured = mfcompile.capture(model, batch)
    own = [site for site in norms(captured, batch, "cip") if site.startswith(f"{TOWERS[name]}.encoder")]
    assert len(own) >= 8
    found = {(kind, at): norms(captured, item, kind) for kind in ("cip", "none") for at, item in enumerate((batch, other))}
    for site in own:
        torch.testing.assert_close(found["cip", 0][site], found["cip", 1][site], rtol=1e-6, atol=0.0)
        if not site.endswith(("out_proj.weight", "projection.weight")):  # what a token takes from others is as before
            assert not torch.allclose(found["none", 0][site], found["none", 1][site], rtol=1e-3), site


HEADS: Mapping[str, tuple[str, str, int]] = {
    "clip": ("vision_model.encoder.layers.0.self_attn", "vision_model_output.last_hidden_state_kept", 11),
    "blip": ("vision_model.encoder.layers.0.self_attn", "last_hidden_state_kept", 5),
    "llava": ("model.language_model.layers.0.self_attn", "logits_kept", 14),
}
"""The site whose second head (with all that shares its key and value) goes, the output that lists what is kept, how many."""


def masks_of_second_head(captured: CapturedGraph, site: str) -> MaskSet:
    """Its rows of queries, keys and values, and the columns that read it."""
    bits = {}
    for path, parameter in captured.module.named_parameters():
        if not path.startswith(f"{site}.") or parameter.ndim != 2:
            continue
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        leaf = path.removeprefix(f"{site}.").partition(".")[0]
        heads = 2 if "language_model" in site else 4
        if leaf in {"out_proj", "projection", "o_proj"}:
            mask.view(len(mask), heads, -1)[:, 1] = False
        else:
            mask.view(3 if leaf == "qkv" else 1, heads, -1)[:, 1] = False
        bits[path] = PackedMask.pack(mask)
    return MaskSet(bits)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_masked_head_chooses_tokens_as_if_it_were_removed(name: str) -> None:
    model, batch = FAMILIES[name]()
    captured = fixed(model, batch)
    site, listed, count = HEADS[name]
    masked = mfcompile.apply_masks(captured, masks_of_second_head(captured, site))
    smaller = mfcompile.remove_units(captured, {site: [1]})

    def kept(graph: CapturedGraph, **options: Any) -> Tensor:
        module = mfcompile.prune_tokens(graph, {site: count}, outputs="shorter", **options).module
        with torch.no_grad():
            result: Tensor = module(**batch)[listed]
        return result

    assert torch.equal(kept(masked), kept(smaller))
    every = {site: torch.ones(4)}
    assert not torch.equal(kept(masked), kept(masked, head_factors=every)), "without Eq. 7 the trap must be there"
