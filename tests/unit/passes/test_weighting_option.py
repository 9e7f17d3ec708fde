"""Where weighted norms go: files, cache, report, masks; which weights keep plain ones; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes.cached_calibration import calibrate_cached
from mfcompile.statistics import CalibrationStatistics
from mfcompile.steps import calibrated
from tests.models import TwoLayers, rows, tiny_vlm, vlm_batch, vlm_captured, vlm_regions
from tests.onnx_models import two_towers, two_towers_inputs
from tests.token_models import Encoder, patches


def same(one: CalibrationStatistics, two: CalibrationStatistics) -> None:
    assert list(one.sites) == list(two.sites)
    assert one.weighting == two.weighting
    for name, site in one.sites.items():
        other = two.sites[name]
        assert (site.weighting, site.norm_count, site.token_count) == (other.weighting, other.norm_count, other.token_count)
        assert torch.equal(site.input_norm(), other.input_norm()), name


class Pooled(Encoder):
    """A mean over all tokens, then layers."""

    def __init__(self) -> None:
        super().__init__(cls=False, pool="all")
        self.tail = TwoLayers(16)

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.tail(super().forward(image).mean(1))
        return result


def test_layers_without_tokens_keep_plain_norms_and_it_is_said() -> None:
    torch.manual_seed(0)
    model, image = Pooled().eval(), patches(3)
    captured = mfcompile.capture(model, image)
    plain = mfcompile.calibrate(captured, [image])
    found = mfcompile.calibrate(captured, [image], weighting="cip")
    tails = {name for name in found.sites if name.startswith("tail")}
    assert len(tails) == 4
    assert {name for name, site in found.sites.items() if site.weighting == "uniform"} == tails
    said = [str(item) for item in found.diagnostics if "not weighted by tokens" in str(item)]
    assert said == [
        f"{', '.join(name for name in found.sites if name in tails)}: its norms are not weighted by tokens: no self-attention "
        f"has the tokens that it reads, before or behind"
    ]
    for name in tails:  # a mean of squares: it ranks alike, and is of the scale of the others
        norm = plain.sites[name].input_norm()
        torch.testing.assert_close(found.sites[name].input_norm() * 3**0.5, norm, rtol=1e-12, atol=0.0)


def test_files_keep_weighted_norms_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = patches(3)
    captured = mfcompile.capture(Pooled().eval(), image)
    found = mfcompile.calibrate(captured, [image], weighting="cip")
    same(CalibrationStatistics.load(found.save(tmp_path / "weighted.safetensors")), found)
    plain = mfcompile.calibrate(captured, [image])
    same(CalibrationStatistics.load(plain.save(tmp_path / "plain.safetensors")), plain)
    assert b'"format_version":"1"' in (tmp_path / "plain.safetensors").read_bytes()
    assert b'"format_version":"2"' in (tmp_path / "weighted.safetensors").read_bytes()


def test_statistics_of_one_weighting_add_up() -> None:
    batch = vlm_batch((6, 3, 5, 2))
    captured, regions = vlm_captured(), vlm_regions()
    whole, one, two = (
        mfcompile.calibrate(captured, [item], regions=regions, weighting="cip")
        for item in (batch, rows(batch, [0, 1]), rows(batch, [2, 3]))
    )
    merged = one.merge(two)
    for name, site in whole.sites.items():
        assert (merged.sites[name].norm_count, merged.sites[name].weighting) == (site.norm_count, site.weighting)
        torch.testing.assert_close(merged.sites[name].input_norm(), site.input_norm(), rtol=2e-5, atol=0.0)
    plain = mfcompile.calibrate(captured, [rows(batch, [2, 3])], regions=regions)
    with pytest.raises(CalibrationError, match=r"'cip' and 'none'.*Calibrate both with one weighting"):
        one.merge(plain)


def test_the_cache_tells_weightings_apart(tmp_path: Path) -> None:
    captured, regions = vlm_captured(), vlm_regions()
    batches = [vlm_batch((6, 4)), vlm_batch((3, 5, 2))]

    def of(weighting: str) -> Any:
        options = {"weighting": weighting, "recapture": mfcompile.capture}
        return calibrate_cached(captured, regions, batches, cache_dir=tmp_path, **options)  # type: ignore[arg-type]

    first, plain, again = of("cip"), of("none"), of("cip")
    assert [item.is_reused for item in (first, plain, again)] == [False, False, True]
    same(again.statistics, first.statistics)
    assert plain.statistics.weighting == "none"
    through_steps = calibrated(captured, batches, regions, tmp_path, {"weighting": "cip"})
    same(through_steps, first.statistics)


def test_masks_of_every_criterion_with_norms_follow_the_weighting() -> None:
    batch = vlm_batch((6, 4))
    for criterion in ("multiflow", "wanda"):
        masks = {
            weighting: mfcompile.compile_pruned(
                tiny_vlm(), batch, criterion=criterion, calibration=[batch], weighting=weighting, sparsity=0.5
            )
            for weighting in ("none", "cip")
        }
        assert masks["none"].masks != masks["cip"].masks
        assert [masks[key].report["calibration"]["weighting"] for key in ("none", "cip")] == ["none", "cip"]


def test_weighted_norms_of_a_copy_in_float64() -> None:
    batch = vlm_batch((6, 3))
    captured, regions = vlm_captured(), vlm_regions()
    options: dict[str, Any] = {"regions": regions, "weighting": "cip"}
    wide = mfcompile.calibrate(captured, [batch], precision="float64", **options)
    parts = [rows(batch, [0]), rows(batch, [1])]
    apart = mfcompile.calibrate(captured, parts, precision="float64", **options)
    for name, site in wide.sites.items():
        torch.testing.assert_close(apart.sites[name].input_norm(), site.input_norm(), rtol=1e-6, atol=0.0)
    narrow = mfcompile.calibrate(captured, [batch], **options)
    for name, site in wide.sites.items():
        torch.testing.assert_close(narrow.sites[name].input_norm(), site.input_norm(), rtol=1e-4, atol=0.0)


def test_what_cannot_be_is_refused() -> None:
    captured, batch = vlm_captured(), vlm_batch((6, 4))
    with pytest.raises(InputError, match="weighting='token' is unknown; choose none or cip"):
        mfcompile.calibrate(captured, [batch], weighting="token")
    with pytest.raises(InputError, match="observes graphs, not modules"):
        mfcompile.calibrate(captured, [batch], weighting="cip", observe="module")
    with pytest.raises(CalibrationError, match="batch 0 does not fit the graph"):
        mfcompile.calibrate(captured, [vlm_batch((3, 3, 3))], weighting="cip", observe="graph")
    statistics = mfcompile.calibrate(captured, [batch])
    with pytest.raises(InputError, match="the given statistics weigh tokens 'none'"):
        mfcompile.compile_pruned(tiny_vlm(), batch, statistics=statistics, weighting="cip")


def test_an_onnx_file_is_refused(tmp_path: Path) -> None:
    import onnx

    onnx.save(two_towers(), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="this one is an ONNX file"):
        mfcompile.compile_pruned(tmp_path / "model.onnx", two_towers_inputs(), weighting="cip")
