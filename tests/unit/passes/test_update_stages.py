"""Stages of a weight update: what is earlier by dataflow, and how budget and number of passes cut it up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.passes.update_stages import SiteGroup, group_sites, plan_stages
from tests.models import Mlp, TwoLayers, vlm_captured, vlm_regions
from tests.unit.passes.test_experts import Mixture, image


def groups_of(captured: mfcompile.CapturedGraph, regions: mfcompile.RegionMap) -> list[SiteGroup]:
    return group_sites(captured, regions, regions.pruned_sites)


def names(groups: list[SiteGroup]) -> list[list[str]]:
    return [[site.name.removesuffix(".weight") for site in group.sites] for group in groups]


def test_depth_counts_pruned_layers_on_the_longest_way() -> None:
    groups = groups_of(vlm_captured(), vlm_regions())
    depths = {name: group.depth for group, listed in zip(groups, names(groups), strict=True) for name in listed}
    assert depths["vision.0.attention.query"] == depths["text.0.attention.value"] == 0
    assert depths["vision.0.attention.out"] == 1
    assert (depths["vision.0.up"], depths["vision.0.down"], depths["vision.1.attention.key"]) == (2, 3, 4)
    assert depths["fusion.0.attention.query"] == depths["fusion.0.cross.key"] == 8  # after the text, after the image
    assert depths["fusion.0.cross.query"] == 10
    assert [group.depth for group in groups] == sorted(depths[listed[0]] for listed in names(groups))


def test_sites_that_read_one_activation_are_one_group() -> None:
    groups = groups_of(vlm_captured(), vlm_regions())
    together = [listed for listed in names(groups) if len(listed) > 1]
    assert ["text.1.attention.query", "text.1.attention.key", "text.1.attention.value"] in together
    assert ["fusion.0.cross.key", "fusion.0.cross.value", "fusion.1.cross.key", "fusion.1.cross.value"] in together
    assert sum(map(len, names(groups))) == len(vlm_regions().pruned_sites)


def test_a_weight_that_is_called_again_is_as_deep_as_its_first_call() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Mlp(), Mlp()])

        def forward(self, image: Tensor) -> Tensor:
            for _ in range(3):
                for block in self.blocks:
                    image = block(image)
            return image

    captured = mfcompile.capture(Recurrent(), torch.randn(2, 3, 4))
    groups = groups_of(captured, mfcompile.infer_regions(captured))
    assert [group.depth for group in groups] == [0, 1, 2, 3]
    assert [group.activations for group in groups] == [3, 3, 3, 3]
    assert groups[0].size_bytes == 4 * 4 * 4 * (1 + 3)


def test_a_write_in_place_is_on_the_way() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, image: Tensor) -> Tensor:
            states = torch.zeros_like(image)
            flat = states.view(-1, 4)
            states[:, 1:] = self.first(image)[:, 1:]
            result: Tensor = self.second(flat)
            return result

    captured = mfcompile.capture(Writing(), torch.randn(2, 3, 4))
    regions = mfcompile.infer_regions(captured, targets=["*"], modalities={"image": "vision"})
    assert [group.depth for group in groups_of(captured, regions)] == [0, 1]


def test_every_expert_is_a_group_of_its_own() -> None:
    captured = mfcompile.capture(Mixture("looked up"), image())
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    assert len(groups_of(captured, regions)) == len(regions.pruned_sites)


def test_passes_cut_the_depths_into_equal_parts() -> None:
    groups = groups_of(vlm_captured(), vlm_regions())
    depths = len({group.depth for group in groups})
    assert len(plan_stages(groups, 1 << 30)) == depths
    assert len(plan_stages(groups, 1 << 30, 1)) == 1
    assert len(plan_stages(groups, 1 << 30, 1000)) == depths
    four = plan_stages(groups, 1 << 30, 4)
    assert [sorted({group.depth for group in stage}) for stage in four] == [
        list(range(start, min(start + 5, depths))) for start in range(0, depths, 5)
    ]
    assert [group for stage in four for group in stage] == groups


def test_the_budget_cuts_further_and_a_group_that_is_too_large_stands_alone() -> None:
    groups = groups_of(vlm_captured(), vlm_regions())
    budget = 3 * max(group.size_bytes for group in groups)
    stages = plan_stages(groups, budget, 1)
    assert len(stages) > 1
    assert all(sum(group.size_bytes for group in stage) <= budget for stage in stages)
    assert [group for stage in stages for group in stage] == groups
    assert [len(stage) for stage in plan_stages(groups, 0, 1)] == [1] * len(groups)


def test_nothing_to_do_is_no_stage() -> None:
    captured = mfcompile.capture(TwoLayers(), torch.randn(2, 3, 4))
    assert plan_stages(group_sites(captured, mfcompile.infer_regions(captured), []), 1 << 30) == []
