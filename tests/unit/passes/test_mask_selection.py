"""Mask selection: criterion and allocation together, on models with plain, fused and transposed weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from mfcompile.masks import MaskSet
from mfcompile.passes.mask_selection import site_weight
from mfcompile.passes.scores import score_weights
from mfcompile.statistics import SiteStatistics
from tests.models import vlm_captured, vlm_regions, vlm_statistics


def select(sparsity: float = 0.63, **options: Any) -> MaskSet:
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics(), sparsity=sparsity, **options)


def removed(masks: MaskSet) -> int:
    return masks.weight_count - masks.kept_count


def test_every_region_reaches_the_sparsity_to_the_weight() -> None:
    masks = select()
    for sites in vlm_regions().by_region().values():
        total = sum(site.weight_count for site in sites)
        kept = sum(int(masks[site.fqn].sum()) for site in sites)
        assert total - kept == int(0.63 * total)
    assert masks.sparsity == 0.63
    assert dict(masks.regions) == {name: vlm_regions().weights[name] for name in masks}
    assert list(masks) == [site.fqn for site in vlm_regions().pruned_sites]


def test_each_site_keeps_its_best_scores() -> None:
    masks = select()
    for site in vlm_regions().pruned_sites:
        weight = site_weight(vlm_captured(), site)
        score = score_weights(weight, vlm_statistics().sites[site.name].input_norm())
        kept = masks[site.fqn]
        if bool(kept.any()) and not bool(kept.all()):
            assert float(score[kept].min()) >= float(score[~kept].max())


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("criterion", ["multiflow", "multiflow-inverted", "magnitude"])
def test_masks_are_nested_as_sparsity_grows(criterion: str, rounding: str) -> None:
    """Guaranteed for the same statistics: budgets of a site only grow, and its ranking stays."""
    previous = select(0.0, criterion=criterion, rounding=rounding)
    for sparsity in (0.1, 0.37, 0.63, 0.631, 0.9, 0.99):
        masks = select(sparsity, criterion=criterion, rounding=rounding)
        assert removed(masks) > removed(previous) or sparsity == 0.631
        for name, mask in masks.items():
            assert not (mask & ~previous[name]).any(), f"{name} has a weight back at {sparsity}"
        previous = masks


@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_sparsity_zero_keeps_everything(rounding: str) -> None:
    masks = select(0.0, rounding=rounding)
    assert masks.kept_count == masks.weight_count == 3584


def test_inverted_keeps_the_lowest_scores_within_the_same_budgets() -> None:
    plain, inverted = select(0.5), select(0.5, criterion="multiflow-inverted")
    for site in vlm_regions().pruned_sites:
        score = score_weights(site_weight(vlm_captured(), site), vlm_statistics().sites[site.name].input_norm())
        kept = inverted[site.fqn]
        assert int(kept.sum()) == int(plain[site.fqn].sum())
        if bool(kept.any()) and not bool(kept.all()):
            assert float(score[kept].max()) <= float(score[~kept].min())


def test_magnitude_global_has_one_threshold_over_all_regions() -> None:
    masks = mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, sparsity=0.63, criterion="magnitude", allocation="magnitude-global"
    )
    weights = {name: vlm_captured().parameter(name).detach().abs() for name in masks}
    assert removed(masks) == int(0.63 * masks.weight_count)
    assert min(float(weights[name][mask].min()) for name, mask in masks.items() if mask.any()) >= max(
        float(weights[name][~mask].max()) for name, mask in masks.items() if not mask.all()
    )


def test_score_global_has_one_threshold_over_all_scores() -> None:
    masks = select(0.5, allocation="score-global")
    assert removed(masks) == int(0.5 * masks.weight_count)
    low, high = 0.0, float("inf")
    for site in vlm_regions().pruned_sites:
        seen = vlm_statistics().sites[site.name]
        w = site_weight(vlm_captured(), site).double().abs().numpy()
        a = (seen.sum_of_squares / seen.sample_count).sqrt().numpy()
        score = np.outer((w * a).mean(1), (w * a).mean(0)) * w
        kept = masks[site.fqn].numpy()
        high = min(high, score[kept].min(initial=np.inf))
        low = max(low, score[~kept].max(initial=0.0))
    assert low <= high * (1 + 1e-5)


def test_score_global_compares_norms_per_sample() -> None:
    """A site that saw every sample four times is no more important for it."""
    sites = dict(vlm_statistics().sites)
    for name in list(sites)[::3]:
        seen = sites[name]
        sites[name] = replace(seen, sum_of_squares=4 * seen.sum_of_squares, sample_count=4 * seen.sample_count)
    options: dict[str, Any] = {"sparsity": 0.5, "allocation": "score-global"}
    masks = mfcompile.select_masks(vlm_captured(), vlm_regions(), replace(vlm_statistics(), sites=sites), **options)
    assert masks == select(0.5, allocation="score-global")


def test_a_site_without_a_token_is_ranked_by_magnitude() -> None:
    site = vlm_regions().pruned_sites[3]
    silent = SiteStatistics(torch.zeros(site.in_features, dtype=torch.float64), 0, 0, 0)
    statistics = replace(vlm_statistics(), sites={**vlm_statistics().sites, site.name: silent})
    masks = mfcompile.select_masks(vlm_captured(), vlm_regions(), statistics)
    weight, kept = site_weight(vlm_captured(), site).abs(), masks[site.fqn]
    assert 0 < int(kept.sum()) < kept.numel()
    assert float(weight[kept].min()) >= float(weight[~kept].max())


def test_missing_statistics_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"'multiflow' needs calibration statistics; run calibrate\(\) first"):
        mfcompile.select_masks(vlm_captured(), vlm_regions(), None)
    site = vlm_regions().pruned_sites[2].name
    others = {name: item for name, item in vlm_statistics().sites.items() if name != site}
    with pytest.raises(CalibrationError, match=f"statistics hold nothing about {site}.*Calibrate again"):
        mfcompile.select_masks(vlm_captured(), vlm_regions(), replace(vlm_statistics(), sites=others))


@pytest.mark.parametrize("option", ["criterion", "allocation", "rounding"])
def test_unknown_options_name_the_known_ones(option: str) -> None:
    options: dict[str, Any] = {option: "wander"}
    with pytest.raises(InputError, match=f"{option}='wander' is unknown; .*choose one of .*(magnitude|exact)"):
        select(**options)


def test_nothing_to_prune_says_why() -> None:
    captured = mfcompile.capture(nn.Linear(4, 2), torch.randn(3, 4))
    regions = mfcompile.infer_regions(captured, modalities={"input": "vision"})
    assert regions.skipped_sites
    with pytest.raises(InputError, match="no weight is to be pruned: no linear weight lies inside a repeated block"):
        mfcompile.select_masks(captured, regions, None, criterion="magnitude")


def test_progress_counts_weights() -> None:
    seen: list[tuple[int, int | None]] = []
    mfcompile.select_masks(
        vlm_captured(), vlm_regions(), vlm_statistics(), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(index + 1, 44) for index in range(44)]


def test_a_nan_weight_is_refused_by_name() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))
    captured = mfcompile.capture(model, torch.randn(2, 4))
    regions = mfcompile.infer_regions(captured, modalities={"input": "vision"})
    statistics = mfcompile.calibrate(captured, regions=regions)
    with torch.no_grad():
        model.get_parameter("1.0.weight")[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"1\.0\.weight holds 1 NaN"):
        mfcompile.select_masks(captured, regions, statistics)


class Odd(nn.Module):
    """A block whose weights lie in unusual ways: fused queries and keys of two inputs, and a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(12, 4))
        self.turned = nn.Parameter(torch.randn(4, 6))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        first = F.linear(image, self.fused[:6])
        second = F.linear(text, self.fused[6:])
        mixed = (first @ second.transpose(1, 2)).softmax(-1) @ second
        return mixed + image @ self.turned


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList([Odd(), Odd()])

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        for item in self.items:
            image = item(image, text)[..., :4]
        return image


