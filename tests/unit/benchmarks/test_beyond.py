"""The search beyond MULTIFLOW: what it measures, and the tables that are made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import beyond, beyond_tables
from benchmarks.tavlp.cells import Cell
from benchmarks.tavlp.configuration import SMALL
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.records import write_record
from benchmarks.tavlp.summary import Results
from mfcompile.passes.variants import read_variant


def test_words_are_pruners_and_rows_are_what_their_names_say() -> None:
    labels = [read_variant(word).label for word in beyond.COMBINATIONS]
    assert len(set(labels)) == len(labels)
    assert beyond.CHOSEN in beyond.COMBINATIONS
    for name in beyond.EVIDENCE:
        row, variant = PRUNERS[name], read_variant(name)
        assert (row.criterion, row.allocation, row.update) == (variant.criterion, variant.allocation, variant.update)


def test_a_combination_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "RESULTS", tmp_path)
    monkeypatch.setattr(beyond, "HELD_OUT_BATCHES", 1)
    monkeypatch.setattr(beyond, "SEARCH_PAIRS", 4)
    monkeypatch.setattr(beyond, "COMBINATIONS", ("magnitude", "random"))
    beyond.search()
    found = {word: json.loads(beyond.search_path(word).read_text()) for word in ("magnitude", "random")}
    assert 0 < found["magnitude"]["output_error"] < found["random"]["output_error"]
    assert found["random"]["config"]["pairs"] == 4

    def refuse(*_: object) -> None:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(beyond, "measured", refuse)
    beyond.search()


def test_tables_are_put_between_the_comments_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "RESULTS", tmp_path / "results")
    for word, error in (("wanda", 0.5), (beyond.CHOSEN, 0.125)):
        path = beyond.search_path(word)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"output_error": error, "seconds": 3.4}))
    path = beyond.tokens_path(beyond.PAIRS[0], beyond.DAMPINGS[1])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"output_error": 0.25}))
    page = tmp_path / "recipes.md"
    page.write_text(f"before\n\n{beyond_tables.FIRST}\nold\n{beyond_tables.LAST}\n\nafter\n")
    beyond_tables.write_tables(Folders(tmp_path / "none", tmp_path), SMALL, page)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    first = lines.index(f"| `{beyond.CHOSEN}` | 0.125 | 3 |")
    assert lines[first + 1] == "| `wanda` | 0.500 | 3 |"
    assert lines[first + 2].endswith("` | . | . |")
    assert f"| {beyond.PAIRS[0]} | . | 0.250 | . | . |" in lines
    assert not any("75 % MULTIFLOW" in line for line in lines)


def test_a_row_of_evidence_says_how_far_above_multiflow_it_is(tmp_path: Path) -> None:
    folders = Folders(tmp_path, tmp_path)
    for pruner, value in (("multiflow", 20.0), (beyond.CHOSEN, 50.0)):
        cell = Cell("blip", "retrieval", pruner, 0.75, 1)
        write_record(cell.path(tmp_path), cell.config(SMALL), {"metrics": {"tr1": value, "ir1": value + 2 * (value > 30)}})
    table = beyond_tables.evidence(Results(folders, SMALL))
    assert "| blip 75 % MULTIFLOW | . | . | 20.0 (1) | 20.0 (1) | . |" in table
    assert "| blip 75 % MULTIFLOW + least squares | . | . | 50.0 (1) | 52.0 (1) | +31.0 (1) |" in table
    assert "xvlm" not in table
