"""A sparsity per layer: patterns of weights, the most specific of which wins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mfcompile
from mfcompile.region import WeightLayout
from tests.made_sites import MadeModel, made
from tests.models import vlm_captured, vlm_regions, vlm_statistics


def removed_fractions(allocation: dict[str, float], **options: Any) -> tuple[dict[str, int], mfcompile.MaskSet]:
    masks = mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics(), allocation=allocation, **options)
    return {name: mask.weight_count - mask.kept_count for name, mask in masks.packed.items()}, masks


def test_the_most_specific_pattern_wins() -> None:
    allocation = {
        "*": 0.3,
        "text.*": 0.5,
        "text.0.*": 0.6,
        "text.0.up.weight": 0.97,
        "region:fusion": 0.75,
        "re:fusion.1.cross.*": 0.1,
    }
    removed, masks = removed_fractions(allocation)
    expected = {}
    for site in vlm_regions().pruned_sites:
        name, fraction = site.fqn, 0.3
        if name.startswith("fusion.1.cross"):
            fraction = 0.1
        elif site.region == "fusion":
            fraction = 0.75
        elif name == "text.0.up.weight":
            fraction = 0.97
        elif name.startswith("text.0."):
            fraction = 0.6
        elif name.startswith("text."):
            fraction = 0.5
        expected[name] = int(fraction * site.weight_count)
    assert removed == expected
    assert isinstance(masks.sparsity, float)
    assert abs(masks.sparsity - sum(removed.values()) / masks.weight_count) < 0.01


def test_order_of_patterns_does_not_matter() -> None:
    allocation = {"*": 0.3, "text.*": 0.5, "text.0.up.weight": 0.9}
    backwards = dict(reversed(allocation.items()))
    assert removed_fractions(allocation)[1] == removed_fractions(backwards)[1]


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("criterion", ["multiflow", "random", "lamp", "wanda", "magnitude"])
def test_any_criterion_keeps_the_counts(criterion: str, rounding: str) -> None:
    removed, _ = removed_fractions({"*": 0.63, "vision.*": 0.0}, criterion=criterion, rounding=rounding)
    for site in vlm_regions().pruned_sites:
        assert removed[site.fqn] == (0 if site.fqn.startswith("vision") else int(0.63 * site.weight_count))


def test_layers_lose_whole_blocks() -> None:
    model = made({"vision": [(8, 5)], "text": [(10, 5)]})
    removed = model.removed(model.select(pattern="4x1", allocation={"vision0": 0.5, "text0": 0.7}))
    assert {name: int(gone.sum()) for name, gone in removed.items()} == {"vision0": 20, "text0": 32}


def test_row_ranges_and_experts_of_a_parameter_have_its_sparsity() -> None:
    model = MadeModel()
    model.add("fused", torch.randn(12, 5), rows=[(0, 4), (4, 12)])
    model.add("experts", torch.randn(3, 4, 5), layout=WeightLayout((1,), (2,), (0,)))
    removed = model.removed(model.select(allocation={"fused": 0.5, "experts": 0.2}))
    assert {name: int(gone.sum()) for name, gone in removed.items()} == {
        "fused[0:4]": 10,
        "fused[4:12]": 20,
        "experts[0]": 4,
        "experts[1]": 4,
        "experts[2]": 4,
    }