@cache
def odd() -> tuple[mfcompile.CapturedGraph, mfcompile.RegionMap, mfcompile.CalibrationStatistics]:
    torch.manual_seed(0)
    captured = mfcompile.capture(Stack(), {"image": torch.randn(2, 5, 4), "text": torch.randn(2, 3, 4)})
    regions = mfcompile.infer_regions(captured)
    return captured, regions, mfcompile.calibrate(captured, regions=regions)


def test_fused_rows_are_ranked_by_their_own_input() -> None:
    captured, regions, statistics = odd()
    names = [site.name for site in regions.pruned_sites]
    assert names[:3] == ["items.0.fused[0:6]", "items.0.fused[6:12]", "items.0.turned"]
    masks = mfcompile.select_masks(captured, regions, statistics, sparsity=0.5)
    for site in regions.pruned_sites:
        score = score_weights(site_weight(captured, site), statistics.sites[site.name].input_norm())
        mask = masks[site.fqn].t() if site.is_transposed else masks[site.fqn]
        kept = mask[site.rows[0] : site.rows[1]]
        assert 0 < int(kept.sum()) < kept.numel(), site.name
        assert float(score[kept].min()) >= float(score[~kept].max()), site.name
    first, second = (statistics.sites[f"items.0.fused[{rows}]"].sum_of_squares for rows in ("0:6", "6:12"))
    assert not torch.allclose(first, second)


