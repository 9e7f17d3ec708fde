"""docs/walkthrough.md holds: its blocks run, one after the other, and print what the page says, but for the figures."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import mfcompile

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")

pytest.importorskip("transformers")
pytest.importorskip("PIL")


def run_page() -> Any:
    """docs/run_page.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("run_page", ROOT / "docs" / "run_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(text: str) -> str:
    """What is printed, without figures and their padding."""
    return re.sub(r" *[\d.,]*\d", " 0", text)


@pytest.mark.slow
def test_the_blocks_run_and_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = run_page()
    given, said = zip(*page.blocks(PAGE), strict=True)
    assert len(given) == PAGE.count("```python") == 7
    quick = {"steps": 2, "batch_size": 6, "scenes": 40, "rounds": 1}
    codes = [code.replace("list(example.calibration_batches())", "[example.example_inputs]") for code in given]
    outputs, names = page.run_blocks(codes, settings=quick)
    assert [words(output) for output in outputs] == [words(output) for output in said]
    masks = names["compiled"].masks
    pruned = masks.weight_count - masks.kept_count
    assert f"zeros: {pruned:,}" in outputs[2]
    assert f"zeros: {pruned:,}" in outputs[3]
    stored = load_file("out/walkthrough/model.safetensors")
    assert all(not stored[fqn][~mask].any() for fqn, mask in masks.items())
    assert names["moved"] > masks.kept_count // 2
    assert names["held"] == names["small"].masks.weight_count - names["small"].masks.kept_count
    assert outputs[5].count("R@1") == 2
    assert mfcompile.verify_masks(names["module"]).nonzero_count == 0


def test_figures_of_the_page_agree_with_each_other() -> None:
    """Training brings most of the score back, and what is reloaded and exported scores as what was trained."""
    found = re.findall(r"^([a-z0-9 ]+): +R@1 ([\d.]+) % of texts, ([\d.]+) % of images$", PAGE, flags=re.MULTILINE)
    scores = {name.strip(): (float(texts) + float(images)) / 2 for name, texts, images in found}
    dense, pruned, trained, *same = scores.values()
    assert list(scores)[0::3] == ["dense", "reloaded"]
    assert pruned < trained - 20 < dense
    assert len(same) == 3
    assert all(abs(score - trained) <= 0.2 for score in same)


def test_a_setting_is_given_once() -> None:
    page = run_page()
    outputs, names = page.run_blocks(["a = 1\nprint(a)\n", "b = a + 1\n"], settings={"a": 5})
    assert outputs == ["5\n", ""]
    assert names["b"] == 6
    with pytest.raises(ValueError, match="a is given a value in 2 lines of the page"):
        page.run_blocks(["a = 1\n", "a = 2\n"], settings={"a": 5})
    text = "```python\nprint(1)\n```\n\n```text\nold\n```\n\n```python\npass\n```\n"
    assert page.with_outputs(text, ["new\n", ""]) == text.replace("old", "new")
    assert page.blocks(page.with_outputs(text, ["", "1\n"])) == [("print(1)\n", ""), ("pass\n", "1\n")]
