"""docs/tokens.md holds: its snippets run, one after the other, and its figures are those of the benchmark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mfcompile
from benchmarks.token_families.page import table
from mfcompile.passes.token_scores import SCORERS
from tests.models import tiny_vlm, vlm_batch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_snippets_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "mfcompile": mfcompile,
        "model": tiny_vlm(),
        "example_inputs": vlm_batch(),
        "batches": [vlm_batch(seed=1)],
    }
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/tokens.md", "exec"), names)
    assert len(SNIPPETS) == 5
    printed = capsys.readouterr().out
    assert "vision.0.attention: 4 vision tokens" in printed
    assert "tokens of vision.0.attention: 2 of 4 stay\n" in printed
    assert (tmp_path / "both.onnx").exists()


def test_the_figures_are_those_of_the_benchmark() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "token_pruning.json").read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        assert f"| {row['label']} | {row['flops_ratio']:.3f} | {row['time_ratio']:.3f} |" in PAGE


def test_every_scorer_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == list(SCORERS)


def test_the_table_of_architectures_is_that_of_its_benchmark() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "token_families.json").read_text())["rows"]
    assert len(rows) >= 12
    assert table(rows) in PAGE
