"""Models written to lead structured removal astray: equal sizes, shared parts, many ways to write one thing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TOKENS = 16, 4, 4
"""Width of a head, heads, tokens and batch are all four; the width is a square."""


def tokens(batch: int = 4, count: int = TOKENS) -> dict[str, Tensor]:
    """(batch, count, 16)."""
    return {"image": torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(0))}


class Part(nn.Module):
    """A residual part: what it gives is added to its normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def inside(self, states: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, states: Tensor) -> Tensor:
        return states + self.inside(self.norm(states))


class Around(nn.Module):
    """Parts in a row between a projection of the input and one to the output."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(parts)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        states = self.first(image)
        for part in self.parts:
            states = part(states)
        result: Tensor = self.last(self.norm(states))
        return result


class Plain(Part):
    """Two linear layers, as many hidden channels as the width, written over a flat batch of tokens."""

    def __init__(self, hidden: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def middle(self, states: Tensor) -> Tensor:
        return F.gelu(self.a(states))

    def inside(self, states: Tensor) -> Tensor:
        flat = states.reshape(-1, WIDTH)
        result: Tensor = self.b(F.dropout(self.middle(flat), 0.1, self.training)).view(states.shape)
        return result


class Gated(Part):
    """Two linear layers that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def inside(self, states: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(states)) * self.up(states))
        return result


class GatedInOne(Part):
    """One linear layer for gate and value, taken apart in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.both, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def inside(self, states: Tensor) -> Tensor:
        both = self.both(states)
        if self.way == "glu":
            mixed = F.glu(both, -1)
        elif self.way == "slice":
            mixed = torch.tanh(both[..., :WIDTH]) * both[..., WIDTH:]
        elif self.way == "interleaved":
            pairs = both.unflatten(-1, (WIDTH, 2))
            mixed = torch.tanh(pairs[..., 0]) * pairs[..., 1]
        else:
            one, two = both.chunk(2, -1) if self.way == "chunk" else both.split([WIDTH, WIDTH], -1)
            mixed = torch.tanh(one) * two
        result: Tensor = self.down(mixed)
        return result


class ConvolvedMiddle(Part):
    """A convolution of each channel alone, a batch norm and a learned slope between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.scale, self.slope = nn.BatchNorm1d(8), nn.PReLU(8)
        self.scale.running_mean = torch.randn(8)
        self.scale.running_var = torch.rand(8) + 0.5

    def inside(self, states: Tensor) -> Tensor:
        middle = self.slope(self.scale(self.mix(self.a(states).transpose(1, 2)))).transpose(1, 2)
        result: Tensor = self.b(middle)
        return result


