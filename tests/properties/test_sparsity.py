"""Any sparsity is reached to the weight in every region, and a higher one only removes more."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

import mfcompile
from tests.models import vlm_captured, vlm_regions, vlm_statistics

SPARSITY = st.floats(0, 1, exclude_max=True)


def select(sparsity: float, rounding: str) -> mfcompile.MaskSet:
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics(), sparsity=sparsity, rounding=rounding)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(SPARSITY)
def test_every_region_loses_exactly_its_share(sparsity: float) -> None:
    masks = select(sparsity, "exact")
    for sites in vlm_regions().by_region().values():
        total = sum(site.weight_count for site in sites)
        assert sum(masks.packed[site.fqn].kept_count for site in sites) == total - int(sparsity * total)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(SPARSITY)
def test_official_rounding_keeps_at_most_one_weight_more_per_layer(sparsity: float) -> None:
    """Without ties between magnitudes, as here."""
    exact, official = select(sparsity, "exact"), select(sparsity, "official")
    for name, mask in exact.packed.items():
        assert official.packed[name].kept_count - mask.kept_count in (0, 1)
        assert not (exact[name] & ~official[name]).any()


@settings(deadline=None, max_examples=20, derandomize=True)
@given(SPARSITY, SPARSITY, st.sampled_from(["exact", "official"]))
def test_masks_are_nested(one: float, other: float, rounding: str) -> None:
    low, high = (select(sparsity, rounding) for sparsity in sorted((one, other)))
    for name in low:
        assert not (high[name] & ~low[name]).any()
