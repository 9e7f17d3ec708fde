"""What a user says about regions and sites, and batches that look unlike the example."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from mfcompile.region import RegionMap
from tests.zoo.handwritten import CASES, ids, mask, picture
from tests.zoo.parts import Attention, CrossBlock, FeedForward, Patches, SelfBlock, Words


def inferred(name: str, **options: Any) -> RegionMap:
    captured = mfcompile.capture(CASES[name].make(), CASES[name].inputs(6))
    return mfcompile.infer_regions(captured, **options)


def pruned(found: RegionMap) -> set[str]:
    return {site.fqn for site in found.pruned_sites}


def test_overrides_by_glob_and_by_the_most_specific_pattern() -> None:
    regions = {"t.*": "text", "v.*": "text", "v.1.ff.1.weight": "fusion", "re:f\\.0\\.self": "text"}
    found = inferred("in place", regions=regions)
    assert found.weights["v.1.ff.1.weight"] == "fusion"
    assert found.weights["v.1.ff.3.weight"] == found.weights["v.0.attention.q.weight"] == "text"
    assert found.weights["f.0.self_attention.q.weight"] == "text"
    assert found.weights["f.0.cross_attention.q.weight"] == "fusion"
    assert found.overrides["v.1.ff.1.weight"] == "v.1.ff.1.weight"


def test_an_override_reaches_a_tied_weight_under_either_name() -> None:
    found = inferred("tied decoder", regions={"decoder.*.cross.*": "text"})
    assert found.weights["encoder.0.cross.q.weight"] == "text"
    assert found.weights["encoder.0.own.q.weight"] == "fusion"


def test_an_override_covers_all_rows_of_a_fused_weight() -> None:
    found = inferred("lists of lists", regions={"multi.0.1.to_kv.weight": "vision"})
    assert {site.region for site in found.sites if site.fqn == "multi.0.1.to_kv.weight"} == {"vision"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["f"], "f.*"),
        (["f.1.*"], "f.1.*"),
        (["re:.*\\.ff\\.1"], "*.ff.1.weight"),
        (["CrossBlock"], "f.*"),
        (["region:vision"], "v.*"),
        (["text_head.weight"], "text_head.weight"),
    ],
)
def test_targets(targets: list[str], expected: str) -> None:
    found = inferred("in place", targets=targets)
    assert pruned(found) == set(fnmatch.filter(found.weights, expected))


def test_ignore_wins_over_targets_and_says_so() -> None:
    found = inferred("in place", targets=["v", "t"], ignore=["region:text", "v.0.attention.o.weight"])
    assert pruned(found) == set(fnmatch.filter(found.weights, "v.*")) - {"v.0.attention.o.weight"}
    reasons = {site.fqn: site.skipped for site in found.skipped_sites}
    assert reasons["t.0.ff.1.weight"] == "ignored by the pattern 'region:text'"
    assert reasons["f.0.ff.1.weight"] == "no pattern of targets matches it"


def test_targets_cannot_prune_an_embedding_table() -> None:
    found = inferred("tied decoder", targets=["lm_head", "encoder"])
    assert "words.table.weight" not in pruned(found)


def test_a_region_given_by_override_is_a_region_for_targets() -> None:
    found = inferred("in place", regions={"v.0": "text"}, targets=["region:text"])
    assert pruned(found) == set(fnmatch.filter(found.weights, "v.0.*")) | set(fnmatch.filter(found.weights, "t.*")) | {
        "text_head.weight"
    }


@pytest.mark.parametrize("option", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_names_the_nearest(option: str) -> None:
    with pytest.raises(InputError, match="text_head"):
        inferred("in place", **{option: ["text_haed"]})


class Regions(nn.Module):
    """Images, or regions of images: some batches come with the image of every text and a mask of its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = Patches(), Words()
        self.vision = nn.ModuleList(SelfBlock() for _ in range(2))
        self.text = nn.ModuleList(SelfBlock() for _ in range(2))
        self.fusion = nn.ModuleList(CrossBlock() for _ in range(2))
        self.unused = nn.ModuleList(nn.ModuleList([Attention(), FeedForward()]) for _ in range(2))

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_atts: Tensor,
        idx_to_group_img: Tensor | None = None,
        image_atts: Tensor | None = None,
    ) -> Tensor:
        seen = self.patches(image)
        for layer in self.vision:
            seen = layer(seen)
        if idx_to_group_img is not None and image_atts is not None:
            seen = seen[idx_to_group_img] * image_atts[:, :, None]
        text: Tensor = self.words(text_ids, text_atts)
        for layer in self.text:
            text = layer(text, text_atts)
        for layer in self.fusion:
            text = layer(text, seen, text_atts)
        return text


def batches() -> list[dict[str, Tensor]]:
    general = {"image": picture(), "text_ids": ids(), "text_atts": mask()}
    atts = (torch.rand(5, 4, generator=torch.Generator().manual_seed(4)) > 0.5).long()
    region = {
        "image": picture()[:2],
        "idx_to_group_img": torch.tensor([0, 0, 1, 1, 1]),
        "image_atts": atts,
        "text_ids": torch.cat([ids(7), ids(7)[:2]]),
        "text_atts": torch.cat([mask(7), mask(7)[:2]]),
    }
    return [general, region]


def test_batches_of_another_structure_than_the_example() -> None:
    torch.manual_seed(0)
    model = Regions().eval()
    general, region = batches()
    captured = mfcompile.capture(model, general)
    found = mfcompile.infer_regions(captured, ignore=["unused"])
    both = mfcompile.calibrate(captured, [general, region], regions=found)
    assert both.observed_by == "graph+module"
    apart = mfcompile.calibrate(captured, [general], regions=found).merge(
        mfcompile.calibrate(captured, [region], regions=found, observe="module")
    )
    tokens = int(mask().sum()), int(region["text_atts"].sum())
    for name, site in both.sites.items():
        torch.testing.assert_close(site.sum_of_squares, apart.sites[name].sum_of_squares)
        if name.startswith("vision"):
            assert site.token_count == 3 * 4 + 2 * 4
        elif "cross_attention.k" in name or "cross_attention.v" in name:
            assert site.token_count == 3 * 4 + 5 * 4
        else:
            assert site.token_count == sum(tokens), name


def test_a_calibration_that_misses_a_region_is_refused() -> None:
    model = Regions().eval()
    general, _ = batches()
    captured = mfcompile.capture(model, general)
    found = mfcompile.infer_regions(captured, regions={"unused": "audio"}, targets=["vision", "text", "fusion"])
    assert {site.skipped for site in found.sites if site.fqn.startswith("unused")} == {"no call of the captured run uses it"}

    class TextOnly(Regions):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("image_atts") is None:
                return super().forward(*args, **kwargs)
            return self.text[0](self.words(kwargs["text_ids"]))  # type: ignore[no-any-return]

    other = TextOnly().eval()
    captured = mfcompile.capture(other, general)
    with pytest.raises(CalibrationError, match="region 'vision' received no calibration token"):
        mfcompile.calibrate(captured, [batches()[1]])


def test_literal_reading_of_image_fed_keys_and_values() -> None:
    found = inferred("in place", cross_attention_kv="input")
    assert found.weights["f.0.cross_attention.k.weight"] == "vision"
    assert found.weights["f.0.cross_attention.q.weight"] == "text"
    assert found.weights["f.1.cross_attention.q.weight"] == "fusion"
