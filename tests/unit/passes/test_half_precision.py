"""Weights in bfloat16 and float16: norms, scores, selection and masks are those of the same values in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.passes.reduction import reduce_activation
from mfcompile.passes.routing import reduce_routed
from mfcompile.passes.scores import node_saliencies, score_weights
from mfcompile.passes.selection import magnitude_threshold
from mfcompile.region import Reading
from tests.models import tiny_vlm, vlm_batch

HALVES = [torch.bfloat16, torch.float16]


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_of_squares_are_exact_sums_of_the_rounded_values(dtype: torch.dtype) -> None:
    activation = values(3, 700, 8, dtype=dtype) * 200  # squares beyond the largest float16
    expected = (activation.double().numpy() ** 2).reshape(-1, 8).sum(0)
    np.testing.assert_allclose(reduce_activation(activation).sum_of_squares.numpy(), expected, rtol=1e-6)
    routed = reduce_routed(activation.flatten(0, 1), Reading(), 1)
    np.testing.assert_allclose(routed.sums[0].numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", HALVES)
def test_scores_and_saliencies_are_those_in_float32(dtype: torch.dtype) -> None:
    weight, norm = values(6, 40, dtype=dtype), torch.rand(40, dtype=torch.float64) * 1e5
    assert torch.equal(score_weights(weight, norm), score_weights(weight.float(), norm))
    assert score_weights(weight, norm).dtype == torch.float32
    for found, expected in zip(node_saliencies(weight, norm), node_saliencies(weight.float(), norm), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_thresholds_count_ties_of_coarse_values_exactly(dtype: torch.dtype) -> None:
    """Half precision has few values, and so many ties."""
    tensors = [(values(*shape, dtype=dtype) * 16).round() / 64 for shape in ((50, 40), (70, 30))]
    found = magnitude_threshold([lambda t=t: t for t in tensors], 1234, ["a", "b"])  # type: ignore[misc]
    magnitudes = np.concatenate([tensor.abs().double().numpy().reshape(-1) for tensor in tensors])
    assert found.value == np.sort(magnitudes)[1233]
    for tensor, below, ties in zip(tensors, found.below, found.ties, strict=True):
        flat = tensor.abs().double().numpy()
        assert (below, ties) == (int((flat < found.value).sum()), int((flat == found.value).sum()))
    assert sum(found.ties) > 1
    assert sum(found.pruned_counts(1234)) == 1234


@pytest.mark.parametrize("dtype", HALVES)
def test_masks_are_those_of_the_same_values_and_norms(dtype: torch.dtype) -> None:
    """From one set of statistics, a half-precision model and its float32 copy get the same masks, bit for bit."""
    half = tiny_vlm().to(dtype)
    wide = tiny_vlm().to(dtype).float()
    batch = vlm_batch()
    masks = {}
    captured = mfcompile.capture(wide, batch)
    regions = mfcompile.infer_regions(captured)
    statistics = mfcompile.calibrate(captured, regions=regions)
    masks["wide"] = mfcompile.select_masks(captured, regions, statistics, sparsity=0.63)
    rounded = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    captured = mfcompile.capture(half, rounded)
    assert [site.name for site in mfcompile.infer_regions(captured).sites] == [site.name for site in regions.sites]
    masks["half"] = mfcompile.select_masks(captured, regions, statistics, sparsity=0.63)
    assert masks["half"] == masks["wide"]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_precision_model_is_pruned_in_place_of_its_dtype(dtype: torch.dtype) -> None:
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in vlm_batch().items()}
    model = tiny_vlm().to(dtype)
    compiled = mfcompile.compile_pruned(model, batch, sparsity=0.63)
    for region, sites in compiled.regions.by_region().items():
        total = sum(site.weight_count for site in sites)
        assert sum(int(compiled.masks[fqn].sum()) for fqn in {site.fqn for site in sites}) == total - int(0.63 * total), region
    weights = dict(compiled.strip().named_parameters())
    for fqn, mask in compiled.masks.items():
        assert weights[fqn].dtype == dtype
        assert torch.equal(weights[fqn][mask], model.get_parameter(fqn)[mask])
        assert not weights[fqn][~mask].any()


def test_norms_of_half_precision_layers_are_close_to_those_of_the_graph() -> None:
    """Both observers square the same rounded activations."""
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in vlm_batch().items()}
    captured = mfcompile.capture(nn.Module.to(tiny_vlm(), torch.bfloat16), batch)
    regions = mfcompile.infer_regions(captured)
    graph, module = (mfcompile.calibrate(captured, regions=regions, observe=how) for how in ("graph", "module"))
    for name, site in graph.sites.items():
        torch.testing.assert_close(site.sum_of_squares, module.sites[name].sum_of_squares, rtol=1e-12, atol=0)
