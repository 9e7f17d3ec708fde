"""Tables from made-up cells whose mean and deviation are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.over_seeds import Figure
from benchmarks.tavlp import page
from benchmarks.tavlp.cells import Cell
from benchmarks.tavlp.choosing import choice
from benchmarks.tavlp.durations import durations
from benchmarks.tavlp.orderings import Difference, Ordering, difference, orderings
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.records import write_record
from benchmarks.tavlp.reduced import beside
from benchmarks.tavlp.summary import Results, standard_error, with_best
from tests.unit.benchmarks.tavlp_runs import TINY, folders, made_up, other_recipe


def metrics(value: float) -> dict[str, float]:
    return {"tr1": value, "tr5": value + 1, "ir1": value + 2, "ir5": value + 3}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    for seed, value in enumerate((70.0, 75.0, 80.0)):
        made_up(Cell("xvlm", "retrieval", "multiflow", 0.63, seed), metrics(value), tmp_path)
    made_up(Cell("xvlm", "retrieval", "omp", 0.63, 1), metrics(74.25), tmp_path)
    made_up(Cell("xvlm", "retrieval", "dense", 0.0, 0), metrics(90.0), tmp_path)
    return Results(folders(tmp_path), TINY)


def row_of(text: str, label: str) -> list[str]:
    found = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    assert len(found) == 1
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_tables_show_mean_and_deviation_over_seeds(results: Results) -> None:
    text = page.comparison(results, ("retrieval",))
    assert row_of(text, "63 % MULTIFLOW")[1:5] == [f"**{mean}.0 ± 5.0 (3)**" for mean in (75, 76, 77, 78)]
    assert row_of(text, "63 % OMP")[1] == "≈ 74.2 (1)"
    assert row_of(text, "DENSE")[1] == "90.0 (1)"
    assert row_of(text, "90 % OMP")[1:5] == ["."] * 4


def test_a_stale_cell_is_a_missing_one(results: Results, tmp_path: Path) -> None:
    stale = Results(results.folders, other_recipe(TINY, "retrieval", steps=2))
    assert stale.figure("xvlm", "retrieval", "multiflow", 0.63, "tr1") is None
    made_up(Cell("xvlm", "retrieval", "multiflow", 0.63, 0), metrics(10.0), tmp_path, stale.scale)
    assert stale.figure("xvlm", "retrieval", "multiflow", 0.63, "tr1") == Figure(10.0, None, 1)
    assert results.figure("xvlm", "retrieval", "multiflow", 0.63, "tr1") == Figure.of([75.0, 80.0])


def test_figures_use_the_sample_deviation() -> None:
    figure = Figure.of([1.0, 2.0, 3.0])
    assert figure == Figure(2.0, 1.0, 3)
    assert str(figure) == "2.0 ± 1.0 (3)"
    assert Figure.of([]) is None


def test_the_best_of_a_column_is_bold_where_it_has_a_rival() -> None:
    low, high = Figure(1.0, None, 1), Figure(2.0, None, 1)
    shown = with_best([[low, high, None], [None, low, None]], [None, None])
    assert shown == [["1.0 (1)", "."], ["**2.0 (1)**", "1.0 (1)"], [".", "."]]


def test_figures_within_noise_of_the_best_have_a_sign() -> None:
    best, near, far = Figure(9.0, 1.0, 2), Figure(6.1, None, 2), Figure(5.9, None, 2)  # 2 * 1.5 * sqrt(1/2 + 1/2) = 3
    assert [row[0][:2] for row in with_best([[best, near, far]], [1.5])] == ["**", "≈ ", "5."]


def test_the_scatter_of_seeds_is_pooled_over_rows(results: Results, tmp_path: Path) -> None:
    assert results.scatter("retrieval", ("tr1",)) == pytest.approx(5.0)
    made_up(Cell("blip", "retrieval", "omp", 0.9, 0), metrics(10.0), tmp_path)
    made_up(Cell("blip", "retrieval", "omp", 0.9, 2), metrics(12.0), tmp_path)  # a variance of 2 with one degree of freedom
    assert results.scatter("retrieval", ("tr1",)) == pytest.approx(((2 * 25 + 2) / 3) ** 0.5)
    for seed in (1, 2):
        made_up(Cell("xvlm", "retrieval", "dense", 0.0, seed), metrics(90.0), tmp_path)  # counted once, not per sparsity
    assert results.scatter("retrieval", ("tr1",)) == pytest.approx(((2 * 25 + 2) / 5) ** 0.5)
    assert results.scatter("vqa", ("accuracy",)) is None


def test_orderings_compare_rows_over_the_seeds_that_both_have(results: Results, tmp_path: Path) -> None:
    def against(*below: str) -> Difference | None:
        return difference(results, "xvlm", "retrieval", Ordering("", "multiflow", below), 0.63)

    error = standard_error(1, 1, 5.0)
    assert against("omp") == Difference("omp", 0.75, error, 1)
    assert against("lamp") is None
    made_up(Cell("xvlm", "retrieval", "lamp", 0.63, 0), metrics(72.0), tmp_path)
    assert against("omp", "lamp") == Difference("lamp", -2.0, error, 1)
    made_up(Cell("xvlm", "retrieval", "random", 0.63, 2), metrics(10.0), tmp_path)
    rows = [line for line in orderings(results).splitlines() if "xvlm, retrieval, 63 %" in line]
    assert [line.split("|")[-2].strip() for line in rows] == ["holds", "within noise"]
    assert Difference("", -20.0, 2.0, 3).verdict == "**does not hold**"


def test_the_table_to_choose_by_shows_rows_and_columns_that_have_cells(results: Results) -> None:
    lines = choice(results).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### 63 % removed"]
    assert lines[2] == "| pruner | asks for | xvlm R@1 | of dense, % |"
    assert lines[4:] == [
        "| DENSE |  | 91.0 (1) | 100 |",
        "| MULTIFLOW | calibration data | **76.0 ± 5.0 (3)** | 84 |",
        "| OMP | nothing | ≈ 75.2 (1) | 83 |",
    ]


def test_rows_without_all_cells_stand_below_those_with_all(results: Results, tmp_path: Path) -> None:
    made_up(Cell("blip", "vqa", "omp", 0.63, 0), {"accuracy": 20.0}, tmp_path)
    made_up(Cell("blip", "vqa", "dense", 0.0, 0), {"accuracy": 40.0}, tmp_path)
    text = choice(results)
    assert [line.split(" | ")[0][2:] for line in text.splitlines()[5:]] == ["OMP", "MULTIFLOW"]
    assert row_of(text, "OMP")[2:] == ["≈ 75.2 (1)", "20.0 (1)", "66"]
    assert row_of(text, "MULTIFLOW")[3:] == [".", "."]


def test_the_page_is_written_from_records_alone_but_for_masks_of_its_picture(results: Results, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    text = page.write_page(results.folders, TINY, docs).read_text()
    one_seed = 1 + 3 * (len(PRUNERS) - 1)
    assert row_of(text, "xvlm, retrieval")[1:4] == [f"{done} of {one_seed}" for done in (2, 2, 1)]
    assert f"5 of {2 * 3 * 3 * one_seed} cells are there." in text
    ablations = text.split("## Ablations")[1].split("## ")[0]
    assert row_of(ablations, "MULTIFLOW")[1] == "75.0 ± 5.0 (3)"  # not bold: it has no rival yet
    removed = row_of(text.split("(Fig. 4)")[1].split("## ")[0], "xvlm, MULTIFLOW")
    assert removed[1:5] == ["75.00"] * 4
    assert sorted(path.name for path in (docs / "images").iterdir()) == [
        "benchmark_allocations.png",
        "benchmark_highest_sparsity.png",
    ]


def test_the_page_says_how_far_cells_made_anew_differ(tmp_path: Path) -> None:
    assert "Not done" in page.repeated(tmp_path / "tavlp.json")
    cell = beside({"tr1": 3.0, "ir1": 5.0}, {"tr1": 4.0, "ir1": 3.0})
    (tmp_path / "tavlp.json").write_text(json.dumps({"machine": {"cores": 2}, "xvlm retrieval omp": cell}))
    assert row_of(page.repeated(tmp_path / "tavlp.json"), "xvlm retrieval omp")[1:] == ["3.5", "4.0", "2.0"]


def test_a_cell_made_anew_is_set_beside_the_one_that_is_kept() -> None:
    assert beside({"tr1": 3.0, "ir1": 5.0}, None) == {"tr1": 3.0, "ir1": 5.0}
    assert beside({"tr1": 3.0, "ir1": 5.0}, {"tr1": 4.0, "ir1": 3.0}) == {
        "tr1": 3.0,
        "ir1": 5.0,
        "kept_tr1": 4.0,
        "kept_ir1": 3.0,
        "largest_difference": 2.0,
    }


def test_a_difference_of_unknown_noise_has_no_verdict() -> None:
    assert Difference("", 20.0, None, 1).verdict == "noise not known"
    assert [Difference("", mean, 1.0, 2).verdict for mean in (1.9, 2.1, -2.1)] == [
        "within noise",
        "holds",
        "**does not hold**",
    ]


def test_lengths_of_fine_tuning_are_compared_over_the_seeds_that_both_have(results: Results, tmp_path: Path) -> None:
    longer = replace(other_recipe(TINY, "retrieval", steps=4), name="longer")
    assert durations(results, longer).startswith("Not done")
    for seed, value in ((0, 10.0), (1, 20.0)):
        made_up(Cell("blip", "retrieval", "omp", 0.9, seed), metrics(value), tmp_path)
    there = Cell("blip", "retrieval", "omp", 0.9, 1)
    write_record(there.path(tmp_path / "longer"), there.config(longer), {"metrics": metrics(50.0)})
    text = durations(results, longer)
    assert text.splitlines()[0] == "| retrieval, R@1 | blip, 1 steps | blip, 4 steps |"
    assert row_of(text, "OMP")[1:] == ["21.0 (1)", "51.0 (1)"]
