"""CLIP-, BLIP- and LLaVA-like models of transformers, run eagerly with tokens cut in any of their parts, by hand.

Built on the loops of ``token_reference`` and the models' own layers; nothing of the passes is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.token_models import EOS, IMAGE, Batch
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

Keep = Mapping[str, int]
"""Site -> tokens that stay."""


def of_layers(keep: Keep, path: str) -> dict[int, int]:
    """Layer -> tokens that stay, of the sites below a list of layers."""
    return {int(name[len(path) + 1 :].partition(".")[0]): count for name, count in keep.items() if name.startswith(f"{path}.")}


def places_of(cuts: Sequence[Tensor], rows: int, tokens: int) -> Tensor:
    """(rows, tokens left): positions among all tokens after all cuts."""
    places = torch.arange(tokens).expand(rows, -1)
    for kept in cuts:
        places = torch.stack([row[later] for row, later in zip(places, kept, strict=True)])
    return places


def moved(protected: list[list[int]], kept: Tensor) -> list[list[int]]:
    """Where the protected tokens stand among the kept ones."""
    return [[row.tolist().index(item) for item in stays] for row, stays in zip(kept, protected, strict=True)]


def whole(states: Tensor, cuts: Sequence[Tensor], tokens: int) -> Tensor:
    """States at the places that they had, zeros elsewhere."""
    return restored(states, cuts, tokens) if cuts else states


def clip_reference(model: Any, batch: Batch, keep: Keep) -> dict[str, Tensor]:
    """Embeddings and last states of both towers."""
    image, text = model.vision_model, model.text_model
    rows = len(batch["pixel_values"])
    states = image.pre_layrnorm(image.embeddings(batch["pixel_values"]))
    tokens = states.shape[1]
    counts = of_layers(keep, "vision_model.encoder.layers")
    states, cuts = clip_layers(image.encoder.layers, states, counts, [[0]] * rows, None)
    image_embeds = model.visual_projection(image.post_layernorm(states[:, 0]))
    image_states = whole(states, cuts, tokens)
    ends = [[int((row == EOS).nonzero()[0])] for row in batch["input_ids"]]
    states = text.embeddings(input_ids=batch["input_ids"])
    tokens = states.shape[1]
    counts = of_layers(keep, "text_model.encoder.layers")
    states, cuts = clip_layers(text.encoder.layers, states, counts, ends, causal(batch["attention_mask"]))
    states = text.final_layer_norm(states)
    at = [place for (place,) in moved(ends, places_of(cuts, rows, tokens))]
    text_embeds = model.text_projection(states[torch.arange(rows), at])
    return {
        "image_embeds": image_embeds / image_embeds.norm(dim=-1, keepdim=True),
        "text_embeds": text_embeds / text_embeds.norm(dim=-1, keepdim=True),
        "vision_model_output.last_hidden_state": image_states,
        "text_model_output.last_hidden_state": whole(states, cuts, tokens),
    }


def blip_image(model: Any, images: Tensor, keep: Mapping[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Last states of BLIP's image encoder, and the kept positions of every cut."""
    states, cuts = model.vision_model.embeddings(images), []
    for number, layer in enumerate(model.vision_model.encoder.layers):
        normed, attention = layer.layer_norm1(states), layer.self_attn
        fused = attention.qkv(normed).view(*states.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        states = states + attention(normed)[0]
        if number in keep:
            cuts.append(choose(received(attention_weights(fused[0], fused[1])), keep[number], [[0]] * len(states)))
            states = pick(states, cuts[-1])
        states = states + layer.mlp(layer.layer_norm2(states))
    return model.vision_model.post_layernorm(states), cuts


def blip_reference(model: Any, batch: Batch, keep: Keep) -> dict[str, Tensor]:
    """The matching score, the states of the image and those of the text, which attends to what is left of the image."""
    rows, tokens = len(batch["pixel_values"]), model.vision_model.embeddings(batch["pixel_values"]).shape[1]
    image, cuts = blip_image(model, batch["pixel_values"], of_layers(keep, "vision_model.encoder.layers"))
    found = {"last_hidden_state": whole(image, cuts, tokens)}
    counts, mask = of_layers(keep, "text_encoder.encoder.layer"), batch["attention_mask"].bool()
    states, tokens, cuts = model.text_encoder.embeddings(input_ids=batch["input_ids"]), mask.shape[1], []
    for number, layer in enumerate(model.text_encoder.encoder.layer):
        attention = layer.attention.self
        query, key = (heads_of(item(states), attention.num_attention_heads) for item in (attention.query, attention.key))
        added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None]
        states = layer.attention(states, attention_mask=added)[0]
        if number in counts:
            seen = mask[:, None].expand(-1, mask.shape[1], -1)
            score = received(attention_weights(query, key, seen))
            cuts.append(choose(score, counts[number], [[0]] * rows, padding_of(seen, rows)))
            states, mask = pick(states, cuts[-1]), pick(mask[..., None], cuts[-1])[..., 0]
        states = layer.crossattention(states, encoder_hidden_states=image)[0]
        states = layer.feed_forward_chunk(states)
    return {"itm_score": model.itm_head(states[:, 0]), **found, "question_embeds": whole(states, cuts, tokens)}


