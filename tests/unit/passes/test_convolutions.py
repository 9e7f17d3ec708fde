"""Convolutions: those of patches are linear weights that ``targets`` may name, the others say why they are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError
from mfcompile.region import PruneSite

# Sums of a few hundred squares in float32, against float64.
RTOL = 1e-6
PATCHES = "a convolution of patches or single places (pruned only where targets names it)"


class Net(nn.Module):
    """One convolution, and two layers that are pruned whatever it is."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        states: Tensor = self.convolution(image).flatten(2).mT
        for layer in self.layers:
            states = layer(states)
        return states


def regions_of(convolution: nn.Module, image: Tensor, targets: list[str] | None = None) -> mfcompile.RegionMap:
    torch.manual_seed(0)
    captured = mfcompile.capture(Net(convolution), image)
    return mfcompile.infer_regions(captured, modalities={"image": "vision"}, targets=targets)


def site_of(regions: mfcompile.RegionMap) -> PruneSite:
    (site,) = [site for site in regions.sites if site.fqn == "convolution.weight"]
    return site


def picture(*sizes: int) -> Tensor:
    return torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(3))


def patches(image: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> NDArray[np.float64]:
    """(patches, in * kernel), cut out one by one."""
    array = np.pad(image.double().numpy(), [(0, 0), (0, 0), *[(size, size) for size in padding]])
    places = [range(0, size - length + 1, step) for size, length, step in zip(array.shape[2:], kernel, stride, strict=True)]
    rows = []
    for sample in array:
        for corner in np.ndindex(*[len(listed) for listed in places]):
            starts = [listed[index] for listed, index in zip(places, corner, strict=True)]
            cut = tuple(slice(start, start + length) for start, length in zip(starts, kernel, strict=True))
            rows.append(sample[(slice(None), *cut)].reshape(-1))
    return np.stack(rows)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "patches": (lambda: nn.Conv2d(3, 4, 4, 4), (8, 12)),
    "patches of unequal sides": (lambda: nn.Conv2d(3, 4, (2, 4), (2, 4), bias=False), (6, 8)),
    "image that is no whole number of patches": (lambda: nn.Conv2d(3, 4, 4, 4), (9, 11)),
    "padded": (lambda: nn.Conv2d(3, 4, 4, 4, padding=1), (6, 10)),
    "gaps between patches": (lambda: nn.Conv2d(3, 4, 2, 3), (8, 8)),
    "1x1": (lambda: nn.Conv2d(3, 4, 1), (5, 5)),
    "1x1 padded by mode": (lambda: nn.Conv2d(3, 4, 1, padding="same"), (5, 5)),
    "1x1 with a stride": (lambda: nn.Conv2d(3, 4, 1, 2), (5, 6)),
    "tubes of a video": (lambda: nn.Conv3d(3, 4, (2, 3, 3), (2, 3, 3)), (4, 6, 6)),
    "frames of a signal": (lambda: nn.Conv1d(3, 4, 5, 5), (20,)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_of_patches_is_listed_and_dense(case: str) -> None:
    build, sizes = CASES[case]
    regions = regions_of(build(), picture(*sizes))
    assert (site_of(regions).skipped, site_of(regions).region) == (PATCHES, "vision")
    assert [site.fqn for site in regions.pruned_sites] == [f"layers.{i}.{j}.weight" for i in (0, 1) for j in (0, 2)]


@pytest.mark.parametrize("observe", ["graph", "module"])
@pytest.mark.parametrize("case", CASES)
def test_its_norms_are_those_of_the_patches(case: str, observe: str) -> None:
    build, sizes = CASES[case]
    torch.manual_seed(0)
    convolution = build()
    captured = mfcompile.capture(Net(convolution), picture(*sizes))
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"}, targets=["convolution"])
    site = site_of(regions)
    assert site.skipped is None
    assert (site.out_features, site.in_features) == (4, convolution.weight[0].numel())  # type: ignore[index]
    found = mfcompile.calibrate(captured, regions=regions, observe=observe).sites[site.name]
    padding = convolution.padding if isinstance(convolution.padding, tuple) else (0,) * len(sizes)
    rows = patches(picture(*sizes), convolution.kernel_size, convolution.stride, padding)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.sum_of_squares.numpy(), (rows**2).sum(0), rtol=RTOL)
    assert (found.token_count, found.sample_count) == (len(rows), 2)


@pytest.mark.parametrize("observe", ["graph", "module"])
def test_it_is_pruned_as_the_linear_layer_that_it_is(observe: str) -> None:
    """A linear layer over unfolded patches has the same weights and gets the same mask."""

    class Unfolded(nn.Module):
        def __init__(self, convolution: nn.Conv2d) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 4)
            self.linear.weight = nn.Parameter(convolution.weight.detach().flatten(1))

        def forward(self, image: Tensor) -> Tensor:
            cut = nn.functional.unfold(image, 4, stride=4).mT
            result: Tensor = self.linear(cut).mT
            return result

    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 4, 4)
    masks = {}
    for module, fqn in ((convolution, "convolution.weight"), (Unfolded(convolution), "convolution.linear.weight")):
        torch.manual_seed(1)
        captured = mfcompile.capture(Net(module), picture(8, 8))
        regions = mfcompile.infer_regions(captured, modalities={"image": "vision"}, targets=["convolution", "layers"])
        statistics = mfcompile.calibrate(captured, regions=regions, observe=observe)
        masks[fqn] = mfcompile.select_masks(captured, regions, statistics, sparsity=0.6)[fqn]
    assert masks["convolution.weight"].shape == (4, 3, 4, 4)
    assert torch.equal(masks["convolution.weight"].flatten(1), masks["convolution.linear.weight"])


