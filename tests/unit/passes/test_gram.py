"""Gram matrices of what feeds a site: the rows that the norms are of, whatever way a weight is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.passes.calibration import plan_padding, repeated_weights, run_batches
from mfcompile.passes.gram import GramCollector
from tests.models import Mlp, rows, tiny_vlm, vlm_batch, vlm_captured, vlm_regions
from tests.unit.passes.test_experts import Mixture, image, looped
from tests.unit.passes.test_observers import USES, WIDTH, Block, Repeat, linear_inputs

# Products of float32, added up in float32; off the diagonal they cancel.
RTOL, ATOL = 1e-5, 1e-5


def collect(
    captured: mfcompile.CapturedGraph, regions: mfcompile.RegionMap, batches: list[Any] | None = None, observe: str = "auto"
) -> GramCollector:
    plan = plan_padding(captured, regions)
    collector = GramCollector(regions.pruned_sites, plan, repeated_weights(regions))
    run_batches(captured, regions, collector, batches, plan, observe=observe)
    return collector


def grams(collector: GramCollector) -> dict[str, Tensor]:
    found = {site.name: collector.gram(site) for site in collector.sites}
    return {name: gram for name, gram in found.items() if gram is not None}


def product(activations: Tensor) -> Tensor:
    flat = activations.detach().double().flatten(0, -2)
    return (flat.mT @ flat).float()


@pytest.mark.parametrize("how", ["graph", "module"])
@pytest.mark.parametrize("name", USES)
def test_every_way_to_use_a_weight(name: str, how: str) -> None:
    use = USES[name]
    torch.manual_seed(0)
    model = Repeat(lambda: Block(use.shapes, use.forward))
    captured = mfcompile.capture(model, torch.randn(2, 3, WIDTH))
    regions = mfcompile.infer_regions(captured, targets=["*"])
    seen = torch.randn(2, 3, WIDTH)
    found = grams(collect(captured, regions, [seen], how))
    with torch.no_grad():
        expected = use.expected(model.items[0], seen)
    for site, activation in expected.items():
        torch.testing.assert_close(found[f"items.0.{site}"].float(), product(activation), rtol=RTOL, atol=ATOL, msg=site)


@pytest.mark.parametrize("observe", ["auto", "module"])
def test_padding_is_left_out(observe: str) -> None:
    batches = [vlm_batch((6, 4), seed=1), vlm_batch((2, 6), seed=2)]
    found = grams(collect(vlm_captured(), vlm_regions(), batches, observe))
    expected: dict[str, Tensor] = {}
    for batch in batches:
        for name, (activation,) in linear_inputs(tiny_vlm(), batch).items():
            is_image = name.startswith("vision") or name.split(".")[2:4] in (["cross", "key"], ["cross", "value"])
            kept = activation if is_image or name == "head.weight" else activation[batch["attention_mask"] == 1]
            expected[name] = expected.get(name, torch.zeros(())) + product(kept)
    del expected["head.weight"]
    assert set(found) == set(expected)
    for name, gram in found.items():
        torch.testing.assert_close(gram, expected[name], rtol=RTOL, atol=ATOL, msg=name)


def test_nan_in_padding_is_left_out() -> None:
    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.blocks = nn.ModuleList([Mlp(), Mlp()])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            states: Tensor = self.embedding(input_ids) / attention_mask[..., None]
            for block in self.blocks:
                states = block(states)
            return states

    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    captured = mfcompile.capture(Poisoned(), {"input_ids": torch.arange(8).view(2, 4), "attention_mask": mask})
    found = grams(collect(captured, mfcompile.infer_regions(captured)))
    assert len(found) == 4
    assert all(gram.isfinite().all() and gram.diagonal().sum() > 0 for gram in found.values())


def test_query_key_and_value_share_one_matrix() -> None:
    collector = collect(vlm_captured(), vlm_regions())
    found = {site.name: collector.gram(site) for site in collector.sites}
    attention = "fusion.0.attention"
    assert found[f"{attention}.query.weight"] is found[f"{attention}.key.weight"] is found[f"{attention}.value.weight"]
    assert found["fusion.0.cross.key.weight"] is found["fusion.1.cross.value.weight"]  # the same image states
    assert found["fusion.0.cross.key.weight"] is not found["fusion.0.cross.query.weight"]
    activations = {use.activation for site in collector.sites for use in vlm_regions().evidence[site.fqn]}
    assert len({id(gram) for gram in found.values()}) == len(activations)


class Gated(nn.Module):
    """The second weight is only used where the first pixel says so: it sees fewer batches than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, image: Tensor) -> Tensor:
        states: Tensor = self.first(image)
        return states + self.second(image) if float(image[0, 0, 0]) > 0 else states


