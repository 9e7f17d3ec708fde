"""SNIP from a model, a loss and batches to masks, against plain autograd and one sort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import CalibrationError
from mfcompile.passes.allocation import ALLOCATIONS
from tests.models import Batch, tiny_vlm, vlm_batch, vlm_captured, vlm_regions

BATCHES = [vlm_batch((6, 3, 5), seed=seed) for seed in range(3)]
SITES = vlm_regions().pruned_sites


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    outputs = module(**batch)
    wanted = torch.arange(len(batch["input_ids"])) % 2
    loss: Tensor = nn.functional.cross_entropy(outputs["match"], wanted) + outputs["image"].square().mean()
    return loss


def select(batches: Any = BATCHES, **options: Any) -> mfcompile.MaskSet:
    chosen: dict[str, Any] = {"criterion": "snip", "loss_fn": loss_fn, "sparsity": 0.63} | options
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), None, batches=batches, **chosen)


def sensitivities(batches: Sequence[Batch] = BATCHES) -> dict[str, NDArray[np.float32]]:
    """|g w| of every layer, by autograd on a model of its own."""
    module = tiny_vlm()
    for batch in batches:
        (loss_fn(module, batch) / len(batches)).backward()  # type: ignore[no-untyped-call]
    found = {}
    for site in SITES:
        weight = module.get_parameter(site.fqn)
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        found[site.fqn] = (gradient * weight).detach().abs().numpy()
    return found


@pytest.mark.parametrize("sparsity", [0.1, 0.63, 0.75, 0.9])
def test_the_most_sensitive_weights_of_the_model_stay(sparsity: float) -> None:
    masks, scores = select(sparsity=sparsity), sensitivities()
    assert masks.weight_count - masks.kept_count == int(sparsity * masks.weight_count)
    kept = np.concatenate([scores[name][mask.numpy()] for name, mask in masks.items()])
    lost = np.concatenate([scores[name][~mask.numpy()] for name, mask in masks.items()])
    assert lost.max() <= kept.min() * (1 + 1e-4), "gradients that are added up in another order differ in their last bits"


def test_masks_are_nested_and_batches_may_be_anything_that_gives_them() -> None:
    low, high = select(sparsity=0.4), select(sparsity=0.8)
    assert all(not (high[name] & ~low[name]).any() for name in low)
    assert select(lambda: iter(BATCHES), sparsity=0.4) == low
    assert select((batch for batch in BATCHES), sparsity=0.4) == low
    assert select(list(reversed(BATCHES)), sparsity=0.4).kept_count == low.kept_count
    assert select(BATCHES[:1], sparsity=0.4) != low


def test_a_loss_may_be_an_attribute_of_what_comes_back() -> None:
    class Outputs:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    assert select(loss_fn=lambda module, batch: Outputs(loss_fn(module, batch))) == select()


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_and_pattern_takes_its_scores(allocation: str) -> None:
    scores = sensitivities()
    total = sum(site.weight_count for site in SITES)
    masks = select(allocation=allocation, sparsity=0.5)
    assert masks.weight_count - masks.kept_count == int(0.5 * total)
    for name, mask in masks.items():
        rows = zip(scores[name], mask.numpy(), strict=True) if allocation == "uniform-rows" else [(scores[name], mask.numpy())]
        for score, kept in rows:
            assert score[~kept].max(initial=0) <= score[kept].min(initial=np.inf) * (1 + 1e-4)
    blocks = select(allocation=allocation, sparsity=0.5, pattern="4x1")
    assert all((mask.view(-1, 4, mask.shape[1]).sum(1) % 4 == 0).all() for mask in blocks.values())
    assert blocks.weight_count - blocks.kept_count == total // 2


def test_n_of_m_takes_its_scores() -> None:
    masks, scores = select(pattern="2:4", sparsity=None), sensitivities()
    for name, mask in masks.items():
        groups, kept = scores[name].reshape(-1, 4), mask.numpy().reshape(-1, 4)
        assert (kept.sum(1) == 2).all()
        lost_best, kept_worst = np.where(kept, 0, groups).max(1), np.where(kept, groups, np.inf).min(1)
        assert (lost_best <= kept_worst * (1 + 1e-4)).all()


def test_what_the_loss_does_not_use_is_said_and_goes_first() -> None:
    def of_images(module: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = module(**batch)["image"].square().mean()
        return loss

    masks = select(loss_fn=of_images)
    unused = [site.fqn for site in SITES if site.region != "vision"]
    assert [item.subject for item in masks.diagnostics] == unused
    assert all("its gradient is zero" in item.reason for item in masks.diagnostics)
    removed = int(0.63 * masks.weight_count)
    kept_elsewhere = sum(masks.packed[name].kept_count for name in unused)
    assert kept_elsewhere == max(0, sum(masks.packed[name].weight_count for name in unused) - removed)


def test_the_model_is_left_alone() -> None:
    model = tiny_vlm().train()
    before = {name: (item.clone(), item.requires_grad) for name, item in model.named_parameters()}
    compiled = mfcompile.compile_pruned(
        model, vlm_batch(), sparsity=0.63, criterion="snip", calibration=BATCHES, loss_fn=loss_fn
    )
    assert compiled.masks == select()
    assert not compiled.statistics.sites
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][1]
    again = compiled.at_sparsity(0.9)
    assert again.masks == select(sparsity=0.9)


def test_a_loss_that_is_none_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"loss"):
        select(loss_fn=lambda module, batch: module(**batch))
    with pytest.raises(CalibrationError, match=r"no .*batch"):
        select([])


def test_the_seed_is_that_of_what_a_loss_draws() -> None:
    def noisy(module: nn.Module, batch: Batch) -> Tensor:
        return loss_fn(module, batch) * torch.rand(())

    def masks(seed: int) -> mfcompile.MaskSet:
        return select(loss_fn=noisy, seed=seed)

    state = torch.get_rng_state()
    assert masks(1) == masks(1) != masks(2)
    assert torch.equal(torch.get_rng_state(), state)


class Mine(mfcompile.Criterion):
    """A criterion of one's own that looks at statistics and gradients."""

    name = "mine"
    needs = frozenset({mfcompile.Need.STATISTICS, mfcompile.Need.GRADIENTS})

    def score(self, site: mfcompile.SiteData) -> Tensor:
        assert site.input_norm is not None
        assert site.gradient is not None
        return (site.gradient * site.weight).abs() * site.input_norm.float()


def test_a_criterion_may_need_both() -> None:
    def batches() -> Iterator[Batch]:
        yield from BATCHES

    compiled = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), criterion=Mine(), calibration=batches, loss_fn=loss_fn)
    assert compiled.statistics.batch_count == len(BATCHES)
    assert compiled.masks.kept_count == compiled.masks.weight_count - int(0.63 * compiled.masks.weight_count)
    assert compiled.masks != select()
