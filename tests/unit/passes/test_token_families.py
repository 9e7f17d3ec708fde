"""Token pruning on CLIP-, BLIP- and LLaVA-like models against eager references that share no code with the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import output_tensors
from tests.token_models import EOS, IMAGE, PAD, Batch, blip_like, clip_like, fixed, llava_like
from tests.token_reference import (
    attention_weights,
    causal,
    choose,
    clip_layers,
    heads_of,
    padding_of,
    pick,
    received,
    restored,
)

CLOSE: Any = {"rtol": 1e-4, "atol": 2e-5}
"""Fused attention sums in another order than loops do; float32 over three layers."""

Family = tuple[Any, Batch, CapturedGraph]


def run(module: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return output_tensors(module(**batch))


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def clip() -> Family:
    model, batch = clip_like()
    return model, batch, fixed(model, batch)


@pytest.fixture(scope="module")
def blip() -> Family:
    model, batch = blip_like()
    return model, batch, fixed(model, batch)


@pytest.fixture(scope="module")
def llava() -> Family:
    model, batch = llava_like()
    return model, batch, fixed(model, batch)


def test_sites_say_whose_tokens_can_be_cut(blip: Family, llava: Family) -> None:
    texts = [site for site in mfcompile.find_token_sites(blip[2]).sites if site.name.startswith("text")]
    assert [(site.region, site.modality) for site in texts] == [("text", "text"), ("fusion", "text")]  # it has seen the image
    decoder = [site for site in mfcompile.find_token_sites(llava[2]).sites if "language" in site.name]
    assert [(site.region, site.modality) for site in decoder] == [("fusion", "vision")] * 3


@pytest.mark.parametrize("name", ["clip", "blip", "llava"])
def test_keeping_every_token_at_every_site_changes_no_bit(name: str, request: pytest.FixtureRequest) -> None:
    model, batch, captured = request.getfixturevalue(name)
    sites = mfcompile.find_token_sites(captured).sites
    expected = {"clip": {"vision", "text"}, "blip": {"vision", "text", "fusion"}, "llava": {"vision", "fusion"}}
    assert {site.region for site in sites} == expected[name]
    pruned = mfcompile.prune_tokens(captured, {site.name: site.tokens for site in sites})
    assert len([line for line in pruned.specialised if line.startswith("tokens of")]) == len(sites)
    equal(run(pruned.module, batch), run(model, batch))


def clip_vision_reference(model: Any, batch: Batch, keep: dict[int, int]) -> tuple[Tensor, Tensor]:
    tower = model.vision_model
    states = tower.pre_layrnorm(tower.embeddings(batch["pixel_values"]))
    states, cuts = clip_layers(tower.encoder.layers, states, keep, [[0]] * len(states), None)
    return model.visual_projection(tower.post_layernorm(states[:, 0])), restored(states, cuts, 17)


def test_two_vision_sites_of_clip_equal_the_reference(clip: Family) -> None:
    model, batch, captured = clip
    path = "vision_model.encoder.layers.{}.self_attn"
    pruned = mfcompile.prune_tokens(captured, {path.format(0): 11, path.format(1): 6})
    found = run(pruned.module, batch)
    with torch.no_grad():
        embeds, states = clip_vision_reference(model, batch, {0: 11, 1: 6})
    torch.testing.assert_close(found["image_embeds"], embeds / embeds.norm(dim=-1, keepdim=True), **CLOSE)
    torch.testing.assert_close(found["vision_model_output.last_hidden_state"], states, **CLOSE)
    assert int((states.abs().sum(-1) == 0).sum()) == 2 * 11  # the reference really dropped some


def test_text_sites_of_clip_keep_eos_and_move_its_index(clip: Family) -> None:
    model, batch, captured = clip
    path = "text_model.encoder.layers.{}.self_attn"
    pruned = mfcompile.prune_tokens(captured, {path.format(0): 7, path.format(1): 4})
    found = run(pruned.module, batch)
    tower, mask = model.text_model, batch["attention_mask"]
    places = [[int((row == EOS).nonzero())] for row in batch["input_ids"]]
    with torch.no_grad():
        states = tower.embeddings(input_ids=batch["input_ids"])
        states, cuts = clip_layers(tower.encoder.layers, states, {0: 7, 1: 4}, places, causal(mask))
        states = tower.final_layer_norm(states)
        kept = torch.stack([first[later] for first, later in zip(*cuts, strict=True)])
        at = [row.tolist().index(place[0]) for row, place in zip(kept, places, strict=True)]
        embeds = model.text_projection(torch.stack([states[sample, index] for sample, index in enumerate(at)]))
    assert at != [place[0] for place in places]  # the index must really move
    torch.testing.assert_close(found["text_embeds"], embeds / embeds.norm(dim=-1, keepdim=True), **CLOSE)


def test_image_tokens_of_blip_are_cut_in_its_cross_attention_too(blip: Family) -> None:
    model, batch, captured = blip
    pruned = mfcompile.prune_tokens(captured, {"vision_model.encoder.layers.0.self_attn": 9})
    found = run(pruned.module, batch)
    with torch.no_grad():
        states = model.vision_model.embeddings(batch["pixel_values"])
        first, second = model.vision_model.encoder.layers
        parts = first.self_attn.qkv(first.layer_norm1(states)).view(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
        states = states + first.self_attn(first.layer_norm1(states))[0]
        kept = choose(received(attention_weights(parts[0], parts[1])), 9, [[0], [0]])
        states = pick(states, kept)
        states = states + first.mlp(first.layer_norm2(states))
        image = model.vision_model.post_layernorm(second(states))
        text = model.text_encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(2, 9, dtype=torch.long), return_dict=True,
        )  # fmt: skip
        score = model.itm_head(text.last_hidden_state[:, 0])
    torch.testing.assert_close(found["itm_score"], score, **CLOSE)
    torch.testing.assert_close(found["last_hidden_state"], restored(image, [kept], 17), **CLOSE)


def llava_reference(model: Any, batch: Batch, keep: dict[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Logits at kept positions, and the positions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    given: dict[str, Any] = {}
    decoder = model.model.language_model

    def note(_: Any, args: Any, kwargs: Any) -> None:
        given.update(kwargs)

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    model(**batch)
    handle.remove()
    states, seen = given["inputs_embeds"], causal(batch["attention_mask"])
    cosine, sine = decoder.rotary_emb(states, torch.arange(24)[None])
    cosine, sine = (table.expand(2, -1, -1) for table in (cosine, sine))
    protected = [(row != IMAGE).nonzero().flatten().tolist() for row in batch["input_ids"]]
    cuts: list[Tensor] = []
    for number, layer in enumerate(decoder.layers):
        normed, attention = layer.input_layernorm(states), layer.self_attn
        query, key = heads_of(attention.q_proj(normed), 4), heads_of(attention.k_proj(normed), 2)
        query, key = apply_rotary_pos_emb(query, key, cosine, sine)
        states = (
            states
            + attention(
                hidden_states=normed, position_embeddings=(cosine, sine), attention_mask=seen[:, None], use_cache=False
            )[0]
        )
        if number in keep:
            score = received(attention_weights(query, key.repeat_interleave(2, 1), seen))
            kept = choose(score, keep[number], protected, padding_of(seen, 2))
            states, cosine, sine = pick(states, kept), pick(cosine, kept), pick(sine, kept)
            seen = torch.stack([seen[at][row][:, row] for at, row in enumerate(kept)])
            protected = [[row.tolist().index(item) for item in stays] for row, stays in zip(kept, protected, strict=True)]
            cuts.append(kept)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return model.lm_head(decoder.norm(states)), cuts


def test_image_tokens_of_a_decoder_are_cut_with_mask_and_rotary_positions(llava: Family) -> None:
    model, batch, captured = llava
    path = "model.language_model.layers.{}.self_attn"
    pruned = mfcompile.prune_tokens(captured, {path.format(0): 17, path.format(1): 12})
    found = run(pruned.module, batch)["logits"]
    with torch.no_grad():
        logits, cuts = llava_reference(model, batch, {0: 17, 1: 12})
    places = torch.stack([first[later] for first, later in zip(*cuts, strict=True)])
    for sample, row in enumerate(batch["input_ids"]):
        assert {int(place) for place in (row != IMAGE).nonzero()} <= set(places[sample].tolist())
        real = [at for at, place in enumerate(places[sample].tolist()) if int(row[place]) != PAD]
        torch.testing.assert_close(found[sample, places[sample][real]], logits[sample, real], **CLOSE)


def test_a_share_of_image_tokens_leaves_text_out_of_the_count(llava: Family) -> None:
    _, _, captured = llava
    site = next(site for site in mfcompile.find_token_sites(captured).sites if site.region == "fusion")
    assert (site.tokens, site.protected) == (24, 8)
    pruned = mfcompile.prune_tokens(captured, {site.name: 0.25})
    assert f"tokens of {site.name}: 12 of 24 stay" in pruned.specialised
    with pytest.raises(mfcompile.InputError, match="8 are protected, so that 8 to 24 can stay"):
        mfcompile.prune_tokens(captured, {site.name: 7})


def test_gradients_reach_every_weight_that_they_reached(clip: Family) -> None:
    model, batch, captured = clip
    pruned = mfcompile.prune_tokens(captured, {"vision_model.encoder.layers.0.self_attn": 0.5})
    output_tensors(pruned.module(**batch))["logits_per_image"].sum().backward()  # type: ignore[no-untyped-call]
    graded = {name for name, parameter in pruned.module.named_parameters() if parameter.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    output_tensors(model(**batch))["logits_per_image"].sum().backward()  # type: ignore[no-untyped-call]
    assert graded == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None


def test_masks_go_on_top(clip: Family) -> None:
    _, batch, captured = clip
    pruned = mfcompile.prune_tokens(captured, {"vision_model.encoder.layers.0.self_attn": 0.5})
    regions = mfcompile.infer_regions(pruned)
    assert regions.pruned_sites == mfcompile.infer_regions(captured).pruned_sites
    statistics = mfcompile.calibrate(pruned, [batch], regions=regions)
    masks = mfcompile.select_masks(pruned, regions, statistics, sparsity=0.5)
    masked = mfcompile.apply_masks(pruned, masks)
    again = mfcompile.prune_tokens(mfcompile.apply_masks(captured, masks), {"vision_model.encoder.layers.0.self_attn": 0.5})
    assert masked.masks is masks
    assert again.masks is masks
