"""Statistics add up, and refuse what cannot rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mfcompile.errors import CalibrationError
from mfcompile.graph import Diagnostic
from mfcompile.statistics import CalibrationStatistics, SiteStatistics


def site(*sums: float, tokens: int = 4, padding: int = 1, samples: int = 2) -> SiteStatistics:
    return SiteStatistics(torch.tensor(sums, dtype=torch.float64), tokens, padding, samples)


def statistics(**sites: SiteStatistics) -> CalibrationStatistics:
    return CalibrationStatistics(sites, 3, "calibration batches", "graph", ("mask",), (Diagnostic("one", "why"),))


def test_a_norm_is_the_root_of_the_sum() -> None:
    assert site(4.0, 0.0, 2.25).input_norm().tolist() == [2.0, 0.0, 1.5]


def test_merging_adds_everything_up() -> None:
    one, other = statistics(a=site(1.0, 2.0), b=site(3.0)), statistics(b=site(5.0, tokens=7), a=site(0.5, 0.25, samples=1))
    merged = one.merge(other)
    assert list(merged.sites) == ["a", "b"]
    assert merged.sites["a"].sum_of_squares.tolist() == [1.5, 2.25]
    assert (merged.sites["b"].token_count, merged.sites["b"].padding_count, merged.sites["a"].sample_count) == (11, 2, 3)
    assert merged.batch_count == 6
    assert one.sites["a"].sum_of_squares.tolist() == [1.0, 2.0]


def test_statistics_of_other_sites_are_not_added() -> None:
    with pytest.raises(CalibrationError, match="statistics of different sites cannot be added; only one side has b"):
        statistics(a=site(1.0)).merge(statistics(a=site(1.0), b=site(1.0)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_names_site_and_feature(value: float) -> None:
    broken = statistics(a=site(1.0), b=site(0.0, value, 2.0, value))
    with pytest.raises(CalibrationError, match=r"the input of b holds NaN or infinity in feature 1 \(2 of 4 features\)"):
        broken.check()
    replace(broken, sites={"a": broken.sites["a"]}).check()


def test_merging_keeps_what_both_were_told() -> None:
    """Masks and diagnostics of both sides, each once; a mixed source says so."""
    other = replace(
        statistics(a=site(1.0)), padding_masks=("mask", "other"), diagnostics=(Diagnostic("two", "why"),), observed_by="module"
    )
    merged = statistics(a=site(1.0)).merge(other)
    assert merged.padding_masks == ("mask", "other")
    assert merged.diagnostics == (Diagnostic("one", "why"), Diagnostic("two", "why"))
    assert merged.observed_by == "graph+module"
    assert merged.source == "calibration batches"
    assert merged.merge(replace(other, source="example inputs")).source == "calibration batches and example inputs"
