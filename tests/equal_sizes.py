"""Tiny CLIP-, BLIP- and LLaVA-like models whose width, heads, tokens and samples are all of one size."""

from __future__ import annotations

from typing import Any

import torch

from tests.token_models import EOS, IMAGE, PAD, Batch, ids, seeded

SIZE = 10
"""Nine patches and CLS."""

_SIDE = 24
_WIDTHS: dict[str, Any] = {"hidden_size": SIZE, "intermediate_size": SIZE, "num_attention_heads": SIZE}
_VISION: dict[str, Any] = {**_WIDTHS, "num_hidden_layers": 2, "image_size": _SIDE, "patch_size": 8}
_TEXT: dict[str, Any] = {
    **_WIDTHS, "vocab_size": 99, "num_hidden_layers": 2, "max_position_embeddings": SIZE, "bos_token_id": 0,
    "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip


def _batch(words: torch.Tensor) -> Batch:
    images = torch.randn(SIZE, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": images}


def clip_of_one_size() -> tuple[Any, Batch]:
    """Heads of width one; EOS at another place in every sample."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=SIZE)
    words = ids(SIZE, SIZE)
    words[torch.arange(SIZE), torch.arange(SIZE)] = EOS
    return seeded(lambda: CLIPModel(config)), _batch(words)


def blip_of_one_size() -> tuple[Any, Batch]:
    """As many words as image tokens."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    text = {**_TEXT, "encoder_hidden_size": SIZE, "sep_token_id": EOS}
    vision = {**_VISION, "initializer_range": 0.02}  # of 1e-10, which is the default, all image tokens are alike
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=SIZE, image_text_hidden_size=SIZE)
    return seeded(lambda: BlipForImageTextRetrieval(config)), _batch(ids(SIZE, SIZE))


def llava_of_one_size() -> tuple[Any, Batch]:
    """Nine image tokens and one word in the decoder, heads of width two: rotations need pairs."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**_TEXT, head_dim=2, num_key_value_heads=SIZE // 2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION), text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    words = torch.full((SIZE, SIZE), IMAGE)
    words[torch.arange(SIZE), torch.arange(SIZE)] = ids(1, SIZE)[0]
    return seeded(lambda: LlavaForConditionalGeneration(config)), _batch(words)


EQUAL = {"clip": clip_of_one_size, "blip": blip_of_one_size, "llava": llava_of_one_size}
