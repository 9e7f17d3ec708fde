"""Hand-written models whose image and text tokens meet in one sequence, and other unusual wirings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.parts import (
    WIDTH,
    Attention,
    CrossBlock,
    FeedForward,
    FusedAttention,
    LinearPatches,
    Patches,
    SelfBlock,
    Words,
    functions,
    pool,
)


class Fused(nn.Module):
    """Pre-norm layer with fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), FusedAttention(), FeedForward()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        states = states + self.attention(self.norm(states), mask)
        output: Tensor = states + self.mlp(states)
        return output


class PrefixByCat(nn.Module):
    """Image tokens, projected, stand before the text."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.tower = nn.ModuleList(Fused() for _ in range(2))
        self.connector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.decoder = nn.ModuleList(Fused() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 50, bias=False)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        image = self.patches(images)
        for layer in self.tower:
            image = layer(image)
        image = self.connector(image)
        states = torch.cat([image, self.words(input_ids, attention_mask)], dim=1)
        mask = torch.cat([attention_mask.new_ones(image.shape[:2]), attention_mask], dim=1)
        for layer in self.decoder:
            states = layer(states, mask)
        output: Tensor = self.lm_head(states)
        return output


class PrefixByScatter(nn.Module):
    """Image tokens replace placeholders (id 49) in the text."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.tower = nn.ModuleList(Fused() for _ in range(2))
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.ModuleList(Fused() for _ in range(2))

    def forward(self, picture: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image = self.patches(picture)
        for layer in self.tower:
            image = layer(image)
        states = self.words(ids, mask)
        places = (ids == 49)[:, :, None].expand_as(states)
        states = states.masked_scatter(places, self.connector(image))
        for layer in self.decoder:
            states = layer(states, mask)
        return pool(states, mask)


class SingleStream(nn.Module):
    """ViLT: class token and text, then patches, each with the embedding of its type."""

    def __init__(self) -> None:
        super().__init__()
        self.to_patches, self.words = LinearPatches(), Words()
        self.types = nn.Embedding(2, WIDTH)
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Fused() for _ in range(3))
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, txt: Tensor, txt_mask: Tensor, img: Tensor) -> Tensor:
        image = self.to_patches(img)
        image = image + self.types(torch.ones(image.shape[:2], dtype=torch.long))
        text = self.words(txt, txt_mask) + self.types(torch.zeros_like(txt))
        states = torch.cat([self.first.expand(len(txt), -1, -1), text, image], dim=1)
        ones = txt_mask.new_ones(len(txt), 1)
        mask = torch.cat([ones, txt_mask, ones.expand(-1, image.shape[1])], dim=1)
        for block in self.blocks:
            states = block(states, mask)
        output: Tensor = self.pooler(states[:, 0]).tanh()
        return output


class WrittenSequence(nn.Module):
    """The joint sequence is a buffer of zeros that image and text are written into, flattened for its layers."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.up, self.down = Attention(), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

        def forward(self, states: Tensor, mask: Tensor) -> Tensor:
            states = states + self.attention(states, mask=mask)
            flat = states.reshape(-1, WIDTH)
            output: Tensor = (flat + self.down(self.up(flat).relu())).view_as(states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.layers = nn.ModuleList(self.Flat() for _ in range(2))

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen, text = self.patches(image), self.words(ids, mask)
        start, length = seen.shape[1], text.shape[1]
        states = text.new_zeros(len(ids), start + length, WIDTH)
        whole = mask.new_ones(len(ids), start + length)
        states[:, :start], states[:, start:] = seen, text
        whole[:, start:] = mask
        for layer in self.layers:
            states = layer(states, whole)
        first: Tensor = states[:, 0]
        return first


class Queries(nn.Module):
    """BLIP-2: learned queries read the image, then stand before the text of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.tower = nn.ModuleList(SelfBlock() for _ in range(2))
        self.queries = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.former = nn.ModuleList(CrossBlock() for _ in range(2))
        self.to_language = nn.Linear(WIDTH, WIDTH)
        self.language = nn.ModuleList(SelfBlock() for _ in range(2))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        image = self.patches(pixel_values)
        for layer in self.tower:
            image = layer(image)
        queries = self.queries.expand(len(image), -1, -1)
        for layer in self.former:
            queries = layer(queries, image)
        states = torch.cat([self.to_language(queries), self.words(input_ids)], dim=1)
        for layer in self.language:
            states = layer(states)
        return states[:, -1]


