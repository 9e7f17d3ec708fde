"""Tiny models for the tests of passes, capture and compile: seeded, trained on nothing, quick."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

import mfcompile

VOCABULARY, WIDTH, IMAGE_PX, PATCH_PX = 40, 8, 8, 4
IMAGE_TOKENS = (IMAGE_PX // PATCH_PX) ** 2

Batch = dict[str, Tensor]


class Attention(nn.Module):
    """Multi-head attention, written out."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        def split(tensor: Tensor) -> Tensor:
            return tensor.view(*tensor.shape[:2], self.heads, -1).transpose(1, 2)

        query, key, value = split(self.query(states)), split(self.key(context)), split(self.value(context))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(-1) @ value
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a context, and an MLP."""

    def __init__(self, is_fusion: bool = False) -> None:
        super().__init__()
        self.attention = Attention()
        self.cross = Attention() if is_fusion else None
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3 if is_fusion else 2)])

    def forward(self, states: Tensor, bias: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        normed = self.norms[0](states)
        states = states + self.attention(normed, normed, bias)
        if self.cross is not None:
            states = states + self.cross(self.norms[2](states), context)
        result: Tensor = states + self.down(torch.relu(self.up(self.norms[1](states))))
        return result


class TinyVlm(nn.Module):
    """Vision, text and fusion stacks. Padding is inert: it is masked as a key, and positions count tokens only."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH_PX, stride=PATCH_PX)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(32, WIDTH)
        self.vision = nn.ModuleList([Layer() for _ in range(layers)])
        self.text = nn.ModuleList([Layer() for _ in range(layers)])
        self.fusion = nn.ModuleList([Layer(is_fusion=True) for _ in range(layers)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        image = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.vision:
            image = layer(image)
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        text = self.embedding(input_ids) + self.positions(places)
        bias = (1.0 - attention_mask[:, None, None, :].to(text.dtype)) * -1e9
        for layer in self.text:
            text = layer(text, bias)
        fused = text
        for layer in self.fusion:
            fused = layer(fused, bias, image)
        return {"image": image, "text": text, "fused": fused, "match": self.head(fused[:, 0])}


class TwoLayers(nn.Module):
    """A stack of two residual MLP blocks over an image of 4 numbers per place: the least that has prune sites."""

    def __init__(self, width: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(width, bias), Mlp(width, bias)])

    def forward(self, image: Tensor) -> Tensor:
        for block in self.blocks:
            image = block(image)
        return image


class Mlp(nn.Module):
    def __init__(self, width: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = states + self.down(torch.relu(self.up(states)))
        return result


def tiny_vlm(seed: int = 0, layers: int = 2) -> TinyVlm:
    """A TinyVlm in eval mode with heavy-tailed weights of a scale of its own per tensor, so that budgets differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyVlm(layers)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(float(torch.empty(1).uniform_(0.7, 1.4)) * torch.randn_like(parameter) * 2)
    return model.eval()


def vlm_batch(lengths: Sequence[int] = (6, 4), *, total: int | None = None, side: str = "right", seed: int = 0) -> Batch:
    """One sample per text length; ids and pixels of a sample depend on its place in ``lengths`` and the seed alone."""
    total = max(lengths) if total is None else total
    ids, mask, pixels = [], [], []
    for index, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        pixels.append(torch.randn(3, IMAGE_PX, IMAGE_PX, generator=generator))
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
        padding = torch.zeros(total - length, dtype=torch.long)
        ones = torch.ones_like(tokens)
        ids.append(torch.cat([tokens, padding] if side == "right" else [padding, tokens]))
        mask.append(torch.cat([ones, padding] if side == "right" else [padding, ones]))
    return {"pixel_values": torch.stack(pixels), "input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}


def rows(batch: Batch, chosen: Sequence[int]) -> Batch:
    """The given samples of a batch."""
    return {name: tensor[torch.tensor(chosen)] for name, tensor in batch.items()}


@cache
def vlm_captured() -> mfcompile.CapturedGraph:
    """``tiny_vlm()`` captured on ``vlm_batch()``; shared between tests, so never train it."""
    return mfcompile.capture(tiny_vlm(), vlm_batch())


@cache
def vlm_regions() -> mfcompile.RegionMap:
    """Regions of ``vlm_captured()``."""
    return mfcompile.infer_regions(vlm_captured())


@cache
def vlm_statistics() -> mfcompile.CalibrationStatistics:
    """Statistics of ``vlm_captured()`` on three batches of five samples."""
    return mfcompile.calibrate(
        vlm_captured(), [vlm_batch((6, 3, 5, 2, 6), seed=seed) for seed in (1, 2, 3)], regions=vlm_regions()
    )
