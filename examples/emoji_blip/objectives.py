"""The losses of pretraining: contrastive, matching and next word; the region loss is the sister example's."""

import torch
import torch.nn.functional as F
from emoji_xvlm.objectives import IGNORED, contrastive_loss, draw_pairs
from torch import Tensor

from emoji_blip.modeling import EmojiBlip

LABEL_SMOOTHING = 0.1  # of the next word, as BLIP


def matching_loss(
    model: EmojiBlip, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor, rows: tuple[Tensor, Tensor]
) -> Tensor:
    """Match or not, for pairs of an image row and a text row as `draw_pairs` gives them."""
    image_rows, text_rows = rows
    fused = model.fuse(input_ids[text_rows], attention_mask[text_rows], image_states[image_rows])
    return F.cross_entropy(model.itm_head(fused[:, 0]).float(), (image_rows == text_rows).long())


def next_word_loss(model: EmojiBlip, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor) -> Tensor:
    """Cross-entropy of each next token, [SEP] included, given the image and the tokens before it."""
    logits = model.decode(input_ids, attention_mask, image_states)[:, :-1]
    targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING
    )


def calibration_loss(model: EmojiBlip, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    """Contrastive, matching and next word on image-text pairs: what pruners that need gradients look at.

    Args:
        model: the model, or one of its copies.
        batch: pixel_values (B, 3, 64, 64), input_ids and attention_mask (B, L).
        seed: of the negatives, so that a batch has one loss.
    """
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    count = len(input_ids)
    is_same_text = (input_ids[:, None] == input_ids[None]).all(dim=-1) & ~torch.eye(count, dtype=torch.bool)
    image_states = model.encode_image(batch["pixel_values"])
    text_states = model.encode_text(input_ids, attention_mask)
    images, texts = model.embed_image(image_states[:, 0]), model.embed_text(text_states[:, 0])
    similarity = model.logit_scale.exp() * images @ texts.T
    rows = draw_pairs(similarity, is_same_text, count, 0.5, torch.Generator().manual_seed(seed))
    return (
        contrastive_loss(similarity, is_same_text)
        + matching_loss(model, input_ids, attention_mask, image_states, rows)
        + next_word_loss(model, input_ids, attention_mask, image_states)
    )
