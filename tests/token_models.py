"""Models for tests of token pruning: tiny CLIP-, BLIP- and LLaVA-like ones of transformers, and some written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfcompile
from mfcompile.frontends.exporting import candidates
from mfcompile.graph import CapturedGraph

Batch = dict[str, Tensor]

_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
EOS, PAD, IMAGE = 98, 1, 97


def fixed(model: nn.Module, inputs: Mapping[str, Any], route: str = "torch.export, sequence fixed") -> CapturedGraph:
    """A captured model with its program of fixed lengths, made once for many cuts."""
    captured = mfcompile.capture(model, dict(inputs))
    reasons = []
    for attempt, exported in candidates(captured, first=route):
        if exported is not None:
            return replace(captured, exported=exported)
        reasons.append(attempt.detail)
    raise AssertionError(reasons)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids that are neither special nor padding."""
    return torch.randint(2, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def seeded(build: Any, scale: float = 6.0) -> Any:
    """A model in eval mode whose attention is far from uniform: weights of queries and keys are scaled up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(word in name for word in ("q_proj", "k_proj", "query", "key", "qkv")):
                parameter.mul_(scale)
    return model


def pixels(rows: int = 2, seed: int = 0) -> Tensor:
    """(rows, 3, 32, 32) images: 16 patches."""
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def clip_like() -> tuple[Any, Batch]:
    """Two encoders, 17 and 12 tokens, fused attention; EOS at places of their own, padding behind."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config={**_VISION, "num_hidden_layers": 3}, projection_dim=16)
    words = ids(2, 12)
    words[0, -1], words[1, 7], words[1, 8:] = EOS, EOS, PAD
    batch = {"input_ids": words, "attention_mask": (words != PAD).long(), "pixel_values": pixels()}
    return seeded(lambda: CLIPModel(config)), batch


def blip_like() -> tuple[Any, Batch]:
    """An image encoder with fused qkv and written-out attention, text that attends to the image, a matching head."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    text = {
        "vocab_size": 99, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD,
        "sep_token_id": EOS,
    }  # fmt: skip
    # The default range of the vision weights is 1e-10: all image tokens would be alike, and which of them stay no matter.
    config = BlipConfig(
        text_config=text, vision_config={**_VISION, "num_hidden_layers": 2, "initializer_range": 0.02}, projection_dim=16,
        image_text_hidden_size=16,
    )  # fmt: skip
    words = ids(2, 10)
    words[1, 7:] = PAD
    batch = {"input_ids": words, "attention_mask": (words != PAD).long(), "pixel_values": pixels()}
    return seeded(lambda: BlipForImageTextRetrieval(config)), batch


def llava_like() -> tuple[Any, Batch]:
    """A decoder with grouped queries and rotary positions; image tokens at places of their own, one sample padded left."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=0, eos_token_id=EOS,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, num_hidden_layers=2), text_config=text, image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    words = ids(2, 24)
    words[0, 2:18], words[1, :3], words[1, 5:21] = IMAGE, PAD, IMAGE
    batch = {"input_ids": words, "attention_mask": (words != PAD).long(), "pixel_values": pixels()}
    return seeded(lambda: LlavaForConditionalGeneration(config)), batch


class Attention(nn.Module):
    """Self-attention over (batch, tokens, width): fused or written out, whole or in windows."""

    def __init__(self, width: int, heads: int, kind: str = "fused", window: int = 0) -> None:
        super().__init__()
        self.heads, self.kind, self.window = heads, kind, window
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, seen: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        batch, tokens, width = states.shape
        if self.window:
            states = states.view(batch * (tokens // self.window), self.window, width)
        given = states if context is None else context

        def split(tensor: Tensor) -> Tensor:
            return tensor.view(tensor.shape[0], tensor.shape[1], self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(states)), split(self.key(given)), split(self.value(given))
        if self.kind == "fused":
            mixed = F.scaled_dot_product_attention(query, key, value, seen)
        elif self.kind == "causal":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            logits = query @ key.transpose(2, 3) / (width // self.heads) ** 0.5
            logits = logits if seen is None else logits.masked_fill(~seen, float("-inf"))
            mixed = logits.softmax(-1) @ value
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return result


class Block(nn.Module):
    """Attention and MLP, each with a residual add; perhaps cross-attention between."""

    def __init__(self, width: int, heads: int, kind: str = "fused", window: int = 0, cross: bool = False) -> None:
        super().__init__()
        self.attention = Attention(width, heads, kind, window)
        self.cross = Attention(width, heads) if cross else None
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, states: Tensor, seen: Tensor | None = None) -> Tensor:
        """The stream behind the residual add of the attention."""
        result: Tensor = states + self.attention(self.norms[0](states), seen)
        return result

    def rest(self, states: Tensor, context: Tensor | None = None) -> Tensor:
        """What follows."""
        if self.cross is not None:
            states = states + self.cross(self.norms[2](states), context=context)
        result: Tensor = states + self.down(F.gelu(self.up(self.norms[1](states))))
        return result

    def forward(self, states: Tensor, seen: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.rest(self.attend(states, seen), context)


class Encoder(nn.Module):
    """Blocks over patches that are given as (batch, patches, width), with CLS in front where there is one.

    ``pool``: "cls", "mean" of the patches behind CLS, "all" for all states, "max" over all, "grid" for a square map.
    """

    def __init__(
        self,
        width: int = 16,
        heads: int = 2,
        patches: int = 9,
        pool: str = "cls",
        layers: int = 2,
        cls: bool = True,
        **block: Any,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.cls = nn.Parameter(torch.randn(1, 1, width)) if cls else None
        self.positions = nn.Parameter(torch.randn(1, patches + cls, width))
        self.blocks = nn.ModuleList([Block(width, heads, **block) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def embed(self, image: Tensor) -> Tensor:
        """Tokens before the first block."""
        if self.cls is not None:
            image = torch.cat([self.cls.expand(image.shape[0], -1, -1), image], dim=1)
        return image + self.positions

    def read(self, states: Tensor) -> Tensor:
        """What the model gives of its last states."""
        states = self.norm(states)
        if self.pool == "cls":
            return states[:, 0]
        if self.pool == "mean":
            return states[:, 1:].mean(1)
        if self.pool == "max":
            return states.amax(1)
        if self.pool == "grid":
            side = int(states.shape[1] ** 0.5)
            return states.view(states.shape[0], side, side, -1).permute(0, 3, 1, 2)
        return states

    def forward(self, image: Tensor) -> Tensor:
        states = self.embed(image)
        for block in self.blocks:
            states = block(states)
        return self.read(states)


class Queries(nn.Module):
    """A fixed number of learned queries that look at an image, as a Q-Former."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, width))
        self.encoder = Block(width, 2)
        self.block = Block(width, 2, cross=True)

    def forward(self, image: Tensor) -> Tensor:
        context = self.encoder(image)
        result: Tensor = self.block(self.queries.expand(image.shape[0], -1, -1), context=context)
        return result


class Joint(nn.Module):
    """Text and image tokens in one sequence, text first, with a padding mask; the first token is read."""

    def __init__(self, width: int = 16, kind: str = "fused") -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.positions = nn.Embedding(12, width)
        self.blocks = nn.ModuleList([Block(width, 2, kind) for _ in range(2)])
        self.head = nn.Linear(width, 3)

    def embed(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and what may be looked at."""
        places = torch.arange(input_ids.shape[1])
        text = self.table(input_ids) + self.positions(places)
        seen = torch.cat([attention_mask.bool(), torch.ones_like(image[..., 0], dtype=torch.bool)], dim=1)
        return torch.cat([text, image], dim=1), seen[:, None, None, :]

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states, seen = self.embed(image, input_ids, attention_mask)
        for block in self.blocks:
            states = block(states, seen)
        result: Tensor = self.head(states[:, 0])
        return result


class SequenceFirst(nn.Module):
    """(tokens, batch, width) streams whose heads and samples share an axis, as in ``nn.MultiheadAttention`` written out."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(2)])
        self.outs = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.mlps = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, image: Tensor) -> Tensor:
        states = image.transpose(0, 1)
        tokens, batch, width = states.shape
        for projection, out, mlp in zip(self.projections, self.outs, self.mlps, strict=True):
            parts = projection(states).chunk(3, dim=-1)
            query, key, value = (
                part.reshape(tokens, batch * self.heads, width // self.heads).transpose(0, 1) for part in parts
            )
            weights = (torch.bmm(query, key.transpose(1, 2)) * (width // self.heads) ** -0.5).softmax(-1)
            mixed = torch.bmm(weights, value).transpose(0, 1).reshape(tokens, batch, width)
            states = states + out(mixed)
            states = states + F.gelu(mlp(states))
        return states.mean(0)


class Caching(nn.Module):
    """Gives the keys of its last block as well."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.block = Block(width, 2)
        self.last = Block(width, 2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        states = self.block(image)
        attention = self.last.attention
        normed = self.last.norms[0](states)
        key = attention.key(normed).view(*normed.shape[:2], 2, -1).transpose(1, 2)
        query = attention.query(normed).view(*normed.shape[:2], 2, -1).transpose(1, 2)
        value = attention.value(normed).view(*normed.shape[:2], 2, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return states + attention.out(mixed), key


class Rolling(nn.Module):
    """Shifts its tokens between blocks: an operator that the token axis cannot be followed through."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, 2), Block(width, 2)])

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.blocks[1](torch.roll(self.blocks[0](image), 1, 1))
        return result.mean(1)


def patches(rows: int = 3, count: int = 9, width: int = 16, seed: int = 0) -> Tensor:
    """(rows, count, width) patches."""
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(seed))