class CoAttention(nn.Module):
    """LXMERT: in every joint layer the image reads the text as well, through the same cross-attention."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.across = Attention()
            self.in_text, self.in_image = SelfBlock(), SelfBlock()

        def forward(self, text: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            read, seen = text + self.across(text, image), image + self.across(image, text, mask)
            return self.in_text(read, mask), self.in_image(seen)

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.vision, self.text = (nn.ModuleList(SelfBlock() for _ in range(2)) for _ in range(2))
        self.joint = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen, text = self.patches(image), self.words(ids, mask)
        for layer in self.vision:
            seen = layer(seen)
        for layer in self.text:
            text = layer(text, mask)
        for layer in self.joint:
            text, seen = layer(text, seen, mask)
        return text, seen


class Experts(nn.Module):
    """One module per expert; every token goes to its best one, results are added into place."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.router = Attention(), nn.Linear(WIDTH, 2, bias=False)
            self.experts = nn.ModuleList(FeedForward() for _ in range(2))

        def forward(self, states: Tensor, mask: Tensor) -> Tensor:
            states = states + self.attention(states, mask=mask)
            flat = states.reshape(-1, WIDTH)
            gates = self.router(flat).softmax(-1)
            best = gates.argmax(-1)
            result = torch.zeros_like(flat)
            for index, expert in enumerate(self.experts):
                rows = (best == index).nonzero().squeeze(1)
                result.index_add_(0, rows, expert(flat[rows]) * gates[rows, index][:, None])
            return states + result.view_as(states)

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.vision = nn.ModuleList(SelfBlock() for _ in range(2))
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.patches(image)
        for layer in self.vision:
            seen = layer(seen)
        states = torch.cat([seen, self.words(ids, mask)], dim=1)
        whole = torch.cat([mask.new_ones(seen.shape[:2]), mask], dim=1)
        for layer in self.layers:
            states = layer(states, whole)
        return states


class Gated(nn.Module):
    """Flamingo: a resampler, then text layers with gated cross-attention (gates at zero) between them, in one list."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross, self.ff = Attention(), FeedForward()
            self.gate_1, self.gate_2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

        def forward(self, states: Tensor, image: Tensor) -> Tensor:
            states = states + self.gate_1.tanh() * self.cross(states, image)
            output: Tensor = states + self.gate_2.tanh() * self.ff(states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.latents = nn.Parameter(torch.randn(3, WIDTH))
        self.resampler = nn.ModuleList(nn.ModuleList([Attention(), FeedForward()]) for _ in range(2))
        self.stack = nn.ModuleList([SelfBlock(), self.Gate(), SelfBlock()])

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.patches(image)
        latents = self.latents.unsqueeze(0).repeat(len(image), 1, 1)
        for attention, ff in functions(self.resampler):
            latents = latents + attention(latents, torch.cat([seen, latents], dim=1))
            latents = latents + ff(latents)
        states: Tensor = self.words(ids, mask)
        first, gate, last = self.stack
        output: Tensor = last(gate(first(states, mask), latents), mask)
        return output


class LateFusion(nn.Module):
    """XVLM: one list of text layers of which the last one only looks at the image; text and image of equal length."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.vision = nn.ModuleList(SelfBlock() for _ in range(2))
        self.layer = nn.ModuleList([SelfBlock(), SelfBlock(), CrossBlock()])

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.patches(image)
        for block in self.vision:
            seen = block(seen)
        text: Tensor = self.words(ids, mask)
        for block in list(self.layer)[:2]:
            text = block(text, mask)
        output: Tensor = self.layer[2](text, seen, mask)
        return output


class Nested(nn.Module):
    """One argument that holds everything; images come as feature vectors of regions."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.words = nn.Linear(10, WIDTH), Words()
        self.one, self.two, self.three = (nn.ModuleList(SelfBlock() for _ in range(2)) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)) for _ in range(2))

    def forward(self, batch: dict[str, Any]) -> list[Tensor]:
        image, text = self.lift(batch["x"]["feats"]), self.words(batch["y"][0], batch["y"][1])
        for block in self.one:
            image = block(image)
        for block in self.two:
            text = block(text, batch["y"][1])
        states = torch.cat([text, image], dim=1)
        mask = torch.cat([batch["y"][1], torch.ones(image.shape[:2])], dim=1)
        for block in self.three:
            states = block(states, mask)
        return [head(states[:, 0]) for head in self.heads]


class ThreeTexts(nn.Module):
    """Texts with tables of their own, one of them a decoder's, and vision layers in stages of growing width."""

    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.merge = nn.Linear(width // 2, width)
            self.blocks = nn.ModuleList(self.Layer(width) for _ in range(2))

        class Layer(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.attention, self.ff = Attention(width), FeedForward(width)

            def forward(self, states: Tensor) -> Tensor:
                states = states + self.attention(states)
                output: Tensor = states + self.ff(states)
                return output

        def forward(self, states: Tensor) -> Tensor:
            states = self.merge(states)
            for block in self.blocks:
                states = block(states)
            return states

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first, self.second = Patches(), Words(50), Words(20)
        self.stages = nn.Sequential(self.Stage(2 * WIDTH), self.Stage(4 * WIDTH))
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.encoder = nn.ModuleList(SelfBlock() for _ in range(2))
        self.decoder = nn.ModuleList(CrossBlock() for _ in range(2))

    def forward(self, p: Tensor, q: Tensor, q_mask: Tensor, r: Tensor, r_mask: Tensor) -> Tensor:
        image = self.down(self.stages(self.patches(p)))
        text = self.first(q, q_mask)
        for block in self.encoder:
            text = block(text, q_mask)
        states: Tensor = self.second(r, r_mask)
        for block in self.decoder:
            states = block(states, torch.cat([pool(text, q_mask)[:, None], image], dim=1), r_mask)
        return states
