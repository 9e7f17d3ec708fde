"""More hand-written models: layers that are called again, shared between modalities, or kept in unusual places."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.parts import WIDTH, Attention, CrossBlock, FeedForward, Patches, SelfBlock, Words, functions


class Recurrent(nn.Module):
    """One layer per tower, applied three times over (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.see, self.read, self.join = SelfBlock(), SelfBlock(), CrossBlock()
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        image, text = self.patches(u), self.words(v)
        for _ in range(3):
            image = self.see(image)
        for _ in range(3):
            text = self.read(text)
        for _ in range(2):
            text = self.join(text, image)
        output: Tensor = self.head(text.mean(1))
        return output


class Multiway(nn.Module):
    """VLMo: attention is shared between the modalities, every one of them has a feed-forward of its own."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.ways = nn.ModuleDict({key: FeedForward() for key in ("image", "text", "both")})

        def forward(self, states: Tensor, way: str) -> Tensor:
            states = states + self.attention(states)
            output: Tensor = states + self.ways[way](states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        seen, text = self.patches(image), self.words(ids)
        for layer in self.layers:
            seen = layer(seen, "image")
        for layer in self.layers:
            text = layer(text, "text")
        states = torch.cat([seen, text], dim=1)
        for layer in self.layers:
            states = layer(states, "both")
        return states


class ByKind(nn.Module):
    """Attentions in one list, feed-forwards in another; layers as dicts; layers without attention."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.across = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
            self.within = FeedForward()

        def forward(self, states: Tensor) -> Tensor:
            states = states + self.across(states.mT).mT
            output: Tensor = states + self.within(states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.mixers = nn.Sequential(*(self.Mixer() for _ in range(2)))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
        self.feed_forwards = nn.ModuleList(FeedForward() for _ in range(2))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"self": Attention(), "cross": Attention(), "ff": FeedForward()}) for _ in range(2)
        )

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        seen, text = self.mixers(self.patches(image)), self.words(ids)
        for attention, ff in zip(self.attentions, self.feed_forwards, strict=True):
            text = text + attention(text, text, text)[0]
            text = text + ff(text)
        for layer in functions(self.layers):
            text = text + layer["self"](text)
            text = text + layer["cross"](text, seen)
            text = text + layer["ff"](text)
        output: Tensor = text
        return output


class Reparametrized(nn.Module):
    """Weights that are computed before they multiply: they cannot be pruned as they are stored."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.ff = Attention(), FeedForward()
            nn.utils.parametrizations.weight_norm(self.attention.q)
            self.scale = nn.Parameter(torch.ones(WIDTH, 1))
            self.mixing = nn.Linear(WIDTH, WIDTH)

        def forward(self, states: Tensor) -> Tensor:
            states = states + self.attention(states)
            states = states + F.linear(states, self.mixing.weight * self.scale, self.mixing.bias)
            output: Tensor = states + self.ff(states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.words, self.patches = Words(), Patches()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, image: Tensor, **rest: Any) -> Tensor:
        states = torch.cat([self.patches(image), self.words(rest["ids"])], dim=1)
        for layer in self.layers:
            states = layer(states)
        output: Tensor = states
        return output
