"""The XVLM-like family: vision, text and fusion stacks, cross-attention in fusion only (examples/emoji_xvlm)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from emoji_xvlm import model as example
from emoji_xvlm.modeling import EmojiXvlm, FusionEncoder, MlmHead, TextEncoder, key_mask
from emoji_xvlm.objectives import calibration_loss
from emoji_xvlm.tokenizer import Tokenizer
from torch import Tensor, nn

from benchmarks.tavlp.calibration import calibration_batches
from benchmarks.tavlp.families.contract import AnsweringModel, Batch, CaptioningModel, RetrievalModel

PRETRAINING_PAIRS = 92_000
"""Scenes of the 790 steps that examples/emoji_xvlm/README.md lists."""


class XvlmRetrieval(RetrievalModel):
    """The pretrained model as it is: both projections and the matching head are of pretraining."""

    def __init__(self, pretrained: EmojiXvlm) -> None:
        super().__init__()
        self.trunk = pretrained

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return self.trunk.encode_image(pixel_values)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.trunk.encode_text(input_ids, attention_mask)

    def embed_image(self, image_states: Tensor) -> Tensor:
        return self.trunk.embed_image(image_states[:, 0])

    def embed_text(self, text_states: Tensor) -> Tensor:
        return self.trunk.embed_text(text_states[:, 0])

    def scale(self) -> Tensor:
        return self.trunk.logit_scale.exp()

    def match(self, image_states: Tensor, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        fused = self.trunk.fuse(text_states, image_states, attention_mask)
        logits: Tensor = self.trunk.itm_head(fused[:, 0])
        return logits


class Decoder(nn.Module):
    """Text and fusion stacks with attention to earlier words only, as X-VLM turns its text encoder into a decoder."""

    def __init__(self, text: TextEncoder, fusion: FusionEncoder, head: MlmHead) -> None:
        super().__init__()
        self.text = text
        self.fusion = fusion
        self.head = head

    def forward(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, D), (B, L), (B, L) to (B, L, V)."""
        length = input_ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        mask = earlier[None, None] & key_mask(attention_mask)
        fused = self.fusion(self.text(input_ids, mask), image_states, mask)
        logits: Tensor = self.head(fused)
        return logits


class XvlmCaptioner(CaptioningModel):
    """Image stack and decoder; the word head is that of masked words."""

    def __init__(self, pretrained: EmojiXvlm) -> None:
        super().__init__()
        self.image_encoder = pretrained.vision_encoder
        self.decoder = Decoder(pretrained.text_encoder, pretrained.fusion_encoder, pretrained.mlm_head)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.image_encoder(pixel_values)
        return states

    def next_words(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.decoder(image_states, input_ids, attention_mask)
        return logits


class XvlmAnswerer(AnsweringModel):
    """All three stacks, and a classifier over the first fused state."""

    def __init__(self, pretrained: EmojiXvlm, new_words: int, answers: int) -> None:
        super().__init__()
        width = pretrained.config.width
        self.image_encoder = pretrained.vision_encoder
        self.question_encoder = pretrained.text_encoder
        self.question_encoder.token_embed = grown_embedding(pretrained.text_encoder.token_embed, new_words)
        self.fusion = pretrained.fusion_encoder
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, answers)
        )

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.image_encoder(pixel_values)
        return states

    def answers(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = key_mask(attention_mask)
        fused = self.fusion(self.question_encoder(input_ids, mask), image_states, mask)
        logits: Tensor = self.head(fused[:, 0])
        return logits

    def new_parameters(self) -> Sequence[nn.Parameter]:
        return list(self.head.parameters())


def grown_embedding(table: nn.Embedding, new_words: int) -> nn.Embedding:
    """A table of words with further rows at its end, drawn as pretraining drew its first ones (standard deviation 0.02)."""
    rows, width = table.weight.shape
    grown = nn.Embedding(rows + new_words, width, padding_idx=table.padding_idx)
    with torch.no_grad():
        nn.init.normal_(grown.weight, std=0.02)
        grown.weight[:rows] = table.weight
    return grown


_STACK_NAMES = ("vision_encoder", "text_encoder", "fusion_encoder")
_PLACES = {
    "retrieval": ("trunk.vision_encoder", "trunk.text_encoder", "trunk.fusion_encoder"),
    "captioning": ("image_encoder", "decoder.text", "decoder.fusion"),
    "vqa": ("image_encoder", "question_encoder", "fusion"),
}


class XvlmFamily:
    """See `benchmarks.tavlp.families.contract.Family`."""

    name = "xvlm"
    checkpoint: Path = example.WEIGHTS
    pretraining_pairs = PRETRAINING_PAIRS

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file()

    def build(self) -> EmojiXvlm:
        return example.build_model()

    def example_inputs(self) -> Batch:
        return dict(example.example_inputs)

    def calibration_batches(self, seed: int, count: int, batch_size: int) -> list[Batch]:
        return calibration_batches(self.tokenizer(), seed, count, batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, EmojiXvlm)
        return calibration_loss(model, batch, self.tokenizer().mask_id)

    def retrieval_model(self, pretrained: nn.Module) -> XvlmRetrieval:
        assert isinstance(pretrained, EmojiXvlm)
        return XvlmRetrieval(pretrained)

    def captioning_model(self, pretrained: nn.Module) -> XvlmCaptioner:
        assert isinstance(pretrained, EmojiXvlm)
        return XvlmCaptioner(pretrained)

    def answering_model(self, pretrained: nn.Module, *, new_words: int, answers: int) -> XvlmAnswerer:
        assert isinstance(pretrained, EmojiXvlm)
        return XvlmAnswerer(pretrained, new_words, answers)

    def mask_names(self, task: str) -> Mapping[str, str | Sequence[str]]:
        return dict(zip(_STACK_NAMES, _PLACES[task], strict=True))

    def left_behind(self, task: str) -> Sequence[str]:
        return ()


XVLM = XvlmFamily()
