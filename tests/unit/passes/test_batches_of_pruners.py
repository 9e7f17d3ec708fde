"""What pruners that take gradients do with batches that are none, have no length, or are drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from tests.models import Batch, vlm_batch, vlm_captured, vlm_regions

BATCHES = [vlm_batch((6, 3, 5), seed=seed) for seed in range(3)]
OPTIONS: dict[str, dict[str, Any]] = {
    "snip": {},
    "itersnip": {"steps": 2, "batches_per_step": 2},
    "chita": {"gradients": 2, "block_size": 60},
    "chita++": {"steps": 2, "gradients": 2, "block_size": 60},
    "tamt": {"learning_rate": 1.0},
}


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = module(**batch)["fused"].pow(2).mean()
    return loss


def select(criterion: str, batches: Any, **options: Any) -> mfcompile.MaskSet:
    arguments = {"criterion": criterion, "criterion_options": OPTIONS[criterion], "sparsity": 0.75, **options}
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), None, batches=batches, loss_fn=loss_of, **arguments)


class Stream(IterableDataset[Batch]):
    """Has no length, so that its loader's raises."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(BATCHES)


@pytest.mark.parametrize("criterion", OPTIONS)
def test_no_batch_at_all_is_said(criterion: str) -> None:
    with pytest.raises(CalibrationError, match=r"no batch"):
        select(criterion, [])


@pytest.mark.parametrize("criterion", OPTIONS)
def test_a_loader_without_a_length_gives_what_a_list_gives(criterion: str) -> None:
    loader = DataLoader(Stream(), batch_size=None)
    assert select(criterion, loader).mask_digest() == select(criterion, BATCHES).mask_digest()


def noisy() -> Iterator[Batch]:
    for batch in BATCHES:
        yield {**batch, "pixel_values": batch["pixel_values"] + torch.rand(())}


@pytest.mark.parametrize("criterion", OPTIONS)
def test_batches_that_are_drawn_follow_the_seed_and_leave_no_trace(criterion: str) -> None:
    found = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        state = torch.get_rng_state()
        found.append(select(criterion, noisy, seed=3).mask_digest())
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def test_counting_the_batches_of_tamt_changes_none_of_them() -> None:
    counted = OPTIONS["tamt"] | {"steps": len(BATCHES)}
    assert select("tamt", noisy).mask_digest() == select("tamt", noisy, criterion_options=counted).mask_digest()


@pytest.mark.parametrize("criterion", OPTIONS)
def test_one_threshold_for_all_and_sparsities_by_region_contradict_each_other(criterion: str) -> None:
    with pytest.raises(InputError, match=r"'score-global' sets one threshold for the whole model.*'score-per-region'"):
        select(criterion, BATCHES, sparsity=dict.fromkeys(("vision", "text", "fusion"), 0.5), allocation="score-global")
