"""The picture of a benchmark: what it shows, and that its files are whole and repeatable."""

from pathlib import Path
from typing import Any

import pytest

from mfcompile.benchmark.plot import bars, colours, plot_benchmark
from mfcompile.benchmark.result import MeasuredVariant
from tests.benchmark_documents import benchmark


def test_bars_stand_where_their_figures_are() -> None:
    document = benchmark().as_dict()
    found, middles = bars(document, 1)
    assert [(bar.variant, bar.speedup) for bar in found] == [
        ("packed", 1.0),
        ("runtime", 0.5),
        ("packed", 1.0),
        ("runtime", 2.0),
    ]
    assert middles[0] < found[2].position < found[3].position
    assert [bar.position - middles[index // 2] for index, bar in enumerate(found)] == pytest.approx([-0.15, 0.15] * 2)
    assert found[3].low <= found[3].speedup <= found[3].high
    assert bars(document, 8)[0] == ()


def test_forms_can_be_told_apart() -> None:
    found = colours(benchmark().as_dict())
    assert len(set(found.values())) == 4


@pytest.mark.parametrize(
    "given",
    [
        benchmark().as_dict(),
        benchmark(timings=benchmark().timings[:1], variants=(MeasuredVariant("dense", "dense file"),)).as_dict(),
    ],
)
def test_files_are_whole_and_repeatable(tmp_path: Path, given: dict[str, Any]) -> None:
    png, svg = plot_benchmark(given, tmp_path)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert svg.read_text().rstrip().endswith("</svg>")
    again = plot_benchmark(given, tmp_path, stem="again")
    assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]
