"""Captioning: a sentence about a scene of a narrow domain, against all sentences that are true of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from emoji_xvlm.tokenizer import Tokenizer
from torch import Tensor

from benchmarks.tavlp.families.contract import CaptioningModel, Family
from benchmarks.tavlp.metrics import bleu4, cider
from benchmarks.tavlp.pictures import SceneSet, domain_set
from benchmarks.tavlp.tasks.contract import Recipe, epochs
from benchmarks.tavlp.tasks.retrieval import TEST_BATCH

TRAIN_SEED, TEST_SEED = 12_000_001, 12_000_002
THINGS = 48
"""Different things in the scenes, of the 553 of pretraining: its own fine-tuning set can name no more in a few steps."""
SENTENCES_AN_IMAGE = 3
"""True sentences of a training image in a step, where it has as many; they share its image states."""
LABEL_SMOOTHING = 0.1
LONGEST = 32
"""Tokens of a sentence that is written, at most; true ones have 30."""
IGNORED = -100


@functools.lru_cache(maxsize=4)
def scenes(split: str, count: int) -> SceneSet:
    """The training set or the test set, whose scenes hold a pair of things that never met."""
    return domain_set(TRAIN_SEED, count, "train", THINGS) if split == "train" else domain_set(TEST_SEED, count, "test", THINGS)


@dataclass(frozen=True)
class Captioned:
    """pixel_values (B, 3, 64, 64); image_rows (S), input_ids and attention_mask (S, L) of S true sentences about them."""

    pixel_values: Tensor
    image_rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor


class Captioning:
    """Language modelling with label smoothing; tested by BLEU@4 and CIDEr of the likeliest word at every place."""

    name = "captioning"
    version = 2
    metrics = {"bleu4": "BLEU@4", "cider": "CIDEr"}  # noqa: RUF012 - read only
    has_zero_shot = False

    def model(self, family: Family) -> CaptioningModel:
        return family.captioning_model(family.build())

    def training_batches(self, family: Family, recipe: Recipe, seed: int) -> Iterator[Captioned]:
        data, tokenizer = scenes("train", recipe.train_size), family.tokenizer()
        rng = np.random.default_rng(seed)
        for rows in epochs(len(data), recipe.batch_size, seed):
            chosen = [rng.permutation(data.sentences[row])[:SENTENCES_AN_IMAGE] for row in rows]
            image_rows = np.repeat(np.arange(len(rows)), [len(texts) for texts in chosen])
            ids, mask = tokenizer.encode_batch([str(text) for texts in chosen for text in texts])
            yield Captioned(
                torch.from_numpy(data.pixel_values[rows]),
                torch.from_numpy(image_rows),
                torch.from_numpy(ids),
                torch.from_numpy(mask),
            )

    def loss(self, model: CaptioningModel, batch: Captioned, generator: torch.Generator) -> Tensor:
        images = model.encode_image(batch.pixel_values)[batch.image_rows]
        logits = model.next_words(images, batch.input_ids[:, :-1], batch.attention_mask[:, :-1])
        targets = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, IGNORED)
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING
        )

    def evaluate(self, model: CaptioningModel, family: Family, recipe: Recipe, device: torch.device) -> dict[str, float]:
        data, tokenizer = scenes("test", recipe.test_size), family.tokenizer()
        pixels = torch.from_numpy(data.pixel_values)
        written: list[str] = []
        for part in torch.split(pixels, TEST_BATCH):
            ids = write(model, model.encode_image(part.to(device)), tokenizer)
            written += [sentence(row, tokenizer) for row in ids.tolist()]
        return {"bleu4": bleu4(written, data.sentences), "cider": cider(written, data.sentences)}


def write(model: CaptioningModel, image_states: Tensor, tokenizer: Tokenizer, longest: int = LONGEST) -> Tensor:
    """The likeliest word at every place, until all rows have ended: (B, at most ``longest``) ids, cls first.

    Args:
        model: in eval mode.
        image_states: of B images.
        tokenizer: says how a sentence begins and ends.
        longest: tokens of a row.
    """
    ids = torch.full((len(image_states), 1), tokenizer.cls_id, device=image_states.device)
    ended = torch.zeros(len(image_states), dtype=torch.bool, device=image_states.device)
    while ids.shape[1] < longest and not bool(ended.all()):
        going = (~ended).nonzero()[:, 0]
        logits = model.next_words(image_states[going], ids[going], torch.ones_like(ids[going]))[:, -1]
        chosen = torch.full_like(ids[:, 0], tokenizer.pad_id)
        chosen[going] = logits.argmax(dim=-1)
        ended = ended | (chosen == tokenizer.sep_id)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    return ids


def sentence(ids: list[int], tokenizer: Tokenizer) -> str:
    """Words of a row up to its end, separated by blanks as those of true sentences are."""
    end = ids.index(tokenizer.sep_id) if tokenizer.sep_id in ids else len(ids)
    return tokenizer.decode(ids[:end]).replace(",", " ,")


CAPTIONING = Captioning()
