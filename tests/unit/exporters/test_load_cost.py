"""What loading a file takes, as predicted, and what is refused for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mfcompile.errors import ExportError, InputError
from mfcompile.exporters import load_cost
from mfcompile.exporters.load_cost import LoadCost, machine_memory, predict_load, refuse_unloadable
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.exporters.packing import estimate_encodings, possible_encodings
from mfcompile.graph import CapturedGraph
from tests.unit.exporters.toy_models import capture, random_masks, seeded


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(torch.relu(self.first(tokens)))
        return hidden


@pytest.fixture(scope="module")
def pruned() -> CapturedGraph:
    module = seeded(Two)
    masks = random_masks(module, {"first.weight": 0.5, "second.weight": 0.37})
    return capture(module, {"tokens": torch.randn(64, 128)}, masks=masks)


def test_the_formulas_are_those_of_the_docstrings() -> None:
    mask = np.random.default_rng(0).random((100, 80)) < 0.37
    plans = {plan.encoding: plan for plan in possible_encodings(mask, np.float32, "fp32")}
    kept, places = int(mask.sum()), mask.size
    assert plans["mask"].stored_bytes == 4 * (kept + 1) + places // 8
    assert plans["mask"].folded_bytes == 14 * places + 12 * places
    half = {plan.encoding: plan for plan in possible_encodings(mask, np.float32, "fp16")}
    assert half["mask"].folded_bytes == plans["mask"].folded_bytes + 4 * (kept + 1)
    cost = predict_load(1000, 500, [plans["mask"]], 4 * places + 400)
    assert cost.peak_bytes == 2500 + plans["mask"].folded_bytes
    packed = plans["mask"].stored_bytes + plans["mask"].folded_bytes + 8 * places
    assert cost.time_ratio == pytest.approx((1.6 * 400 + packed) / (1.6 * (4 * places + 400)))
    assert predict_load(0, 4000, [plans["dense"]], 4000) == LoadCost(4000, 1.0)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.37, 0.9])
def test_estimates_are_near_what_random_masks_take(density: float) -> None:
    mask = np.random.default_rng(1).random((400, 500)) < density
    found = {plan.encoding: plan.stored_bytes for plan in possible_encodings(mask, np.float32, "fp32")}
    estimated = estimate_encodings(mask.size, int(mask.sum()), np.float32, "fp32")
    assert {plan.encoding for plan in estimated} == {"dense", "gap8", "gap4", "mask"}
    for plan in estimated:
        if plan.encoding in found:
            assert plan.stored_bytes == pytest.approx(found[plan.encoding], rel=0.02), plan.encoding


def test_a_lower_budget_stores_more_and_takes_less_memory(pruned: CapturedGraph, tmp_path: Path) -> None:
    artifacts = [export_onnx(pruned, tmp_path / f"{budget}.onnx", load_budget=budget) for budget in (None, 6.5, 4.8, 1.0)]
    encodings = [{item.fqn: item.encoding for item in artifact.encodings} for artifact in artifacts]
    assert encodings[0] == {"first.weight": "mask", "second.weight": "gap4"}
    assert "mask" not in encodings[2].values()
    assert set(encodings[3].values()) == {"dense"}
    sizes, peaks = ([getattr(item, name) for item in artifacts] for name in ("pruned_ratio", "load_peak_bytes"))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] < sizes[3]
    assert peaks == sorted(peaks, reverse=True)
    times = [item.load_time_ratio for item in artifacts]
    assert times == sorted(times, reverse=True)
    assert times[3] == pytest.approx(1, rel=0.05)
    for wrong in (0.5, 0, float("nan"), True):
        with pytest.raises(InputError, match="give at least 1"):
            export_onnx(pruned, tmp_path / "wrong.onnx", load_budget=wrong)


def test_what_the_machine_cannot_load_is_refused_before_it_is_written(
    pruned: CapturedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_cost, "machine_memory", lambda: 900_000)
    with pytest.raises(ExportError, match=r"0\.0 GB of memory.*this machine has 0\.0 GB.*--load-budget.*load_session"):
        export_onnx(pruned, tmp_path / "packed.onnx")
    assert not list(tmp_path.iterdir())
    export_onnx(pruned, tmp_path / "dense.onnx", format="dense")
    export_onnx(dataclasses.replace(pruned, masks=None), tmp_path / "unpruned.onnx")


def test_memory_is_that_of_the_machine_or_its_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_cost, "_CGROUP_LIMIT", tmp_path / "memory.max")
    whole = machine_memory()
    assert whole is not None
    assert whole > 10**8
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory() == whole
    (tmp_path / "memory.max").write_text("123456789\n")
    assert machine_memory() == 123456789
    refuse_unloadable("small.onnx", LoadCost(10**12, 1.0), 10**12)  # as large as the dense model: nothing to blame packing for
