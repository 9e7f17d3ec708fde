"""The same masks whatever is in force around the call: torch's default dtype and device, and its autograd modes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.passes.calibration import calibrate
from mfcompile.region import ROWS
from tests.made_sites import MadeModel, made
from tests.models import Batch, vlm_batch, vlm_captured, vlm_regions

BATCHES = [vlm_batch((6, 3, 5), seed=seed) for seed in range(2)]
GRADIENTS: dict[str, dict[str, Any]] = {
    "snip": {},
    "itersnip": {"steps": 2, "batches_per_step": 1},
    "chita": {"gradients": 2, "block_size": 60},
    "chita++": {"steps": 2, "gradients": 2, "block_size": 60},
    "tamt": {"learning_rate": 1.0},
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no autograd": torch.no_grad,
    "another device": lambda: torch.device("meta"),  # a tensor that is made there cannot be read
}


def weights() -> MadeModel:
    model = made({"vision": [(16, 12), (8, 12)], "text": [(16, 8), (1, 1)]})
    model.add("fused", torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), rows=[(0, 16), (16, 24)], layout=ROWS)
    return model


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2:4"])
@pytest.mark.parametrize("criterion", ["multiflow", "magnitude", "random", "lamp", "l2", "wanda"])
def test_masks_do_not_depend_on_it(criterion: str, pattern: str, around: str) -> None:
    model = weights()
    expected = model.select(criterion=criterion, pattern=pattern).digest()
    with SURROUNDINGS[around]():
        assert model.select(criterion=criterion, pattern=pattern).digest() == expected


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = module(**batch)["fused"].pow(2).mean()
    return loss


def with_gradients(criterion: str) -> str:
    return mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, criterion=criterion, criterion_options=GRADIENTS[criterion], batches=BATCHES,
        loss_fn=loss_of, sparsity={"vision": 0.5, "text": 0.75, "fusion": 0.6},
    ).digest()  # fmt: skip


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("criterion", GRADIENTS)
def test_nor_do_masks_and_values_from_gradients(criterion: str, around: str) -> None:
    expected = with_gradients(criterion)
    with SURROUNDINGS[around]():
        assert with_gradients(criterion) == expected


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_nor_do_statistics_and_a_weight_update(around: str) -> None:
    def found() -> str:
        statistics = calibrate(vlm_captured(), vlm_regions(), BATCHES, observe="module")
        return mfcompile.select_masks(
            vlm_captured(), vlm_regions(), statistics, sparsity=0.9, update="sparsegpt", batches=BATCHES
        ).digest()

    expected = found()
    with SURROUNDINGS[around]():
        assert found() == expected
