"""Masks from scores that are computed piece by piece, in threads: the same as from whole scores, one site after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.errors import InputError
from mfcompile.masks import MaskSet
from mfcompile.passes import mask_packing, pieces, pruning_run
from mfcompile.passes.criteria.base import SiteData
from mfcompile.passes.criteria.multiflow import InvertedMultiflow, Multiflow
from mfcompile.statistics import SiteStatistics


class Odd(nn.Module):
    """A plain weight, a transposed one, one that two inputs share by rows, and a stack of experts stored both ways round."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.plain = nn.Linear(width, 7, bias=False)
        self.turned = nn.Parameter(torch.randn(7, width))
        self.fused = nn.Parameter(torch.randn(10, width))
        self.experts = nn.Parameter(torch.randn(3, width, 5))
        self.back = nn.Parameter(torch.randn(3, width, 5))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image = self.plain(image) @ self.turned + image
        meeting = F.linear(image, self.fused[:5]) @ F.linear(text, self.fused[5:]).transpose(1, 2)
        image = image + meeting.softmax(-1) @ text
        for inner, outer in zip(self.experts, self.back, strict=True):
            image = image + (image @ inner).relu() @ outer.t()
        return image


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList([Odd(), Odd()])

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        for item in self.items:
            image = item(image, text)
        return image


@cache
def made() -> tuple[mfcompile.CapturedGraph, mfcompile.RegionMap, mfcompile.CalibrationStatistics]:
    torch.manual_seed(0)
    captured = mfcompile.capture(Stack(), {"image": torch.randn(2, 5, 9), "text": torch.randn(2, 3, 9)})
    regions = mfcompile.infer_regions(captured)
    return captured, regions, mfcompile.calibrate(captured, regions=regions)


def select(**options: Any) -> MaskSet:
    captured, regions, statistics = made()
    return mfcompile.select_masks(captured, regions, options.pop("statistics", statistics), **{"sparsity": 0.63, **options})


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Whole(Multiflow):
    """The same scores, in full."""

    name: ClassVar[str] = "whole"

    def score(self, site: SiteData) -> Tensor:
        return super().score(site)


@dataclass(frozen=True)
class WholeInverted(InvertedMultiflow):
    name: ClassVar[str] = "whole-inverted"

    def score(self, site: SiteData) -> Tensor:
        return super().score(site)


@pytest.mark.parametrize("pair", [(Multiflow(), Whole()), (InvertedMultiflow(), WholeInverted())], ids=["plain", "inverted"])
@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("size", [8, 24, 1 << 18])
def test_masks_are_those_of_whole_scores(
    pair: tuple[Multiflow, Multiflow], rounding: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = {(site.is_transposed, site.expert is not None, site.rows[0] > 0) for site in made()[1].pruned_sites}
    assert layouts >= {
        (False, False, False),
        (False, False, True),
        (True, False, False),
        (True, True, False),
        (False, True, False),
    }
    monkeypatch.setattr(pieces, "PIECE", size)
    for sparsity in (0.0, 0.3, 0.63, 0.99):
        quick = select(sparsity=sparsity, criterion=pair[0], rounding=rounding)
        with monkeypatch.context() as patched:
            patched.delattr(pruning_run, "kept_bits_by_site")
            assert quick == select(sparsity=sparsity, criterion=pair[1], rounding=rounding)


def test_large_sites_share_themselves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = select()
    monkeypatch.setattr(mask_packing, "_PIECES_APART", 0)
    monkeypatch.setattr(pieces, "PIECE", 24)
    assert select() == before


def test_a_score_of_ones_own_is_not_passed_over() -> None:
    @dataclass(frozen=True)
    class Backwards(Multiflow):
        name: ClassVar[str] = "backwards"

        def score(self, site: SiteData) -> Tensor:
            return -super().score(site)

    assert select(criterion=Backwards()) == select(criterion="multiflow-inverted") != select()


def test_a_site_without_a_token_is_ranked_by_magnitude_among_others() -> None:
    captured, regions, statistics = made()
    site = next(site for site in regions.pruned_sites if site.expert == 1)
    silent = SiteStatistics(torch.zeros(site.in_features, dtype=torch.float64), 0, 0, 0)
    masks = select(statistics=replace(statistics, sites={**statistics.sites, site.name: silent}))
    weight, kept = (
        site.matrix(site.layout.matrices(tensor.detach())) for tensor in (captured.parameter(site.fqn), masks[site.fqn])
    )
    assert 0 < int(kept.sum()) < kept.numel()
    assert float(weight.abs()[kept].min()) >= float(weight.abs()[~kept].max())
    assert masks != select()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_where_no_magnitude_is_ranked(value: float) -> None:
    captured, _, _ = made()
    weight = captured.parameter("items.1.turned").detach()
    kept = float(weight[2, 3])
    weight[2, 3] = value
    try:
        with pytest.raises(InputError, match=r"items\.1\.turned holds 1 NaN or infinite values.*Check the checkpoint"):
            select(allocation="uniform")
    finally:
        weight[2, 3] = kept


def test_progress_counts_parameters_in_order() -> None:
    seen: list[tuple[int, int | None]] = []
    select(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(index + 1, 10) for index in range(10)]
