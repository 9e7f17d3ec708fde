"""Medians, quartiles and verdicts from times that are known."""

import json
from pathlib import Path

import pytest

from mfcompile.benchmark.result import InputSize, Timing, quartiles, summarize
from tests.benchmark_documents import SECONDS, benchmark


def test_the_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians() -> None:
    # Rounds 2 and 3 are slow for both: each ratio is 2, while the medians are 0.4 and 0.1.
    seconds = {"dense": (0.2, 0.8, 0.4), "sparse": (0.1, 0.4, 0.2), "odd": (0.1, 0.1, 0.8)}
    dense, sparse, odd = summarize(seconds, "dense", size=1, threads=2, errors={"sparse": 0.5})
    assert (dense.seconds, sparse.seconds, odd.seconds) == (0.4, 0.2, 0.1)
    assert (sparse.speedup, sparse.speedup_low, sparse.speedup_high) == (2.0, 2.0, 2.0)
    assert odd.speedup == 2.0
    assert [odd.speedup_low, odd.speedup_high] == pytest.approx([1.25, 5.0])
    assert dense.speedup == 1.0
    assert (sparse.size, sparse.threads, sparse.rounds, sparse.max_error) == (1, 2, 3, 0.5)
    assert odd.max_error is None


def test_quartiles_lie_between_the_values() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_without_the_baseline_there_are_times_and_no_ratios() -> None:
    (only,) = summarize({"packed": (0.1, 0.2, 0.3)}, "dense", size=0, threads=1)
    assert only.seconds == 0.2
    assert only.speedup is only.speedup_low is only.speedup_high is None
    assert only.verdict == "same"


@pytest.mark.parametrize(
    ("low", "middle", "high", "verdict"),
    [(1.04, 1.5, 1.6, "faster"), (1.02, 1.5, 2.0, "same"), (0.5, 0.9, 0.96, "slower"), (0.5, 0.9, 0.98, "same")],
)
def test_a_verdict_needs_three_quarters_of_the_rounds(low: float, middle: float, high: float, verdict: str) -> None:
    assert Timing("x", 0, 1, 1.0, 1.0, 1.0, middle, low, high, 9).verdict == verdict


def test_json_holds_every_figure_in_its_unit() -> None:
    found = benchmark()
    document = found.as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    row = next(item for item in document["timings"] if item["variant"] == "runtime" and item["size"] == 1)
    assert row["ms"] == 50.0
    assert row["speedup"] == 2.0
    assert row["verdict"] == "faster"
    assert [item["reason"] for item in document["variants"]] == [None, None, None, "there is no int8 file"]
    assert document["variants"][2]["creation_ms"] == 40.0
    assert "creation_ms" not in document["variants"][3]
    assert document["sizes"][0] == {"label": "batch 1, 1 token", "batch": 1, "tokens": 1, "shapes": {"ids": [1, 1]}}
    assert len(document["timings"]) == sum(len(own) for own in SECONDS.values())


def test_a_timing_is_found_or_refused() -> None:
    found = benchmark()
    assert found.timing("runtime", 1).speedup == 2.0
    with pytest.raises(KeyError):
        found.timing("runtime", 1, threads=8)


def test_saving_writes_json_and_picture_or_nothing(tmp_path: Path) -> None:
    directory = benchmark().save(tmp_path / "out")
    assert sorted(file.name for file in directory.iterdir()) == ["bench.json", "bench.png", "bench.svg"]
    assert json.loads((directory / "bench.json").read_text()) == benchmark().as_dict()
    with pytest.raises(ValueError, match="is not empty"):
        benchmark().save(tmp_path / "out")


def test_a_size_says_what_it_is() -> None:
    assert InputSize(4, 197, {}).label == "batch 4, 197 tokens"
    assert InputSize(None, 1, {}).label == "1 token"
    assert InputSize(None, None, {}).label == "fixed size"
