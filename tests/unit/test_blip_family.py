"""The BLIP-like family of the benchmark: models of the tasks compute what pretraining computed, and masks find their place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mfcompile

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from emoji_blip.modeling import EmojiBlip, ModelConfig
from emoji_xvlm.inputs import tokenize
from emoji_xvlm.scenes import calibration_batch

from benchmarks.tavlp.families.blip import BLIP
from benchmarks.tavlp.families.contract import TaskModel

TINY = ModelConfig(vocab_size=678, width=32, heads=2, mlp_width=64, vision_layers=1, text_layers=2, embed_dim=16)
TASKS = ("retrieval", "captioning", "vqa")


def build() -> EmojiBlip:
    torch.manual_seed(0)
    return EmojiBlip(TINY).eval()


def build_task(task: str) -> TaskModel:
    if task == "retrieval":
        return BLIP.retrieval_model(build())
    if task == "captioning":
        return BLIP.captioning_model(build())
    return BLIP.answering_model(build(), new_words=3, answers=5)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return tokenize(calibration_batch(0, 4, seed=1))


@pytest.fixture(scope="module")
def masks(batch: dict[str, Tensor]) -> mfcompile.MaskSet:
    captured = mfcompile.capture(build(), batch)
    return mfcompile.select_masks(captured, mfcompile.infer_regions(captured), None, sparsity=0.5, criterion="magnitude")


@pytest.mark.parametrize("task", TASKS)
def test_every_mask_finds_its_place_or_is_left_behind(task: str, masks: mfcompile.MaskSet) -> None:
    moved = mfcompile.transfer_masks(masks, build_task(task), BLIP.mask_names(task))
    lost = {name for name in moved.unmatched if not name.startswith(tuple(BLIP.left_behind(task)))}
    assert not lost
    assert len(moved.unmatched) == 4 * TINY.text_layers
    unused = "text_encoder" if task == "captioning" else "text_decoder"
    assert all(name.startswith(f"{unused}.layers.") and ".attention." in name for name in moved.unmatched)


@pytest.mark.parametrize("task", TASKS)
def test_a_pruned_task_model_computes_what_the_pruned_model_does(
    task: str, masks: mfcompile.MaskSet, batch: dict[str, Tensor]
) -> None:
    whole: Any = mfcompile.mask_module(build(), masks)
    expected = whole(**batch)
    fresh = build_task(task)
    model: Any = mfcompile.mask_module(fresh, mfcompile.transfer_masks(masks, fresh, BLIP.mask_names(task)).masks)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    image_states = model.encode_image(batch["pixel_values"])
    if task == "retrieval":
        text_states = model.encode_text(ids, mask)
        torch.testing.assert_close(model.embed_image(image_states), expected["image_embeds"])
        torch.testing.assert_close(model.embed_text(text_states), expected["text_embeds"])
        torch.testing.assert_close(model.match(image_states, text_states, ids, mask), expected["itm_logits"])
        torch.testing.assert_close(model.scale(), whole.logit_scale.exp())
    elif task == "captioning":
        torch.testing.assert_close(model.next_words(image_states, ids, mask), expected["lm_logits"])
    else:  # the prompt moved behind the new words, and the old words are where they were
        fused = whole.fuse(ids, mask, whole.encode_image(batch["pixel_values"]))
        torch.testing.assert_close(model.answers(image_states, ids, mask), model.head(fused[:, 0]))
        assert model.answers(image_states, ids.clamp(min=680), mask).shape == (4, 5)
        assert {id(value) for value in model.new_parameters()} == {id(value) for value in model.head.parameters()}
