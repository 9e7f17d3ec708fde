"""Every criterion on a model whose weights are tied and defined in another order than they run, against plain NumPy."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mfcompile
from tests.models import Attention
from tests.oracle import reference

WIDTH, VOCABULARY = 8, 20


class Block(nn.Module):
    """Runs attention, then up, then down; defines them the other way round."""

    def __init__(self, shared: Block | None = None) -> None:
        super().__init__()
        self.down: nn.Module = nn.Linear(2 * WIDTH, WIDTH) if shared is None else shared.down
        self.up: nn.Module = nn.Linear(WIDTH, 2 * WIDTH) if shared is None else shared.up
        self.attention = Attention()

    def forward(self, states: Tensor, context: Tensor) -> Tensor:
        states = states + self.attention(states, context)
        result: Tensor = states + self.down(torch.relu(self.up(states)))
        return result


class Captioner(nn.Module):
    """An encoder and a decoder of text that share their MLPs, as in BLIP; both attend to the image."""

    def __init__(self) -> None:
        super().__init__()
        encoder = [Block(), Block()]
        self.decoder = nn.ModuleList([Block(block) for block in encoder])
        self.encoder = nn.ModuleList(encoder)
        self.vision = nn.ModuleList([Block(), Block()])
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, image: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.vision:
            image = block(image, image)
        matched = told = self.embedding(input_ids)
        for block in self.encoder:
            matched = block(matched, image)
        for block in self.decoder:
            told = block(told, image)
        return matched, told


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (3, 5), generator=generator)
    return {"image": torch.randn(3, 4, WIDTH, generator=generator), "input_ids": ids}


def loss_fn(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    matched, told = module(**inputs)
    loss: Tensor = matched.square().mean() + told.abs().mean()
    return loss


@cache
def model() -> Captioner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Captioner().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(float(torch.rand(())) + 0.5)
    return module


@cache
def prepared() -> tuple[mfcompile.CapturedGraph, mfcompile.RegionMap, mfcompile.CalibrationStatistics]:
    captured = mfcompile.capture(model(), batch(0))
    regions = mfcompile.infer_regions(captured)
    return captured, regions, mfcompile.calibrate(captured, [batch(1), batch(2)], regions=regions)


def weights() -> dict[str, NDArray[np.float32]]:
    """Every prunable weight once, under its first name."""
    return {
        name: parameter.detach().numpy()
        for name, parameter in model().named_parameters()
        if parameter.ndim == 2 and not name.startswith("embedding")
    }


def scores_of(criterion: str) -> dict[str, Any]:
    if criterion == "random":
        generator = torch.Generator().manual_seed(3)
        return {name: torch.randn(weight.shape, generator=generator).numpy() for name, weight in weights().items()}
    if criterion == "snip":
        module = Captioner().eval()
        module.load_state_dict(model().state_dict())
        for seed in (1, 2):
            (loss_fn(module, batch(seed)) / 2).backward()  # type: ignore[no-untyped-call]
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        return {name: np.abs(gradients[name].numpy() * weight) for name, weight in weights().items()}  # type: ignore[union-attr]
    by_weight: dict[str, Any] = {"magnitude": np.abs, "lamp": reference.score_lamp, "l2": reference.score_l2}
    score = by_weight[criterion]
    return {name: score(weight) for name, weight in weights().items()}


def select(criterion: str, **options: Any) -> dict[str, NDArray[np.bool_]]:
    masks = mfcompile.select_masks(
        *prepared(), criterion=criterion, seed=3, batches=[batch(1), batch(2)], loss_fn=loss_fn, **options
    )
    return {name: mask.numpy() for name, mask in masks.items()}


def test_a_tied_weight_is_a_site_once_and_sites_are_in_the_order_of_parameters() -> None:
    sites = prepared()[1].pruned_sites
    assert [site.fqn for site in sites] == list(weights())
    assert {site.fqn: site.tied_with for site in sites if site.tied_with} == {
        f"decoder.{index}.{name}.weight": (f"encoder.{index}.{name}.weight",) for index in (0, 1) for name in ("down", "up")
    }


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("sparsity", [0.63, 0.75, 0.9])
@pytest.mark.parametrize("criterion", ["random", "magnitude", "lamp", "l2", "snip"])
def test_one_threshold_over_every_weight_once(criterion: str, sparsity: float, rounding: Any) -> None:
    found = select(criterion, sparsity=sparsity, rounding=rounding)
    expected = reference.threshold_group(scores_of(criterion), sparsity, rounding)
    assert list(found) == list(expected)
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, expected[name], err_msg=name)


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("sparsity", [0.63, 0.75, 0.9])
@pytest.mark.parametrize("criterion", ["multiflow", "multiflow-inverted"])
def test_multiflow_counts_a_tied_weight_once(criterion: str, sparsity: float, rounding: Any) -> None:
    _, regions, statistics = prepared()
    norms = {name: seen.input_norm().numpy() for name, seen in statistics.sites.items()}
    expected = reference.multiflow(
        weights(), norms, regions.weights, sparsity, rounding, inverted=criterion == "multiflow-inverted"
    )
    found = select(criterion, sparsity=sparsity, rounding=rounding)
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, expected[name], err_msg=name)
