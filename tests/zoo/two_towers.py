"""Hand-written models with separate towers: contrastive, cross-attending, encoder-decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.parts import (
    HEADS,
    WIDTH,
    Attention,
    CrossBlock,
    FeedForward,
    FusedAttention,
    FusedKeyValue,
    LinearPatches,
    Patches,
    RawBlock,
    SelfBlock,
    Words,
    functions,
    pool,
)


class AttributeBlocks(nn.Module):
    """No list anywhere; forward takes a, b, c."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.see_1, self.see_2 = SelfBlock(), SelfBlock()
        self.read_1, self.read_2 = SelfBlock(), SelfBlock()
        self.join_1, self.join_2 = CrossBlock(), CrossBlock()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        image = self.see_2(self.see_1(self.patches(a)))
        text = self.read_2(self.read_1(self.words(b, c), c), c)
        joint = self.join_2(self.join_1(text, image, c), image, c)
        output: Tensor = self.head(joint[:, 0])
        return output


class ListsOfLists(nn.Module):
    """Layers are lists of functions that the model adds up itself, so that no layer is ever called."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = LinearPatches(), Words()
        self.vision = nn.ModuleList(nn.ModuleList([Attention(), FeedForward()]) for _ in range(2))
        self.text = nn.ModuleList(nn.ModuleList([FusedAttention(), FeedForward()]) for _ in range(2))
        self.multi = nn.ModuleList(nn.ModuleList([FusedAttention(), FusedKeyValue(), FeedForward()]) for _ in range(2))
        self.to_logits = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        image, states = self.patches(images), self.words(text)
        for attention, ff in functions(self.vision):
            image = image + attention(image)
            image = image + ff(image)
        for attention, ff in functions(self.text):
            states = states + attention(states)
            states = states + ff(states)
        for attention, cross, ff in functions(self.multi):
            states = states + attention(states)
            states = states + cross(states, image)
            states = states + ff(states)
        output: Tensor = self.to_logits(states)
        return output


class TorchLayers(nn.Module):
    """torch's own transformer layers; the text mask is True where torch ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=True)
        self.image_encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.text_encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.decoder = nn.TransformerDecoder(decoder, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        ignored = mask == 0
        states = self.image_encoder(self.patches(image))
        text = self.text_encoder(self.words(ids, mask), src_key_padding_mask=ignored)
        joint = self.decoder(text, states, tgt_key_padding_mask=ignored)
        output: Tensor = self.head(pool(joint, mask))
        return output


class TorchAttention(nn.Module):
    """nn.MultiheadAttention for self- and cross-attention, sequence first, a mask that is True at padding."""

    class Layer(nn.Module):
        def __init__(self, crosses: bool) -> None:
            super().__init__()
            self.mine = nn.MultiheadAttention(WIDTH, HEADS)
            self.other = nn.MultiheadAttention(WIDTH, HEADS) if crosses else None
            self.ff = FeedForward()

        def forward(self, states: Tensor, context: Tensor | None = None, ignored: Tensor | None = None) -> Tensor:
            states = states + self.mine(states, states, states, key_padding_mask=ignored)[0]
            if self.other is not None and context is not None:
                states = states + self.other(states, context, context)[0]
            output: Tensor = states + self.ff(states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.vision = nn.ModuleList(self.Layer(False) for _ in range(2))
        self.text = nn.ModuleList(self.Layer(False) for _ in range(2))
        self.fusion = nn.ModuleList(self.Layer(True) for _ in range(2))

    def forward(self, pixels: Tensor, tokens: Tensor, padding_mask: Tensor) -> Tensor:
        image = self.patches(pixels).transpose(0, 1)
        states = self.words(tokens, ~padding_mask).transpose(0, 1)
        for layer in self.vision:
            image = layer(image)
        for layer in self.text:
            states = layer(states, ignored=padding_mask)
        for layer in self.fusion:
            states = layer(states, image, padding_mask)
        first: Tensor = states[0]
        return first


class RawParameters(nn.Module):
    """Bare parameters, views of parameters, products and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = LinearPatches(), Words()
        self.v = nn.ModuleList(RawBlock() for _ in range(2))
        self.t = nn.ModuleList(RawBlock() for _ in range(2))
        self.x = nn.ModuleList(RawBlock() for _ in range(2))
        self.final = nn.Parameter(torch.randn(WIDTH, 4))

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        image, text = self.patches(x0), self.words(x1)
        for block in self.v:
            image = block(image, image)
        for block in self.t:
            text = block(text, text)
        for block in self.x:
            text = block(text, image)
        output: Tensor = text[:, 0] @ self.final
        return output


class SharedTextEncoder(nn.Module):
    """The text encoder runs twice: alone for the contrastive loss, and with the image."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.cross, self.ff = Attention(), Attention(), FeedForward()

        def forward(self, states: Tensor, mask: Tensor, image: Tensor | None) -> Tensor:
            states = states + self.attention(states, mask=mask)
            if image is not None:
                states = states + self.cross(states, image)
            output: Tensor = states + self.ff(states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.vision = nn.Sequential(*(SelfBlock() for _ in range(2)))
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))
        self.image_proj, self.text_proj = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.match = nn.Linear(WIDTH, 2)

    def encode(self, ids: Tensor, mask: Tensor, image: Tensor | None) -> Tensor:
        states: Tensor = self.words(ids, mask)
        for layer in self.layers:
            states = layer(states, mask, image)
        return states

    def forward(self, image: Tensor, text_ids: Tensor, text_atts: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.vision(self.patches(image))
        text = F.normalize(self.text_proj(pool(self.encode(text_ids, text_atts, None), text_atts)), dim=-1)
        logits = F.normalize(self.image_proj(seen.mean(1)), dim=-1) @ text.t() / 0.07
        return logits.softmax(-1), self.match(pool(self.encode(text_ids, text_atts, seen), text_atts))


class TiedDecoder(nn.Module):
    """The decoder owns its self-attention and shares everything else with the encoder."""

    class Layer(nn.Module):
        def __init__(self, twin: TiedDecoder.Layer | None = None) -> None:
            super().__init__()
            self.own = Attention()
            self.cross: nn.Module = twin.cross if twin else Attention()
            self.ff: nn.Module = twin.ff if twin else FeedForward()

        def forward(self, states: Tensor, image: Tensor, mask: Tensor) -> Tensor:
            states = states + self.own(states, mask=mask)
            states = states + self.cross(states, image)
            output: Tensor = states + self.ff(states)
            return output

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.vision = nn.ModuleList(SelfBlock() for _ in range(2))
        self.encoder = nn.ModuleList(self.Layer() for _ in range(2))
        self.decoder = nn.ModuleList(self.Layer(layer) for layer in self.encoder)  # type: ignore[arg-type]
        self.lm_head = nn.Linear(WIDTH, 50, bias=False)
        self.lm_head.weight = self.words.table.weight

    def forward(self, image: Tensor, question: Tensor, question_mask: Tensor, answer: Tensor, answer_mask: Tensor) -> Tensor:
        seen = self.patches(image)
        for layer in self.vision:
            seen = layer(seen)
        states = self.words(question, question_mask)
        for layer in self.encoder:
            states = layer(states, seen, question_mask)
        words = self.words(answer, answer_mask) + pool(states, question_mask)[:, None]
        for layer in self.decoder:
            words = layer(words, seen, answer_mask)
        output: Tensor = self.lm_head(words)
        return output


class SingleLayers(nn.Module):
    """Every list has one item; the fusion layer's two attentions look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.a, self.b = nn.ModuleList([SelfBlock()]), nn.Sequential(SelfBlock())
        self.c = nn.ModuleList([CrossBlock()])
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, q: Tensor, r: Tensor) -> Tensor:
        image = self.projector(self.a[0](self.patches(q)))
        output: Tensor = self.c[0](self.b(self.words(r)), image)
        return output.mean(1)


class Contrastive(nn.Module):
    """CLIP: softmax over logits at the output, towers and projectors in dicts; nothing is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({"i": LinearPatches(), "t": Words()})
        self.towers = nn.ModuleDict({key: nn.Sequential(SelfBlock(), SelfBlock()) for key in ("i", "t")})
        self.projectors = nn.ModuleDict(
            {key: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8)) for key in ("i", "t")}
        )
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, photo: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        image, text = (
            F.normalize(self.projectors[key](self.towers[key](self.embed[key](value)).mean(1)), dim=-1)
            for key, value in (("i", photo), ("t", words))
        )
        logits = self.scale.exp() * image @ text.t()
        return logits.softmax(-1), logits.t().softmax(-1)


class InPlace(nn.Module):
    """Residuals are added in place, and the text that a head has read is written to by the fusion afterwards."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.ff = Attention(), FeedForward()

        def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
            states += self.attention(states, mask=mask)
            states += self.ff(states)
            return states

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.v = nn.ModuleList(self.Layer() for _ in range(2))
        self.t = nn.ModuleList(self.Layer() for _ in range(2))
        self.f = nn.ModuleList(CrossBlock() for _ in range(2))
        self.text_head, self.joint_head = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, image: Tensor, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        seen, text = self.patches(image), self.words(ids, keep)
        for layer in self.v:
            seen = layer(seen)
        for layer in self.t:
            text = layer(text, keep)
        alone = self.text_head(text)
        for block in self.f:
            text += block(text, seen, keep)
        return alone, self.joint_head(text)
