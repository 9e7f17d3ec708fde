"""Generic image-text pairs for calibration: scenes with their sentence, and scenes with the name of one thing in them."""

from __future__ import annotations

import numpy as np
import torch
from emoji_xvlm.scenes import load_atlas, render_scenes, sample_scenes
from emoji_xvlm.tokenizer import Tokenizer

from benchmarks.tavlp.families.contract import Batch

FIRST_SEED = 8_100_001
"""Seeds of pretraining, of its held-out set and of its own calibration set are others."""


def calibration_batches(tokenizer: Tokenizer, seed: int, count: int, batch_size: int) -> list[Batch]:
    """Batches from two sources in turns, drawn by a seed, of the distribution of pretraining but not of its draws.

    Even batches are pairs of a scene and a sentence on all of it, odd ones of a scene and the name of one thing in it,
    as the paper calibrates on captions and on region descriptions. Texts are as long as they come, and padded.

    Args:
        tokenizer: of the family.
        seed: draws scenes, sentences and names.
        count: batches.
        batch_size: pairs in a batch.
    """
    names = load_atlas().names
    batches = []
    for index in range(count):
        rng = np.random.default_rng([FIRST_SEED + seed, index])
        scenes = sample_scenes(rng, batch_size, "train")
        batch = render_scenes(rng, scenes)
        texts = batch.captions
        if index % 2:
            texts = tuple(names[int(rng.choice(scene.emoji))] for scene in scenes)
        input_ids, attention_mask = tokenizer.encode_batch(texts)
        batches.append(
            {
                "pixel_values": torch.from_numpy(batch.pixel_values),
                "input_ids": torch.from_numpy(input_ids),
                "attention_mask": torch.from_numpy(attention_mask),
            }
        )
    return batches
