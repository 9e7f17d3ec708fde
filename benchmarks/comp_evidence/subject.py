"""The trained model that cells prune: its batches, its loss through forward alone, its held-out score."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfcompile
from benchmarks.comp_evidence.arms import EVERY
from benchmarks.comp_evidence.space import TokenGraphs
from mfcompile.comp.candidates import candidates_of
from mfcompile.comp.modes import TokenMode, UnitMode
from mfcompile.graph import CapturedGraph

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

LENGTH = 29
BATCH = 32
SPARE = 8
"""Scenes that are drawn beside those of a training batch: one in a thousand has a sentence that is too long."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Score:
    """How much of the held-out score is computed.

    Attributes:
        scenes: how many; chance is one in this number.
        candidates: how many of the nearest the matching score ranks again.
    """

    scenes: int = 300
    candidates: int = 3

    def of(self, module: nn.Module) -> dict[str, float]:
        """R@1 in per cent by embeddings and by matching, both ways, and ``r1``, their mean."""
        scoring = importlib.import_module("emoji_xvlm.evaluate")
        forward = scoring.module_forward(module)

        def padded(pixel_values: Any, *text: Any) -> Any:
            return forward(pixel_values, *(np.pad(item, ((0, 0), (0, LENGTH - item.shape[1]))) for item in text))

        found: dict[str, float] = scoring.evaluate_callable(padded, self.scenes, self.candidates)
        return found


def batch_of(scenes: Any, count: int = BATCH) -> Batch:
    """Inputs of the first ``count`` scenes whose sentences fit into the one length that all are padded to."""
    tokenizer = importlib.import_module("emoji_xvlm.tokenizer").Tokenizer.from_file()
    fits = [row for row, text in enumerate(scenes.captions) if len(tokenizer.encode(text)) <= LENGTH][:count]
    input_ids, attention_mask = tokenizer.encode_batch([scenes.captions[row] for row in fits], LENGTH)
    found = {"pixel_values": scenes.pixel_values[fits], "input_ids": input_ids, "attention_mask": attention_mask}
    return {name: torch.from_numpy(values) for name, values in found.items()}


def calibration(seed: int) -> Batch:
    """The calibration batch of a seed."""
    return batch_of(importlib.import_module("emoji_xvlm.scenes").calibration_batch(seed, BATCH))


def training(seed: int, count: int) -> Iterator[Batch]:
    """The training batches of a seed."""
    scenes = importlib.import_module("emoji_xvlm.scenes")
    for step in range(count):
        yield batch_of(scenes.training_batch(1_000 + seed, step, BATCH + SPARE))


class Subject:
    """A model with all that searches of it share."""

    @cached_property
    def model(self) -> nn.Module:
        """Trained, in eval mode."""
        found: nn.Module = importlib.import_module("emoji_xvlm.model").build_model()
        return found

    @cached_property
    def captured(self) -> CapturedGraph:
        """Of one calibration batch that no seed has."""
        return mfcompile.capture(self.model, calibration(9_999))

    @cached_property
    def _found(self) -> tuple[CapturedGraph, dict[str, UnitMode | TokenMode]]:
        found = candidates_of(self.captured, mfcompile.CompOptions(modes=EVERY))
        return found.dense, {mode.name: mode for mode in found.modes}

    @property
    def modes(self) -> Mapping[str, UnitMode | TokenMode]:
        """All modes by name."""
        return self._found[1]

    @cached_property
    def graphs(self) -> TokenGraphs:
        """Of the dense program."""
        return TokenGraphs(self._found[0])

    @cached_property
    def scale(self) -> float:
        """What similarities are multiplied by in the contrastive loss, as trained."""
        named = dict(self.model.named_parameters())
        return float(named["logit_scale"].detach().exp())

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Contrastive on embeddings, and matching against the sentence of the next picture; through forward alone."""
        wrong = {name: values if name == "pixel_values" else values.roll(1, 0) for name, values in batch.items()}
        own, other = module(**batch), module(**wrong)
        same = (batch["input_ids"][:, None] == batch["input_ids"][None]).all(-1)
        is_twin = same & ~torch.eye(len(same), dtype=torch.bool)
        logits = (self.scale * own["image_embeds"] @ own["text_embeds"].T).masked_fill(is_twin, float("-inf"))
        places = torch.arange(len(logits))
        contrastive = (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2
        is_wrong = ~(batch["input_ids"] == wrong["input_ids"]).all(-1)
        pairs = torch.cat([own["itm_logits"], other["itm_logits"][is_wrong]])
        targets = torch.cat([torch.ones(len(logits)), torch.zeros(int(is_wrong.sum()))]).long()
        return contrastive + F.cross_entropy(pairs, targets)
