"""How the calibration set is cut, ordered and padded changes no mask bit."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mfcompile
from tests.models import IMAGE_TOKENS, VOCABULARY, Batch, vlm_batch, vlm_captured, vlm_regions

LENGTHS = (6, 3, 5, 2, 6, 1, 4, 4)


def masks(batches: list[Batch]) -> mfcompile.MaskSet:
    statistics = mfcompile.calibrate(vlm_captured(), batches, regions=vlm_regions())
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), statistics)


@cache
def expected() -> str:
    return masks([vlm_batch(LENGTHS)]).digest()


def batch(samples: list[int], total: int, side: str, filler: int) -> Batch:
    """Some of the eight samples, padded to ``total`` with any token, at either end."""
    whole = vlm_batch(LENGTHS, total=total, side=side)
    chosen = {name: tensor[torch.tensor(samples)] for name, tensor in whole.items()}
    chosen["input_ids"] = torch.where(chosen["attention_mask"] == 1, chosen["input_ids"], filler)
    return chosen


@st.composite
def partitions(draw: st.DrawFn) -> list[Batch]:
    """All samples in any order, cut into batches of any size, each padded in its own way."""
    order = draw(st.permutations(range(len(LENGTHS))))
    cuts = sorted(draw(st.sets(st.integers(1, len(LENGTHS) - 1), max_size=4)))
    parts = [list(order[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(LENGTHS)], strict=True)]
    return [
        batch(
            part,
            draw(st.integers(max(LENGTHS), 9)),
            draw(st.sampled_from(["left", "right"])),
            draw(st.integers(0, VOCABULARY - 1)),
        )
        for part in parts
    ]


@settings(deadline=None, max_examples=12, derandomize=True)
@given(partitions())
def test_batches_order_and_padding(batches: list[Batch]) -> None:
    assert masks(batches).digest() == expected()


def test_samples_matter() -> None:
    """The digest is no constant."""
    assert masks([vlm_batch(LENGTHS, seed=1)]).digest() != expected()
    assert masks([vlm_batch(LENGTHS[:-1])]).digest() != expected()


@settings(deadline=None, max_examples=6, derandomize=True)
@given(st.integers(1, 2), st.sampled_from(["left", "right"]), st.sampled_from([6, IMAGE_TOKENS + 3, 9]))
def test_threads(threads: int, side: str, total: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert masks([vlm_batch(LENGTHS, total=total, side=side)]).digest() == expected()
    finally:
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(st.lists(st.integers(0, 7), min_size=2, max_size=6))
def test_statistics_add_up_in_any_grouping(samples: list[int]) -> None:
    """merge() of single samples is one calibration on all of them; a sample that is given twice counts twice."""

    def statistics(batches: list[Batch]) -> mfcompile.CalibrationStatistics:
        return mfcompile.calibrate(vlm_captured(), batches, regions=vlm_regions())

    merged, *others = [statistics([batch([sample], 6, "right", 0)]) for sample in samples]
    for other in others:
        merged = merged.merge(other)
    together = statistics([batch(samples, 6, "right", 0)])
    for name, site in together.sites.items():
        # Another batch size is another kernel: float32 rounding of the activations.
        torch.testing.assert_close(merged.sites[name].sum_of_squares, site.sum_of_squares, rtol=1e-5, atol=0.0)
        assert merged.sites[name].token_count == site.token_count
        assert merged.sites[name].sample_count == site.sample_count
