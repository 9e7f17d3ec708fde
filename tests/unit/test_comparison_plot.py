"""The picture of a comparison: what it shows, and that its files are whole and repeatable."""

import math
from pathlib import Path
from typing import Any

import pytest

from mfcompile.comparison_plot import lines, plot_comparison


def document(labels: list[str], sparsities: list[float], metric: str | None = "r1") -> dict[str, Any]:
    size = len(labels)
    rows = [
        {
            "pruner": label,
            "sparsity": sparsity,
            "achieved": sparsity,
            "output_error": None if label == "broken" else sparsity * (index + 1) / size,
            "metrics": {metric: 90 - 10 * sparsity - index} if metric else {},
        }
        for sparsity in reversed(sparsities)
        for index, label in enumerate(labels)
    ]
    kappa = [[1.0 if row == column else 0.1 * (row - column) for column in range(size)] for row in range(size)]
    return {
        "model": {"class": "Net", "parameters": 2000, "prunable": 1000},
        "data": {"compared_samples": 1, "compared_on": "example inputs"},
        "metric": metric and {"name": metric, "is_higher_better": True},
        "outputs": [{"kind": "float"}],
        "dense": {"metrics": {metric: 95.0} if metric else {}},
        "pruners": [{"label": label, "is_floor": label == "random"} for label in labels],
        "rows": rows,
        "agreement": [{"sparsity": value, "pruners": labels, "kappa": kappa} for value in sparsities],
        "middle": 0,
    }


def test_lines_rise_with_sparsity_and_can_be_told_apart() -> None:
    found = lines(document(["multiflow", "lamp", "broken", "random"], [0.5, 0.9]))
    assert [line.label for line in found] == ["multiflow", "lamp", "broken", "random"]
    assert [pytest.approx(point) for point in found[0].points] == [(50.0, 0.125, 85.0), (90.0, 0.225, 81.0)]
    assert all(math.isnan(point[1]) for point in found[2].points)
    assert len({line.colour for line in found}) == len({line.marker for line in found}) == 4
    assert [line.is_floor for line in found] == [False, False, False, True]
    many = lines(document([str(index) for index in range(40)], [0.5]))
    assert len({(line.colour, line.marker) for line in many}) == 40


@pytest.mark.parametrize(
    "given",
    [
        document(["multiflow", "broken", "random"], [0.5, 0.63, 0.75]),
        document(["multiflow", "random"], [0.5], metric=None),
        document(["a"], [0.5]),
        document([f"multiflow@score-global:{index}:4" for index in range(20)], [0.5, 0.505]),
    ],
)
def test_files_are_whole_and_repeatable(tmp_path: Path, given: dict[str, Any]) -> None:
    png, svg = plot_comparison(given, tmp_path)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert svg.read_text().rstrip().endswith("</svg>")
    again = plot_comparison(given, tmp_path, stem="again")
    assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]
