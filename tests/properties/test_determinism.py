"""The same masks whatever the batch sizes, their order, the padding, the threads and the way of observing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mfcompile
from mfcompile.passes import padding_flow
from mfcompile.passes.calibration import calibrate
from tests.models import Batch, rows, tiny_vlm, vlm_batch

LENGTHS = (6, 3, 5, 2, 6, 1)
COUNT = len(LENGTHS)


@cache
def captured(shape: tuple[int, int]) -> tuple[mfcompile.CapturedGraph, mfcompile.RegionMap]:
    """The tiny model captured on a batch of so many samples and tokens, so that such batches run on its graph."""
    found = mfcompile.capture(tiny_vlm(), vlm_batch(LENGTHS[: shape[0]], total=shape[1]))
    return found, mfcompile.infer_regions(found)


def digests(
    batches: list[Batch], observe: str = "module", threads: int = 1, shape: tuple[int, int] = (2, 6), precision: str = "model"
) -> list[str]:
    """Digests of the masks at two sparsities."""
    graph, regions = captured(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        statistics = calibrate(graph, regions, batches, observe=observe, precision=precision)
    finally:
        torch.set_num_threads(before)
    return [mfcompile.select_masks(graph, regions, statistics, sparsity=sparsity).digest() for sparsity in (0.63, 0.9)]


@cache
def expected(precision: str = "model") -> list[str]:
    return digests([vlm_batch(LENGTHS)], precision=precision)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, list[Batch]]:
    """All samples in any order, in batches of one size, padded to one length, at either end."""
    size = draw(st.sampled_from([1, 2, 6]))
    total, side = draw(st.sampled_from([6, 8])), draw(st.sampled_from(["left", "right"]))
    order = draw(st.permutations(range(COUNT)))
    whole = vlm_batch(LENGTHS, total=total, side=side)
    return size, total, [rows(whole, order[start : start + size]) for start in range(0, COUNT, size)]


@settings(deadline=None, max_examples=8, derandomize=True)
@given(cuts(), st.sampled_from([1, 2]), st.sampled_from(["graph", "module"]))
def test_size_order_padding_threads_and_the_way_of_observing_change_no_mask(
    cut: tuple[int, int, list[Batch]], threads: int, observe: str
) -> None:
    size, total, batches = cut
    assert digests(batches, observe, threads, (size, total)) == expected()


@settings(deadline=None, max_examples=4, derandomize=True)
@given(cuts(), st.sampled_from([1, 2]))
def test_in_float64_as_well(cut: tuple[int, int, list[Batch]], threads: int) -> None:
    assert digests(cut[2], "module", threads, (cut[0], cut[1]), "float64") == expected("float64")


@settings(deadline=None, max_examples=5, derandomize=True)
@given(cuts())
def test_both_ways_of_observing_give_the_same_statistics_to_the_bit(cut: tuple[int, int, list[Batch]]) -> None:
    graph, regions = captured(cut[:2])
    one, other = (calibrate(graph, regions, cut[2], observe=observe) for observe in ("graph", "module"))
    for name, site in one.sites.items():
        assert torch.equal(site.sum_of_squares, other.sites[name].sum_of_squares), name
        assert vars(site).keys() == vars(other.sites[name]).keys()
        assert list(vars(site).values())[1:] == list(vars(other.sites[name]).values())[1:]


@settings(deadline=None, max_examples=5, derandomize=True)
@given(cuts(), st.sampled_from(["graph", "module"]))
def test_marks_that_are_carried_are_those_that_are_computed(cut: tuple[int, int, list[Batch]], observe: str) -> None:
    """The quick rule of padding gives what the slow ones give."""
    graph, regions = captured(cut[:2])
    quick = calibrate(graph, regions, cut[2], observe=observe)
    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding_flow, "carried", lambda *args: used.append(args))
        slow = calibrate(graph, regions, cut[2], observe=observe)
    assert used
    for name, site in quick.sites.items():
        assert torch.equal(site.sum_of_squares, slow.sites[name].sum_of_squares), name
        assert (site.token_count, site.padding_count) == (slow.sites[name].token_count, slow.sites[name].padding_count)


def test_what_should_matter_does() -> None:
    """The digests are no constants."""
    assert digests([vlm_batch(LENGTHS, seed=1)]) != expected()
    unmasked = vlm_batch(LENGTHS)
    unmasked["attention_mask"] = torch.ones_like(unmasked["attention_mask"])
    assert digests([unmasked]) != expected()
