"""The command line with an .onnx file as the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mfcompile.masks import MaskSet
from tests.integration.test_cli import Outcome, run
from tests.onnx_models import GraphWriter, save, two_towers, two_towers_inputs

FILES = {
    "masks.safetensors",
    "statistics.safetensors",
    "model.onnx",
    "recipe.yaml",
    "report.json",
    "sparsity.png",
    "sparsity.svg",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    save(two_towers(), folder / "model.onnx")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in two_towers_inputs(batch=12).items()}
    np.savez(folder / "batches.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Outcome:
    return run(
        "prune", folder / "model.onnx", "--calibration", folder / "batches.npz", "-o", folder / "out", "--format", "dense"
    )


def test_prune_writes_what_makes_sense(folder: Path, pruned: Outcome) -> None:
    assert pruned.status == 0, pruned.err
    assert {path.name for path in (folder / "out").iterdir()} == FILES
    report = json.loads((folder / "out" / "report.json").read_text())
    masks = MaskSet.load(folder / "out" / "masks.safetensors")
    assert report["source"]["kind"] == "onnx"
    assert report["capture"]["frontend"] == "onnx"
    assert report["calibration"]["observed_by"] == "onnxruntime"
    assert report["calibration"]["batches"] == 2
    assert report["parity"]["passed"] is True
    assert report["parity"]["max_abs_diff"] == 0.0
    assert "the original file" in report["parity"]["reference"]
    assert "with PyTorch" not in pruned.out
    assert report["latency"]["ratio"] > 0
    assert {row["region"] for row in report["regions"]} == {"vision", "fusion"}
    assert all(row["kept"] == row["weights"] - int(0.63 * row["weights"]) for row in report["regions"])
    before, after = onnx.load(folder / "model.onnx"), onnx.load(folder / "out" / "model.onnx")
    changed = {old.name for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True) if old != new}
    assert changed == set(masks)
    assert "RANDOM" not in pruned.err


def test_its_recipe_is_reproduced(folder: Path, pruned: Outcome) -> None:
    again = run("prune", folder / "out" / "recipe.yaml", "-o", folder / "again", "--format", "packed")
    assert again.status == 0, again.err
    assert "The recipe was reproduced" in again.out
    masks = [MaskSet.load(folder / name / "masks.safetensors").digest() for name in ("out", "again")]
    assert masks[0] == masks[1]


def test_verify_and_export(folder: Path, pruned: Outcome) -> None:
    masks = folder / "out" / "masks.safetensors"
    verified = run("verify", folder / "out" / "model.onnx", folder / "model.onnx", "--masks", masks)
    assert verified.status == 0, verified.err
    dense = run("verify", folder / "model.onnx", folder / "model.onnx", "--masks", masks)
    assert dense.status == 1
    exported = run("export", folder / "model.onnx", "--masks", masks, "-o", folder / "half.onnx", "--values", "fp16")
    assert exported.status == 0, exported.err


def test_inspect_names_initializers(folder: Path) -> None:
    outcome = run("inspect", folder / "model.onnx", "--json", "-")
    assert outcome.status == 0, outcome.err
    view = json.loads(outcome.out)
    assert "names of initializers" in view["capture"]["attempts"][0]["detail"]
    by_name = {row["name"]: row for row in view["weights"]}
    assert by_name["text.layers.0.cross.k.weight"]["region"] == "fusion"
    assert by_name["text.layers.0.cross.k.weight"]["label"] == ["vision"]


def test_without_calibration_data_it_says_so_loudly(folder: Path) -> None:
    outcome = run("prune", folder / "model.onnx", "-o", folder / "noise")
    assert outcome.status == 0, outcome.err
    assert "RANDOM inputs" in outcome.err
    report = json.loads((folder / "noise" / "report.json").read_text())
    assert report["calibration"]["source"] == "random inputs"
    assert report["diagnostics"][0]["subject"] == "example inputs"


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    outcome = run("prune", folder / "model.onnx", "--dry-run", "--calibration", folder / "batches.npz")
    assert outcome.status == 0, outcome.err
    assert "batches.npz" in outcome.out
    assert sorted(folder.iterdir()) == before


def test_mistakes_exit_with_two(folder: Path, tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("pixel_values", onnx.TensorProto.FLOAT, "batch", 3, 8, 8)
    writer.op("Relu", "pixel_values", out="y")
    empty = save(writer.model("y", rank=4), tmp_path / "empty.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((folder / "model.onnx").read_bytes()[:500])
    for words, message in (
        ((folder / "none.onnx",), "does not exist"),
        ((damaged,), "cannot be read as an ONNX file"),
        ((empty,), "no weight"),
        ((folder / "model.onnx", "--calibration", folder / "none.npz"), "is no calibration data"),
        ((folder / "model.onnx", "--ignore", "txt.*"), "matches no"),
    ):
        outcome = run("prune", *words, "-o", tmp_path / "out")
        assert outcome.status == 2, words
        assert message in outcome.err, words
        assert not (tmp_path / "out").exists()
