"""``--split regions`` on the command line, on the hand-written model of test_cli.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from mfcompile.cli import main

MODEL = (Path(__file__).parent / "cli_model.py").read_text()
PARTS = ["vision.onnx", "text.onnx", "fusion.onnx"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Status, output and messages of ``mfcompile`` with these words."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.py and what ``prune --split regions`` made of it."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "model.py").write_text(MODEL)
    assert main(["prune", str(folder / "model.py"), "-o", str(folder / "out"), "--split", "regions", "--no-evaluate"]) == 0
    return folder


def test_prune_writes_parts_and_reports_them(folder: Path) -> None:
    out = folder / "out"
    assert {path.name for path in out.glob("*.onnx")} == set(PARTS)
    report = json.loads((out / "report.json").read_text())
    assert [part["file"] for part in report["export"]["parts"]] == PARTS
    assert all(part["size_bytes"] == (out / part["file"]).stat().st_size for part in report["export"]["parts"])
    assert set(report["latency"]["parts_ms"]) == {"vision", "text", "fusion"}
    assert report["parity"]["passed"]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["split"] == "regions"


def test_verify_takes_the_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    status, said, _ = run(capsys, "verify", out, folder / "model.py", "--masks", out / "masks.safetensors")
    assert status == 0
    assert "agrees with" in said
    status, _, complaint = run(capsys, "verify", out, folder / "model.py")
    assert status == 1
    assert f"pass its masks: --masks {out / 'masks.safetensors'}" in complaint


def test_verify_refuses_a_changed_part(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    with (tmp_path / "out" / "text.onnx").open("ab") as file:
        file.write(b"\0")
    status, _, complaint = run(
        capsys, "verify", tmp_path / "out", folder / "model.py", "--masks", folder / "out" / "masks.safetensors"
    )
    assert status == 2
    assert "text.onnx is not the file that model.split.json describes" in complaint


def test_export_writes_parts_from_masks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("export", folder / "model.py", "--masks", folder / "out" / "masks.safetensors", "--split", "regions", "-o")
    (tmp_path / "parts").mkdir()
    status, said, complaint = run(capsys, *words, tmp_path / "parts")
    assert status == 0, complaint
    assert "Parts, in running order" in said
    for name in PARTS:
        assert (tmp_path / "parts" / name).read_bytes() == (folder / "out" / name).read_bytes(), (
            "the same masks, the same files"
        )
    status, _, complaint = run(capsys, *words, tmp_path / "parts")
    assert (status, "exists already" in complaint) == (2, True)
    status, _, complaint = run(capsys, *words, tmp_path / "parts.onnx")
    assert (status, "names one" in complaint) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"parts"}, "nothing half-written is left"


def test_an_onnx_source_is_not_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("image", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["y"])], "g", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    status, _, complaint = run(capsys, "prune", tmp_path / "m.onnx", "-o", tmp_path / "out", "--split", "regions")
    assert status == 2
    assert "leave out --split" in complaint