def test_a_pruned_convolution_runs_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Net(nn.Conv2d(3, 4, 4, 4))
    compiled = mfcompile.compile_pruned(model, picture(8, 8), modalities={"image": "vision"}, targets=["Conv2d", "layers"])
    mask = compiled.masks["convolution.weight"]
    zeroed = nn.functional.conv2d(picture(8, 8), model.convolution.weight * mask, model.convolution.bias, 4)  # type: ignore
    assert torch.equal(compiled.module.convolution(picture(8, 8)), zeroed)  # type: ignore[operator]
    artifact = compiled.export_onnx(tmp_path / "model.onnx")
    assert "convolution.weight" in {item.fqn for item in artifact.encodings}
    assert compiled.verify(artifact).passed


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "overlapping": (lambda: nn.Conv2d(3, 4, 3, padding=1), "overlapping convolution (kernel 3x3, stride 1x1)"),
    "grouped": (lambda: nn.Conv2d(3, 3, 1, groups=3), "grouped convolution (3 groups)"),
    "dilated": (lambda: nn.Conv2d(3, 4, 2, 2, dilation=2), "dilated convolution (dilation 2x2)"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, 2), "transposed convolution"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_listed_with_their_reason(case: str) -> None:
    build, reason = REFUSED[case]
    model = nn.Sequential(build(), nn.Flatten(2))
    captured = mfcompile.capture(model, picture(8, 8))
    regions = mfcompile.infer_regions(captured, modalities={"input": "vision"})
    (site,) = regions.sites
    assert (site.name, site.region, site.skipped) == ("0.weight", "vision", f"not a linear weight: {reason}")


@pytest.mark.parametrize("target", ["0.weight", "0", "re:0"])
@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_by_name(case: str, target: str) -> None:
    build, reason = REFUSED[case]
    captured = mfcompile.capture(nn.Sequential(build(), nn.Flatten(2)), picture(8, 8))
    with pytest.raises(InputError) as caught:
        mfcompile.infer_regions(captured, modalities={"input": "vision"}, targets=[target])
    assert str(caught.value) == (
        f"targets: the pattern {target!r} names only weights that cannot be pruned: 0.weight is left dense, because: "
        f"not a linear weight: {reason}. Leave the pattern out"
    )


def test_a_wider_pattern_leaves_them_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 2, 2), nn.Flatten(2))
    captured = mfcompile.capture(model, picture(8, 8))
    regions = mfcompile.infer_regions(captured, modalities={"input": "vision"}, targets=["Conv2d"])
    assert [site.name for site in regions.pruned_sites] == ["1.weight"]


def test_a_region_does_not_name_a_convolution() -> None:
    regions = regions_of(nn.Conv2d(3, 4, 4, 4), picture(8, 8), targets=["region:vision"])
    assert site_of(regions).skipped == PATCHES
    assert len(regions.pruned_sites) == 4


def test_a_convolution_whose_weight_is_computed_is_refused() -> None:
    convolution = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 4, 4))
    captured = mfcompile.capture(Net(convolution), picture(8, 8))
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    reasons = {site.fqn: site.skipped or "" for site in regions.sites if "convolution" in site.fqn}
    assert "its values are changed by _weight_norm" in reasons["convolution.parametrizations.weight.original1"]
