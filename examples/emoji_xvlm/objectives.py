"""The four losses of pretraining: contrastive, region, matching and masked words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emoji_xvlm.modeling import EmojiXvlm
from emoji_xvlm.scenes import SceneBatch
from emoji_xvlm.tokenizer import SPECIAL_TOKENS, Tokenizer

IGNORED = -100


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of B scenes with up to M objects each, and the U different emoji names in it.

    pixel_values: (B, 3, 64, 64). input_ids, attention_mask: (B, L).
    region_weights: (R, T - 1), share of each patch in each object; rows sum to 1.
    region_images: (R,) scene of each object. region_names: (R,) row of the object's name.
    name_ids, name_mask: (U, K) tokens of the names.
    is_same_text: (B, B) bool, True where two different scenes have the same sentence.
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    region_weights: Tensor
    region_images: Tensor
    region_names: Tensor
    name_ids: Tensor
    name_mask: Tensor
    is_same_text: Tensor

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on a device."""
        return TrainingBatch(**{name: value.to(device) for name, value in vars(self).items()})


def collate(batch: SceneBatch, tokenizer: Tokenizer, names: Sequence[str], patch_px: int = 8) -> TrainingBatch:
    """Tokenize the sentences and turn boxes into patch weights."""
    input_ids, attention_mask = tokenizer.encode_batch(batch.captions)
    scene_index, slot_index = np.nonzero(batch.labels >= 0)
    labels = batch.labels[scene_index, slot_index]
    unique, region_names = np.unique(labels, return_inverse=True)
    name_ids, name_mask = tokenizer.encode_batch([names[label] for label in unique])

    boxes = batch.boxes[scene_index, slot_index] / patch_px
    edges = np.arange(batch.pixel_values.shape[-1] // patch_px)
    overlap_x = np.clip(np.minimum(boxes[:, 2:3], edges + 1) - np.maximum(boxes[:, 0:1], edges), 0, 1)
    overlap_y = np.clip(np.minimum(boxes[:, 3:4], edges + 1) - np.maximum(boxes[:, 1:2], edges), 0, 1)
    shares = (overlap_y[:, :, None] * overlap_x[:, None, :]).reshape(len(boxes), -1)
    shares /= shares.sum(axis=1, keepdims=True)

    captions = np.array(batch.captions)
    is_same_text = (captions[:, None] == captions[None, :]) & ~np.eye(len(captions), dtype=bool)
    return TrainingBatch(
        pixel_values=torch.from_numpy(batch.pixel_values),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        region_weights=torch.from_numpy(shares.astype(np.float32)),
        region_images=torch.from_numpy(scene_index),
        region_names=torch.from_numpy(region_names),
        name_ids=torch.from_numpy(name_ids),
        name_mask=torch.from_numpy(name_mask),
        is_same_text=torch.from_numpy(is_same_text),
    )


def contrastive_loss(similarity: Tensor, is_same_text: Tensor) -> Tensor:
    """Symmetric cross-entropy of (B, B) image-text logits; pairs with the same sentence are left out."""
    logits = similarity.masked_fill(is_same_text, float("-inf"))
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class TextAndImageEmbedder(Protocol):
    """What the region loss asks of a model."""

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and padding mask to (B, L, D)."""

    def embed_image(self, states: Tensor) -> Tensor:
        """(..., D) to (..., E) unit vectors."""

    def embed_text(self, states: Tensor) -> Tensor:
        """(..., D) to (..., E) unit vectors."""


def region_loss(model: TextAndImageEmbedder, batch: TrainingBatch, image_states: Tensor, scale: Tensor) -> Tensor:
    """Each object's patches must find the object's name among all names of the batch."""
    name_states = model.encode_text(batch.name_ids, batch.name_mask)
    patches = image_states[:, 1:][batch.region_images]
    pooled = torch.einsum("rt,rtd->rd", batch.region_weights.to(patches.dtype), patches)
    logits = scale * model.embed_image(pooled).float() @ model.embed_text(name_states[:, 0]).float().T
    return F.cross_entropy(logits, batch.region_names)


def _draw_negatives(wrong: Tensor, hard_share: float, generator: torch.Generator) -> Tensor:
    """One column for each row of (N, B) logits; -inf is never drawn."""
    uniform = wrong.isfinite().float()
    uniform = uniform / uniform.sum(dim=-1, keepdim=True)
    chances = hard_share * wrong.softmax(dim=-1) + (1 - hard_share) * uniform
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


@torch.no_grad()
def draw_pairs(
    similarity: Tensor, is_same_text: Tensor, count: int, hard_share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose ``count`` true pairs, each with a negative sentence and a negative image.

    ``hard_share`` of the negatives are drawn in proportion to the softmax of the similarity, as in X-VLM and BLIP; the
    others uniformly, without which a young fusion sees only pairs that it cannot tell apart.

    Args:
        similarity: (B, B) logits, one row an image, one column a sentence.
        is_same_text: (B, B) bool, True where a wrong pair has the sentence of the right one.
        count: at most B.
        hard_share: 0 to 1.
        generator: on the CPU, decides the draw.

    Returns:
        image_rows, text_rows: (3 count,) int64 each, on the device of ``similarity``. A pair matches where both agree.
    """
    wrong = similarity.detach().float().clone()
    wrong.fill_diagonal_(float("-inf"))
    wrong = wrong.masked_fill(is_same_text, float("-inf")).cpu()
    texts = _draw_negatives(wrong[:count], hard_share, generator)
    images = _draw_negatives(wrong.T[:count], hard_share, generator)
    own = torch.arange(count)
    image_rows, text_rows = torch.cat([own, own, images]), torch.cat([own, texts, own])
    return image_rows.to(similarity.device), text_rows.to(similarity.device)


def matching_loss(
    model: EmojiXvlm,
    batch: TrainingBatch,
    image_states: Tensor,
    text_states: Tensor,
    similarity: Tensor,
    count: int,
    hard_share: float,
    generator: torch.Generator,
) -> Tensor:
    """Match or not, for the pairs of `draw_pairs`."""
    image_rows, text_rows = draw_pairs(similarity, batch.is_same_text, count, hard_share, generator)
    mask = batch.attention_mask[text_rows]
    fused = model.fuse(text_states[text_rows], image_states[image_rows], mask)
    targets = (image_rows == text_rows).long()
    return F.cross_entropy(model.itm_head(fused[:, 0]).float(), targets)


def masked_word_loss(
    model: EmojiXvlm,
    batch: TrainingBatch,
    image_states: Tensor,
    count: int,
    mask_id: int,
    generator: torch.Generator,
    rate: float = 0.3,
) -> Tensor:
    """Guess masked words of the last ``count`` sentences from the image and the other words."""
    input_ids, attention_mask = batch.input_ids[-count:], batch.attention_mask[-count:]
    is_masked = torch.rand(input_ids.shape, generator=generator).to(input_ids.device) < rate
    is_masked &= input_ids >= len(SPECIAL_TOKENS)
    text_states = model.encode_text(input_ids.masked_fill(is_masked, mask_id), attention_mask)
    fused = model.fuse(text_states, image_states[-count:], attention_mask)
    targets = input_ids.masked_fill(~is_masked, IGNORED)
    return F.cross_entropy(model.mlm_head(fused).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def calibration_loss(model: EmojiXvlm, batch: dict[str, Tensor], mask_id: int, seed: int = 0) -> Tensor:
    """Contrastive, matching and masked words on image-text pairs: what pruners that need gradients look at.

    Args:
        model: the model, or one of its copies.
        batch: pixel_values (B, 3, 64, 64), input_ids and attention_mask (B, L).
        mask_id: token that stands for a masked word.
        seed: of the negatives and of the masked words, so that a batch has one loss.
    """
    generator = torch.Generator().manual_seed(seed)
    empty = torch.empty(0)
    input_ids = batch["input_ids"]
    is_same_text = (input_ids[:, None] == input_ids[None]).all(dim=-1)
    is_same_text &= ~torch.eye(len(input_ids), dtype=torch.bool)
    pairs = TrainingBatch(**batch, **dict.fromkeys(_REGIONS, empty), is_same_text=is_same_text)
    image_states = model.encode_image(pairs.pixel_values)
    text_states = model.encode_text(pairs.input_ids, pairs.attention_mask)
    images, texts = model.embed_image(image_states[:, 0]), model.embed_text(text_states[:, 0])
    similarity = model.logit_scale.exp() * images @ texts.T
    count = len(input_ids)
    return (
        contrastive_loss(similarity, is_same_text)
        + matching_loss(model, pairs, image_states, text_states, similarity, count, 0.5, generator)
        + masked_word_loss(model, pairs, image_states, count, mask_id, generator)
    )


_REGIONS = ("region_weights", "region_images", "region_names", "name_ids", "name_mask")
