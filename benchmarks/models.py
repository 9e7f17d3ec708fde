"""Models of real size for measurements; weights are random, since cost does not depend on them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from emoji_xvlm.modeling import EmojiXvlm, ModelConfig

BASE = ModelConfig(
    vocab_size=30522,
    width=768,
    heads=12,
    mlp_width=3072,
    vision_layers=12,
    text_layers=6,
    fusion_layers=6,
    embed_dim=256,
    image_px=224,
    patch_px=16,
    max_text_length=40,
)
"""The sizes of the paper's XVLM with a CLIP-B vision tower: 168 prunable tensors, 184 M prunable weights."""


def base_model(seed: int = 0) -> nn.Module:
    """The base-sized model with heavy-tailed weights of a scale of its own per tensor, in eval mode."""
    torch.manual_seed(seed)
    return heavy_tailed(EmojiXvlm(BASE))


def heavy_tailed(model: nn.Module) -> nn.Module:
    """The model in eval mode, every matrix drawn anew: products of two normal draws, times a scale of its own per tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                scale = float(torch.empty(1).uniform_(0.01, 0.04))
                parameter.copy_(torch.empty_like(parameter).normal_(0, scale).mul_(torch.empty_like(parameter).normal_(0, 1)))
    return model.eval()


def base_inputs(batch: int, length: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the base-sized model: (batch, 3, 224, 224) pixels, (batch, length) ids with padding in every second row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[::2, length // 2 :] = 0
    return {
        "pixel_values": torch.randn(batch, 3, 224, 224, generator=generator),
        "input_ids": torch.randint(5, BASE.vocab_size, (batch, length), generator=generator) * mask,
        "attention_mask": mask,
    }