def test_a_mask_has_the_layout_of_its_parameter() -> None:
    captured, regions, statistics = odd()
    turned = next(site for site in regions.pruned_sites if site.name == "items.0.turned")
    assert (turned.is_transposed, turned.out_features, turned.in_features) == (True, 6, 4)
    masks = mfcompile.select_masks(captured, regions, statistics)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        name: tuple(captured.parameter(name).shape) for name in masks
    }


def test_rows_that_are_not_pruned_are_kept() -> None:
    captured, regions, statistics = odd()
    sites = tuple(
        replace(site, skipped="left dense by hand") if site.name == "items.0.fused[0:6]" else site for site in regions.sites
    )
    masks = mfcompile.select_masks(captured, replace(regions, sites=sites), statistics, sparsity=0.9)
    assert bool(masks["items.0.fused"][:6].all())
    assert not bool(masks["items.0.fused"][6:].all())


def test_n_of_m_runs_along_the_inputs_of_a_weight_however_it_is_stored() -> None:
    """(4, 6) is (inputs, outputs): of the four inputs of an output two stay; rows of a fused weight have four inputs each."""
    captured, regions, statistics = odd()
    masks = mfcompile.select_masks(captured, regions, statistics, pattern="2:4")
    for index in (0, 1):
        assert masks[f"items.{index}.turned"].sum(0).tolist() == [2] * 6
        assert masks[f"items.{index}.fused"].sum(1).tolist() == [2] * 12


def test_blocks_run_along_the_outputs_of_a_weight_however_it_is_stored() -> None:
    """Six outputs hold one block of four; a range of six rows of a fused weight too, from its own start."""
    captured, regions, statistics = odd()
    masks = mfcompile.select_masks(captured, regions, statistics, pattern="4x1", sparsity=0.5)
    assert masks.weight_count - masks.kept_count == int(0.5 * masks.weight_count) // 4 * 4
    for index in (0, 1):
        turned, fused = masks[f"items.{index}.turned"], masks[f"items.{index}.fused"]
        assert all(row[:4].sum() in (0, 4) and bool(row[4:].all()) for row in turned)
        for start in (0, 6):
            assert set(fused[start : start + 4].sum(0).tolist()) <= {0, 4}
            assert bool(fused[start + 4 : start + 6].all())
    assert {item.subject for item in masks.diagnostics} == {site.name for site in regions.pruned_sites}


def test_patches_are_read_as_the_inputs_that_they_are() -> None:
    """A (3, 2, 2) kernel has twelve inputs, read in this order: three groups of four."""
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(2))
    captured = mfcompile.capture(model.eval(), torch.randn(2, 3, 4, 4))
    regions = mfcompile.infer_regions(captured, modalities={"input": "vision"}, targets=["Conv2d"])
    weight = captured.parameter("0.weight").detach().abs()
    mask = mfcompile.select_masks(captured, regions, criterion="magnitude", pattern="2:4")["0.weight"]
    assert mask.shape == (8, 3, 2, 2)
    for output in range(8):
        for channel in range(3):
            kept, sizes = mask[output, channel].flatten(), weight[output, channel].flatten()
            assert int(kept.sum()) == 2
            assert float(sizes[kept].min()) > float(sizes[~kept].max())
    blocks = mfcompile.select_masks(captured, regions, criterion="magnitude", pattern="4x1", sparsity=0.5)["0.weight"]
    assert set(blocks.reshape(2, 4, -1).sum(1).flatten().tolist()) == {0, 4}
    blocks = mfcompile.select_masks(captured, regions, criterion="magnitude", pattern="1x4", sparsity=0.5)["0.weight"]
    assert sorted(blocks.reshape(8, 3, 4).sum(2).flatten().tolist()) == [0] * 12 + [4] * 12