def llava_image(model: Any, images: Tensor, keep: Mapping[int, int]) -> Tensor:
    """(images * patches, width) of the decoder; patches that were cut are zero in front of the projector."""
    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(images))
    tokens = states.shape[1]
    states, cuts = clip_layers(tower.encoder.layers, states, keep, [[0]] * len(states), None)
    features: Tensor = model.model.multi_modal_projector(whole(states, cuts, tokens)[:, 1:])
    return features.flatten(0, 1)


def llava_reference(model: Any, batch: Batch, keep: Keep) -> dict[str, Tensor]:
    """Logits of all tokens, zero where they were cut, and the image features."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    words, decoder = batch["input_ids"], model.model.language_model
    rows, tokens = words.shape
    features = llava_image(model, batch["pixel_values"], of_layers(keep, "model.vision_tower.encoder.layers"))
    states = decoder.embed_tokens(words).clone()
    states[words == IMAGE] = features
    seen = causal(batch["attention_mask"])
    turn = tuple(table.expand(rows, -1, -1) for table in decoder.rotary_emb(states, torch.arange(tokens)[None]))
    protected = [(row != IMAGE).nonzero().flatten().tolist() for row in words]
    counts = of_layers(keep, "model.language_model.layers")
    cuts: list[Tensor] = []
    for number, layer in enumerate(decoder.layers):
        normed, attention = layer.input_layernorm(states), layer.self_attn
        query, key = (heads_of_width(item(normed), attention.head_dim) for item in (attention.q_proj, attention.k_proj))
        query, key = apply_rotary_pos_emb(query, key, *turn)
        given = {"position_embeddings": turn, "attention_mask": seen[:, None], "use_cache": False}
        states = states + attention(hidden_states=normed, **given)[0]
        if number in counts:
            score = received(attention_weights(query, key.repeat_interleave(attention.num_key_value_groups, 1), seen))
            kept = choose(score, counts[number], protected, padding_of(seen, rows))
            states, turn = pick(states, kept), tuple(pick(table, kept) for table in turn)
            seen = torch.stack([seen[at][row][:, row] for at, row in enumerate(kept)])
            protected, cuts = moved(protected, kept), [*cuts, kept]
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return {"logits": whole(model.lm_head(decoder.norm(states)), cuts, tokens), "image_hidden_states": features}


def heads_of_width(states: Tensor, width: int) -> Tensor:
    """(batch, tokens, heads * width) as (batch, heads, tokens, width)."""
    return states.view(*states.shape[:2], -1, width).transpose(1, 2)


REFERENCES: Mapping[str, Any] = {"clip": clip_reference, "blip": blip_reference, "llava": llava_reference}
