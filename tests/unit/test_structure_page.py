"""docs/structure.md holds: its snippets run, one after the other, and its figures are those of the benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mfcompile
from benchmarks.structure_survey import page_table
from benchmarks.structured_refit import page_table as refit_table
from tests.models import tiny_vlm, vlm_batch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_snippets_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_vlm()
    names: dict[str, Any] = {
        "mfcompile": mfcompile,
        "model": model,
        "example_inputs": vlm_batch(),
        "batches": [vlm_batch(seed=1)],
    }
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/structure.md", "exec"), names)
    assert len(SNIPPETS) == 5
    printed = capsys.readouterr().out
    assert "vision.0.attention: 2 heads (vision), read by vision.0.attention.out.weight\n" in printed
    assert "channels of vision.0: 10 of 16 stay\n" in printed
    counts = [sum(parameter.numel() for parameter in item.parameters()) for item in (names["smaller"].module, model)]
    assert counts[0] < 0.8 * counts[1]
    assert (tmp_path / "both.onnx").exists()


def test_the_figures_are_those_of_the_benchmark() -> None:
    rows = result("structured_removal")["rows"]
    assert len(rows) == 5
    for row in rows:
        figures = " | ".join(f"{row[key]:.3f}" for key in ("flops_ratio", "size_ratio", "time_ratio"))
        assert f"| {row['label']} | {figures} |" in PAGE


def test_the_table_of_the_refit_is_that_of_its_benchmark() -> None:
    assert refit_table(result("structured_refit")) in PAGE


def test_the_table_of_architectures_is_that_of_its_benchmark() -> None:
    rows = result("structure_survey")
    assert len(rows) >= 25
    assert page_table(rows) in PAGE
    for row in rows:
        assert row["failed"] is None or "ExportError" in row["failed"], row["key"]
        assert row.get("difference", 0) < 1e-4 < row.get("changed", 1), row["key"]
