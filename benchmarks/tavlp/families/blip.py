"""The BLIP-like family: every text layer reads the image, encoder and decoder are tied (examples/emoji_blip)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from emoji_blip import model as example
from emoji_blip.modeling import EmojiBlip, ModelConfig, causal_mask, with_prompt
from emoji_blip.objectives import calibration_loss
from emoji_xvlm.modeling import key_mask
from emoji_xvlm.tokenizer import Tokenizer
from torch import Tensor, nn

from benchmarks.tavlp.calibration import calibration_batches
from benchmarks.tavlp.families.contract import AnsweringModel, Batch, CaptioningModel, RetrievalModel

PROMPTS = 2
"""Rows of [ENC] and [DEC] at the end of the table of words."""


class BlipRetrieval(RetrievalModel):
    """Vision stack and text encoder, both projections and the matching head, all of pretraining; no decoder."""

    def __init__(self, pretrained: EmojiBlip) -> None:
        super().__init__()
        self.image_encoder = pretrained.vision_encoder
        self.text_encoder = pretrained.text_encoder
        self.vision_proj = pretrained.vision_proj
        self.text_proj = pretrained.text_proj
        self.logit_scale = pretrained.logit_scale
        self.itm_head = pretrained.itm_head
        self.encode_id = pretrained.config.encode_id

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.image_encoder(pixel_values)
        return states

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.text_encoder(input_ids, key_mask(attention_mask))
        return states

    def embed_image(self, image_states: Tensor) -> Tensor:
        return nn.functional.normalize(self.vision_proj(image_states[:, 0]), dim=-1)

    def embed_text(self, text_states: Tensor) -> Tensor:
        return nn.functional.normalize(self.text_proj(text_states[:, 0]), dim=-1)

    def scale(self) -> Tensor:
        return self.logit_scale.exp()

    def match(self, image_states: Tensor, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        grounded = self.text_encoder(with_prompt(input_ids, self.encode_id), key_mask(attention_mask), image_states)
        logits: Tensor = self.itm_head(grounded[:, 0])
        return logits


class BlipCaptioner(CaptioningModel):
    """Vision stack and decoder with its word head, all of pretraining; what is tied to the encoder comes along."""

    def __init__(self, pretrained: EmojiBlip) -> None:
        super().__init__()
        self.image_encoder = pretrained.vision_encoder
        self.decoder = pretrained.text_decoder
        self.head = pretrained.lm_head
        self.decode_id = pretrained.config.decode_id

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.image_encoder(pixel_values)
        return states

    def next_words(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.decoder(with_prompt(input_ids, self.decode_id), causal_mask(attention_mask), image_states)
        logits: Tensor = self.head(states)
        return logits


class BlipAnswerer(AnsweringModel):
    """Vision stack, image-grounded encoder, and a classifier over its first state.

    BLIP lets a decoder write the answer; the answers are a closed set here, for both families alike.
    """

    def __init__(self, pretrained: EmojiBlip, new_words: int, answers: int) -> None:
        super().__init__()
        config = replace(pretrained.config, vocab_size=pretrained.config.vocab_size + new_words)
        self.image_encoder = pretrained.vision_encoder
        self.question_encoder = pretrained.text_encoder
        self.question_encoder.token_embed = widened_embedding(pretrained.text_encoder.token_embed, new_words)
        self.encode_id = config.encode_id
        width = config.width
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, answers)
        )

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.image_encoder(pixel_values)
        return states

    def answers(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        grounded = self.question_encoder(with_prompt(input_ids, self.encode_id), key_mask(attention_mask), image_states)
        logits: Tensor = self.head(grounded[:, 0])
        return logits

    def new_parameters(self) -> Sequence[nn.Parameter]:
        return list(self.head.parameters())


def widened_embedding(table: nn.Embedding, new_words: int) -> nn.Embedding:
    """A table with rows of new words between the old words and the prompts, drawn as pretraining drew its first ones."""
    rows, width = table.weight.shape
    widened = nn.Embedding(rows + new_words, width, padding_idx=table.padding_idx)
    with torch.no_grad():
        nn.init.trunc_normal_(widened.weight, std=0.02)
        widened.weight[: rows - PROMPTS] = table.weight[:-PROMPTS]
        widened.weight[-PROMPTS:] = table.weight[-PROMPTS:]
    return widened


_SHARED = ("cross_attention", "mlp")
_PLACES: dict[str, dict[str, str]] = {
    "retrieval": {"vision_encoder": "image_encoder", "text_encoder": "text_encoder"},
    "captioning": {
        "vision_encoder": "image_encoder",
        "text_decoder": "decoder",
        **{f"text_encoder.layers.*.{part}": f"decoder.layers.*.{part}" for part in _SHARED},
    },
    "vqa": {"vision_encoder": "image_encoder", "text_encoder": "question_encoder"},
}


class BlipFamily:
    """See `benchmarks.tavlp.families.contract.Family`."""

    name = "blip"
    checkpoint: Path = example.WEIGHTS

    @property
    def pretraining_pairs(self) -> int:
        """Scenes that pretraining drew, from the log beside the weights."""
        log = json.loads(self.checkpoint.with_name("training_log.json").read_text(encoding="utf-8"))
        ends = [stage["from_step"] for stage in log["stages"][1:]] + [log["log"][-1]["step"]]
        return sum(
            (end - stage["from_step"]) * stage["config"]["batch_size"] for stage, end in zip(log["stages"], ends, strict=True)
        )

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file()

    def build(self) -> EmojiBlip:
        return example.build_model()

    def example_inputs(self) -> Batch:
        return dict(example.example_inputs)

    def calibration_batches(self, seed: int, count: int, batch_size: int) -> list[Batch]:
        return calibration_batches(self.tokenizer(), seed, count, batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, EmojiBlip)
        return calibration_loss(model, batch)

    def retrieval_model(self, pretrained: nn.Module) -> BlipRetrieval:
        assert isinstance(pretrained, EmojiBlip)
        return BlipRetrieval(pretrained)

    def captioning_model(self, pretrained: nn.Module) -> BlipCaptioner:
        assert isinstance(pretrained, EmojiBlip)
        return BlipCaptioner(pretrained)

    def answering_model(self, pretrained: nn.Module, *, new_words: int, answers: int) -> BlipAnswerer:
        assert isinstance(pretrained, EmojiBlip)
        return BlipAnswerer(pretrained, new_words, answers)

    def mask_names(self, task: str) -> Mapping[str, str | Sequence[str]]:
        return _PLACES[task]

    def left_behind(self, task: str) -> Sequence[str]:
        """The self-attention that a task has no use for: the encoder's in captioning, the decoder's elsewhere."""
        unused = "text_encoder" if task == "captioning" else "text_decoder"
        return [f"{unused}.layers.{layer}.attention." for layer in range(ModelConfig.text_layers)]


BLIP = BlipFamily()