class Attention(Part):
    """Self-attention, written in one of several ways."""

    def __init__(self, way: str = "sdpa", groups: int = HEADS) -> None:
        super().__init__()
        self.way, self.groups = way, groups
        self.width = WIDTH // HEADS
        keys = groups * self.width
        if way in {"fused", "interleaved", "slices"}:
            self.qkv = nn.Linear(WIDTH, WIDTH + 2 * keys)
        else:
            self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.given: Tensor | None = None
        self.bias = nn.Parameter(torch.randn(HEADS, 1, 1)) if way in {"bias", "temperature"} else torch.zeros(0)
        self.slopes: Tensor
        self.table = nn.Embedding(2 * TOKENS, HEADS) if way == "table" else None
        self.head_norm = nn.LayerNorm(self.width) if way == "head_norm" else None
        self.wide_norm = nn.LayerNorm(WIDTH) if way == "wide_norm" else None
        self.talk = nn.Linear(HEADS, HEADS) if way == "talk" else None
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1), persistent=way == "alibi")

    def projected(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, heads, tokens, width of a head) each."""
        rows, count, _ = states.shape
        if self.way == "fused":
            query, key, value = self.qkv(states).reshape(rows, count, 3, HEADS, self.width).permute(2, 0, 3, 1, 4)
            return query, key, value
        if self.way == "interleaved":
            parts = self.qkv(states).view(rows, count, HEADS, 3 * self.width).transpose(1, 2).chunk(3, -1)
            return parts[0], parts[1], parts[2]
        if self.way == "slices":
            both = self.qkv(states)
            keys = self.groups * self.width
            query, key, value = both[..., :WIDTH], both[..., WIDTH : WIDTH + keys], both[..., WIDTH + keys :]
        else:
            query, key, value = self.q(states), self.k(states), self.v(states)
        if self.wide_norm is not None:
            query = self.wide_norm(query)
        return self.split(query, HEADS), self.split(key, self.groups), self.split(value, self.groups)

    def split(self, states: Tensor, heads: int) -> Tensor:
        return states.view(states.shape[0], states.shape[1], heads, self.width).transpose(1, 2)

    def inside(self, states: Tensor) -> Tensor:
        rows, count, _ = states.shape
        query, key, value = self.projected(states)
        if self.head_norm is not None:
            query, key = self.head_norm(query), self.head_norm(key)
        mixed = self.attend(query, key, value)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, count, WIDTH))
        return result

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, _, count, _ = query.shape
        times = HEADS // self.groups
        if self.way == "sdpa_groups":
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        if self.way == "shared":  # keys broadcast to a group axis of the queries
            own = query.view(rows, self.groups, times, count, self.width)
            weights = (own @ key.unsqueeze(2).transpose(3, 4)).softmax(-1)
            return (weights @ value.unsqueeze(2)).reshape(rows, HEADS, count, self.width)
        if self.way == "repeat":
            key, value = key.repeat(1, times, 1, 1), value.repeat(1, times, 1, 1)
        elif times > 1:
            key, value = (item.repeat_interleave(times, 1) for item in (key, value))
        if self.way == "flat":
            flat = [item.reshape(-1, count, self.width) for item in (query, key, value)]
            return torch.bmm(torch.bmm(flat[0], flat[1].transpose(1, 2)).softmax(-1), flat[2]).view(rows, HEADS, count, -1)
        if self.way in {"sdpa", "fused", "interleaved", "slices", "repeat", "head_norm", "wide_norm"}:
            return F.scaled_dot_product_attention(query, key, value)
        logits = torch.einsum("bhid,bhjd->bhij", query, key) if self.way == "einsum" else query @ key.transpose(2, 3)
        weights = self.weights(logits)
        return torch.einsum("bhij,bhjd->bhid", weights, value) if self.way == "einsum" else weights @ value

    def weights(self, logits: Tensor) -> Tensor:
        count = logits.shape[-1]
        distance = torch.arange(count)[:, None] - torch.arange(count)[None]
        if self.way == "temperature":
            logits = logits * self.bias
        elif self.way == "bias":
            logits = logits + self.bias * distance
        elif self.way == "alibi":
            logits = logits - self.slopes[:, None, None] * distance.abs()
        elif self.table is not None:
            logits = logits + self.table(distance + TOKENS).permute(2, 0, 1)[None]
        elif self.way == "repeated mask":
            logits = logits.masked_fill((distance < 0)[None, None].repeat(logits.shape[0], HEADS, 1, 1), -1e9)
        elif self.given is not None:
            logits = logits + self.given
        elif self.talk is not None:
            logits = self.talk(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.way == "across":
            logits = logits.softmax(1)
        return logits.softmax(-1)


class SharedMiddle(Plain):
    """The middle is read a second time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.second, self.own_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def inside(self, states: Tensor) -> Tensor:
        middle = self.middle(states)
        if self.how == "norm":
            middle = self.own_norm(middle)
        given: Tensor = self.b(middle)
        if self.how == "linear":
            given = given + self.second(middle)
        if self.how == "mean":
            return given + middle.mean(-1, keepdim=True)
        if self.how == "position":
            return given + middle[..., :1]
        if self.how == "residual":
            return given + middle
        return given


class Twice(Part):
    """One feed-forward layer, called twice."""

    def __init__(self, what: nn.Module) -> None:
        super().__init__()
        self.what = what

    def inside(self, states: Tensor) -> Tensor:
        result: Tensor = self.what(self.what(states))
        return result


class SharedInput(Part):
    """Two feed-forward layers with one first weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Plain(), Plain()
        self.two.a.weight = self.one.a.weight

    def inside(self, states: Tensor) -> Tensor:
        result: Tensor = self.one(states) + self.two(states)
        return result


class Parallel(Part):
    """Attention and feed-forward layer side by side on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Plain(8)

    def inside(self, states: Tensor) -> Tensor:
        return self.attention.inside(states) + self.mlp.inside(states)


class PointwiseConvolutions(Part):
    """Convolutions of width one as linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(WIDTH, 8, 1), nn.Conv1d(8, WIDTH, 1)

    def inside(self, states: Tensor) -> Tensor:
        result: Tensor = self.b(F.relu(self.a(states.transpose(1, 2)))).transpose(1, 2)
        return result


class Library(nn.Module):
    """nn.TransformerEncoder or nn.TransformerDecoder: one packed weight for queries, keys and values."""

    def __init__(self, decoder: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        kind: Any = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        self.decoder, self.batch_first = decoder, batch_first
        self.layer = kind(WIDTH, HEADS, 8, batch_first=batch_first, norm_first=not batch_first)
        self.memory = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        states = image if self.batch_first else image.transpose(0, 1)
        states = self.layer(states, self.memory(states)) if self.decoder else self.layer(states)
        result: Tensor = self.last(states)
        return result


class SharedBias(nn.Module):
    """Attentions in a row with one relative bias of the first, a mask added to it, as T5 has."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.first = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Linear(2 * TOKENS, HEADS, bias=False) if is_transposed else nn.Embedding(2 * TOKENS, HEADS)
        self.parts = nn.ModuleList(Attention("shared_bias") for _ in range(2))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        states = self.first(image)
        count = image.shape[1]
        distance = torch.arange(count)[:, None] - torch.arange(count)[None]
        table = self.table.weight.t() if self.is_transposed else self.table.weight
        bias = table[distance + TOKENS].permute(2, 0, 1)[None] + (1 - mask[:, None, None, :].float()) * -1e9
        for part in self.parts:
            part.given = bias
            states = part(states)
        result: Tensor = self.last(states)
        return result
