"""What sets pruners apart, against counts by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tavlp import differences as module
from benchmarks.tavlp.families import family
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.pruning import masks_of
from tests.unit.benchmarks.tavlp_runs import TINY, folders


def test_shares_are_those_of_the_masks_and_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = family("xvlm")
    found = module.differences_of(owner, TINY, folders(tmp_path))
    masks = {name: masks_of(owner, PRUNERS[name], 0.9, 0, TINY, folders(tmp_path)) for name in ("multiflow", "omp")}
    both = sum(int((masks["multiflow"][fqn] & masks["omp"][fqn]).sum()) for fqn in masks["omp"])
    assert math.isclose(found["shared"]["omp"], both / masks["omp"].kept_count, abs_tol=1e-6)
    assert math.isclose(found["by_chance"], 0.1, abs_tol=1e-6)
    emptiest = min(float(masks["omp"][fqn].float().mean()) for fqn in masks["omp"])
    assert math.isclose(found["least_kept"]["omp"], emptiest, rel_tol=1e-5)
    assert found["least_kept"]["without-distribution"] < found["least_kept"]["multiflow"] < found["least_kept"]["wanda"]
    inputs = [mask.any(dim=0) for mask in masks["multiflow"].values()]
    unread = sum(int((~item).sum()) for item in inputs) / sum(item.numel() for item in inputs)
    assert math.isclose(found["unread"]["multiflow"], unread)
    assert found["unread"]["omp"] < found["unread"]["multiflow"]
    assert found["by_chance"] < found["shared"]["omp"] < found["shared"]["without-multimodality"] < 1

    def refuse(*_: Any) -> None:
        raise AssertionError("it is there")

    monkeypatch.setattr(module, "masks_of", refuse)
    assert module.differences_of(owner, TINY, folders(tmp_path)) == found
    text = module.differences(TINY, folders(tmp_path))
    assert f"| OMP | {100 * found['shared']['omp']:.1f} |" in text
    assert "blip" not in text
    assert "Not looked into" in module.differences(TINY, folders(tmp_path / "other"))
