"""Building blocks of the hand-written models, each in the manner of another school of coders.

B is the batch, P the image tokens, L the text tokens, D the width. A mask is (B, L), 1 = a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, VOCAB, PATCH = 16, 2, 50, 4


def split_heads(states: Tensor) -> Tensor:
    """(B, N, D) to (B, heads, N, D / heads)."""
    return states.reshape(*states.shape[:2], HEADS, -1).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def functions(layers: nn.ModuleList) -> Any:
    """The lists in a list; torch types them as modules that cannot be unpacked."""
    return layers


def additive(mask: Tensor | None) -> Tensor | None:
    """(B, K) to a bias (B, 1, 1, K)."""
    return None if mask is None else (1.0 - mask.float())[:, None, None, :] * -1e4


class Attention(nn.Module):
    """Three projections, softmax spelt out."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = states if context is None else context
        query, key, value = split_heads(self.q(states)), split_heads(self.k(context)), split_heads(self.v(context))
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        bias = additive(mask)
        if bias is not None:
            logits = logits + bias
        mixed: Tensor = self.o(merge_heads(logits.softmax(-1) @ value))
        return mixed


class FusedAttention(nn.Module):
    """One projection for q, k, v, cut by chunk; scaled_dot_product_attention."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (split_heads(part) for part in self.qkv(states).chunk(3, dim=-1))
        allowed = None if mask is None else (mask != 0)[:, None, None, :]
        output: Tensor = self.proj(merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)))
        return output


class FusedKeyValue(nn.Module):
    """Cross-attention with one projection for keys and values."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, states: Tensor, context: Tensor) -> Tensor:
        key, value = (split_heads(part) for part in self.to_kv(context).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(split_heads(self.to_q(states)), key, value)
        output: Tensor = self.to_out(merge_heads(mixed))
        return output


class FeedForward(nn.Sequential):
    """Norm, up, GELU, down."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class SelfBlock(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.ff = FeedForward()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        states = states + self.attention(self.norm(states), mask=mask)
        output: Tensor = states + self.ff(states)
        return output


class CrossBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; both attentions have the same structure."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention, self.cross_attention = Attention(), Attention()
        self.ff = FeedForward()

    def forward(self, states: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        states = states + self.self_attention(self.norm_1(states), mask=mask)
        states = states + self.cross_attention(self.norm_2(states), context)
        output: Tensor = states + self.ff(states)
        return output


class Patches(nn.Module):
    """Image (B, 3, H, W) to tokens (B, P, D), by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.conv(image).flatten(2).transpose(1, 2)
        return tokens


class LinearPatches(nn.Module):
    """Image to tokens by unfolding and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.to_tokens = nn.Linear(3 * PATCH * PATCH, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.to_tokens(F.unfold(image, PATCH, stride=PATCH).transpose(1, 2))
        return tokens


class Words(nn.Module):
    """Token ids (B, L) to embeddings with positions; positions count tokens, so that padding moves nothing."""

    def __init__(self, rows: int = VOCAB) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, WIDTH)
        self.places = nn.Embedding(32, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        places = ((mask != 0).long().cumsum(1) - 1).clamp(min=0)
        output: Tensor = self.table(ids) + self.places(places)
        return output


class RawBlock(nn.Module):
    """A layer without a single nn.Linear: products, F.linear and einsum with bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.key_value = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4)
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.up = nn.Parameter(torch.randn(WIDTH, 24) / 4)
        self.down = nn.Parameter(torch.randn(WIDTH, 24) / 4)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, states: Tensor, context: Tensor) -> Tensor:
        normed = F.layer_norm(states, (WIDTH,)) * self.scale
        query = torch.einsum("bnd,hkd->bhnk", normed, self.query.view(HEADS, -1, WIDTH))
        key, value = (split_heads(F.linear(context, half)) for half in torch.split(self.key_value, WIDTH))
        mixed = torch.einsum("bhqk,bhkd->bhqd", (query @ key.mT / 3).softmax(-1), value)
        states = states + merge_heads(mixed) @ self.out
        hidden = torch.einsum("bqd,de->bqe", states, self.up).relu()
        return states + torch.matmul(hidden, self.down.t())


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens: (B, L, D), (B, L) to (B, D)."""
    weights = mask.to(states.dtype)[:, :, None]
    return (states * weights).sum(1) / weights.sum(1)
