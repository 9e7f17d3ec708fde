"""Structured removal on tiny models of transformers and timm: removal is zeros in W_out, and what is found where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.structured_models import check_removal, spread_out
from tests.token_models import blip_like
from tests.zoo import families

transformers: Any = pytest.importorskip("transformers")

Built = tuple[nn.Module, dict[str, Any]]


def words(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 90, (2, length))


def t5() -> Built:
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -2:] = 0
    return transformers.T5Model(config), {"input_ids": words(), "attention_mask": mask, "decoder_input_ids": words(5)}


def bart() -> Built:
    config = transformers.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=40, decoder_ffn_dim=40,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BartModel(config), {"input_ids": words(), "decoder_input_ids": words(5)}


def swin() -> Built:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0
    )
    return transformers.SwinModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def albert() -> Built:
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40
    )
    return transformers.AlbertModel(config), {"input_ids": words()}


def phi3() -> Built:
    config = transformers.Phi3Config(
        vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config), {"input_ids": words()}


def neox() -> Built:
    config = transformers.GPTNeoXConfig(
        vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, rotary_pct=0.5
    )
    return transformers.GPTNeoXModel(config), {"input_ids": words()}


def gpt2() -> Built:
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2Model(config), {"input_ids": words()}


def timm_vit() -> Built:
    from tests.zoo.without_torchvision import stand_ins

    with stand_ins("torchvision"):
        timm: Any = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=5, qk_norm=True
    )
    return model, {"x": torch.randn(2, 3, 32, 32)}


CASES: dict[str, tuple[Callable[[], Any], dict[str, int], int]] = {
    "blip": (blip_like, {"heads": 6, "channels": 4}, 0),
    "siglip": (families.siglip, {"heads": 5, "channels": 5}, 0),
    "qwen2vl": (families.qwen2vl, {"heads": 4, "channels": 5}, 0),
    "t5": (t5, {"heads": 6, "channels": 4}, 0),
    "bart": (bart, {"heads": 6, "channels": 4}, 0),
    "swin": (swin, {"heads": 4, "channels": 4}, 0),
    "albert": (albert, {"heads": 1, "channels": 1}, 1),
    "phi3": (phi3, {"heads": 2, "channels": 2}, 0),
    "gpt-neox": (neox, {"heads": 2, "channels": 2}, 0),
    "gpt2": (gpt2, {"heads": 2, "channels": 2}, 0),
    "timm vit": (timm_vit, {"heads": 2, "channels": 2}, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_removal_is_zeros_in_the_output_weight(case: str) -> None:
    build, expected, refused = CASES[case]
    torch.manual_seed(0)
    model, batch = build()
    spread_out(model)
    units, _ = check_removal(model, batch, stored_in_out=case == "gpt2")
    assert Counter(unit.kind for unit in units.units) == expected, units
    assert len(units.refused) == refused, units
