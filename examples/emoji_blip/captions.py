"""Captions of the held-out scenes and their score; needs sacrebleu.

python -m emoji_blip.captions   # in the folder examples: scores the committed weights
"""

import json
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import sacrebleu
import torch
from emoji_xvlm.evaluate import BATCH_SIZE, SCENES
from emoji_xvlm.scenes import held_out_batch
from emoji_xvlm.tokenizer import Tokenizer
from torch import Tensor

from emoji_blip.modeling import EmojiBlip

MAX_LENGTH = 32  # tokens of a caption, [SEP] included; the longest of the templates has 29


@torch.inference_mode()
def write_captions(
    decode: Callable[[Tensor, Tensor, Tensor], Tensor], image_states: Tensor, tokenizer: Tokenizer, max_length: int = MAX_LENGTH
) -> list[str]:
    """The most likely word after each word, until [SEP].

    Args:
        decode: (B, L) ids, (B, L) padding mask and (B, T, D) image states to (B, L, V) logits, as `EmojiBlip.decode`.
        image_states: (B, T, D).
        tokenizer: of the ids.
        max_length: tokens after [CLS] at most.

    Returns:
        (B) sentences.
    """
    input_ids = torch.full((len(image_states), 1), tokenizer.cls_id, device=image_states.device)
    is_over = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    for _ in range(max_length):
        following = decode(input_ids, torch.ones_like(input_ids), image_states)[:, -1].argmax(dim=-1)
        following = following.masked_fill(is_over, tokenizer.sep_id)
        is_over |= following == tokenizer.sep_id
        if bool(is_over.all()):
            break
        input_ids = torch.cat([input_ids, following[:, None]], dim=1)
    return [tokenizer.decode(row) for row in input_ids.tolist()]


def score_captions(captions: Sequence[str], sentences: Sequence[Sequence[str]]) -> dict[str, float]:
    """``bleu`` (sacrebleu, 0 to 100) and ``exact``, per cent of captions that are one of their references.

    Args:
        captions: (N).
        sentences: (N) references of each; at least one.
    """
    references = [[" ".join(text.replace(" ,", ",").split()) for text in group] for group in sentences]
    streams = [list(column) for column in zip_longest(*references)]
    exact = np.mean([caption in group for caption, group in zip(captions, references, strict=True)])
    return {"bleu": float(sacrebleu.corpus_bleu(list(captions), streams).score), "exact": 100 * float(exact)}


def evaluate_captions(model: EmojiBlip, scenes: int = SCENES) -> dict[str, float]:
    """`score_captions` of what the decoder writes about the held-out scenes; all true sentences are references."""
    batch = held_out_batch(scenes)
    tokenizer = Tokenizer.from_file()
    captions: list[str] = []
    for pixel_values in torch.split(torch.from_numpy(batch.pixel_values), BATCH_SIZE):
        with torch.inference_mode():
            image_states = model.encode_image(pixel_values.to(model.logit_scale.device))
        captions += write_captions(model.decode, image_states, tokenizer)
    return score_captions(captions, batch.sentences)


if __name__ == "__main__":
    from emoji_blip.model import build_model

    trained = build_model()
    print(json.dumps({name: round(value, 2) for name, value in evaluate_captions(trained).items()}))