def gated() -> nn.Module:
    """Two of them; positive images stay positive, negative ones negative."""
    torch.manual_seed(0)
    model = Repeat(Gated)
    with torch.no_grad():
        for linear in (item for item in model.modules() if isinstance(item, nn.Linear)):
            linear.weight.abs_()
            linear.bias.zero_()
    return model


def test_sites_that_shared_until_now_part_without_disturbing_each_other() -> None:
    both, one = torch.rand(2, 3, 4), -torch.rand(2, 3, 4)
    captured = mfcompile.capture(gated(), both)
    regions = mfcompile.infer_regions(captured)
    found = grams(collect(captured, regions, [both, both / 2, one, both]))
    torch.testing.assert_close(found["items.0.first.weight"], product(torch.cat([both, both / 2, one, both])))
    torch.testing.assert_close(found["items.0.second.weight"], product(torch.cat([both, both / 2, both])))


@pytest.mark.parametrize("how", ["graph", "module"])
def test_a_sample_that_comes_again_counts_once(how: str) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, image: Tensor) -> Tensor:
            changed = torch.cat([torch.tanh(image[:1]), image[1:]])
            result: Tensor = self.linear(image) + self.linear(changed)
            return result

    seen = torch.randn(3, 5, 4)
    captured = mfcompile.capture(Repeat(Partly), seen)
    found = grams(collect(captured, mfcompile.infer_regions(captured), [seen], how))
    expected = product(torch.cat([seen, torch.tanh(seen[:1])]))
    torch.testing.assert_close(found["items.0.linear.weight"], expected, rtol=RTOL, atol=ATOL)


def test_batches_may_be_cut_otherwise() -> None:
    whole = vlm_batch((6, 3, 5, 2), seed=4)
    once = grams(collect(vlm_captured(), vlm_regions(), [whole]))
    twice = grams(collect(vlm_captured(), vlm_regions(), [rows(whole, [2, 0]), rows(whole, [1, 3])]))
    for name, gram in once.items():
        torch.testing.assert_close(twice[name], gram, rtol=RTOL, atol=ATOL, msg=name)


@pytest.mark.parametrize("way", ["loop", "grouped", "looked up", "batched"])
def test_an_expert_has_the_rows_that_were_routed_to_it(way: str) -> None:
    captured = mfcompile.capture(Mixture(way), image())
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    found = grams(collect(captured, regions))
    for name, activations in looped().items():
        torch.testing.assert_close(found[name], product(torch.cat(activations)), rtol=RTOL, atol=ATOL, msg=name)


def test_an_expert_without_a_token_has_no_matrix() -> None:
    captured = mfcompile.capture(Mixture("looked up"), image())
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    found = grams(collect(captured, regions, [image(length=1)[:1]]))
    experts = [site.name for site in regions.pruned_sites if site.expert is not None]
    assert 0 < len([name for name in experts if name in found]) < len(experts)


def test_patches_of_a_convolution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, (2, 4), (2, 4), padding=(0, 2))
            self.layers = nn.ModuleList([Mlp(), Mlp()])

        def forward(self, image: Tensor) -> Tensor:
            states: Tensor = self.convolution(image).flatten(2).mT
            for layer in self.layers:
                states = layer(states)
            return states

    pixels = torch.randn(2, 3, 6, 8)
    captured = mfcompile.capture(Net(), pixels)
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"}, targets=["convolution"])
    found = grams(collect(captured, regions))
    expected = product(F.unfold(pixels, (2, 4), stride=(2, 4), padding=(0, 2)).mT)
    torch.testing.assert_close(found["convolution.weight"], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_sums_are_kept_in_float32_at_least(dtype: torch.dtype, kind: torch.dtype) -> None:
    model = Repeat(Mlp).to(dtype)
    captured = mfcompile.capture(model, torch.randn(2, 3, 4, dtype=dtype))
    found = grams(collect(captured, mfcompile.infer_regions(captured)))
    assert {gram.dtype for gram in found.values()} == {kind}


def test_the_diagonal_is_the_sum_of_squares() -> None:
    batches = [vlm_batch((6, 3, 5, 2, 6), seed=1)]
    statistics = mfcompile.calibrate(vlm_captured(), batches, regions=vlm_regions())
    for name, gram in grams(collect(vlm_captured(), vlm_regions(), batches)).items():
        np.testing.assert_allclose(gram.diagonal().numpy(), statistics.sites[name].sum_of_squares.numpy(), rtol=RTOL)
