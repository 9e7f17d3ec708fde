"""``mfcompile prune --method comp``: what is written can be verified and repeated, and what cannot be asked for is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import mfcompile
from mfcompile.cli import main
from mfcompile.comp.structure import STRUCTURE_KEY

MODEL = (Path(__file__).parent / "cli_model.py").read_text()

QUICK = ("--method-option", "step=0.15", "mode_step=0.6", "scorer=wanda")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with model.py."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Status, output and messages of ``mfcompile`` with these words."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as ended:
        status = int(ended.code or 0)
    found = capsys.readouterr()
    return status, " ".join(found.out.split()), " ".join(found.err.split())


@pytest.mark.slow
def test_what_is_left_is_written_verified_and_repeated(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    status, out, err = run(
        capsys, "prune", "model.py", "--method", "comp", "--flops", 0.7, *QUICK, "--strategy", "fixed", "-o", "less"
    )
    assert status == 0, err
    assert "CoMP-style, one-shot: not the paper's training recipe" in out
    assert "asked for: 70.00 %" in out
    assert "what is faster there is faster by having fewer units" in out
    report = json.loads((folder / "less" / "report.json").read_text())
    structure = report["structure"]
    assert structure["flops"]["share"] == pytest.approx(0.7, rel=0.01)
    assert structure["parameters"]["share"] < 1
    assert [stage["mode"] for stage in structure["stages"]] == [row["mode"] for row in structure["modes"]][
        : len(structure["stages"])
    ]
    assert report["totals"]["prunable"]["sparsity"] == 0
    assert report["parity"]["passed"]
    assert (folder / "less" / "stages.png").is_file()
    recipe = yaml.safe_load((folder / "less" / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["flops"]) == ("comp", 0.7)
    assert recipe["method_options"] == {"step": 0.15, "mode_step": 0.6, "scorer": "wanda", "strategy": "fixed"}
    assert recipe["digest"] == report["digest"] != structure["digest"]
    status, out, err = run(capsys, "verify", "less/model.onnx", "model.py", "--masks", "less/masks.safetensors")
    assert status == 0, err
    status, out, err = run(capsys, "prune", "less/recipe.yaml", "-o", "again", "--no-onnx", "--no-evaluate")
    assert status == 0, err
    assert "The recipe was reproduced" in out
    assert json.loads((folder / "again" / "report.json").read_text())["structure"]["stages"] == structure["stages"]
    status, out, err = run(capsys, "prune", "less/recipe.yaml", "--flops", 0.8, "-o", "more", "--no-onnx", "--no-evaluate")
    assert status == 0, err
    assert "with another flops" in err


@pytest.mark.slow
def test_masks_go_on_what_is_left(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ("prune", "model.py", "--method", "comp+multiflow", "--flops", 0.8, "--sparsity", 0.5, *QUICK, "-o", "both")
    status, _, err = run(capsys, *words)
    assert status == 0, err
    report = json.loads((folder / "both" / "report.json").read_text())
    assert report["structure"]["flops"]["share"] == pytest.approx(0.8, rel=0.01)
    assert report["totals"]["prunable"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["calibration"] is not None  # norms are observed again, of what is left
    status, _, err = run(capsys, "verify", "both/model.onnx", "model.py", "--masks", "both/masks.safetensors")
    assert status == 0, err


def test_refitted_weights_are_verified_with_the_masks_file(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    quick = ("--method-option", "step=0.15", "scorer=magnitude", "refit=true", "modes=parameters:vision", "--flops", 0.9)
    status, _, err = run(capsys, "prune", "model.py", "--method", "comp", *quick, "-o", "less")
    assert status == 0, err
    report = json.loads((folder / "less" / "report.json").read_text())
    assert report["structure"]["options"]["refit"] is True
    weights = report["structure"]["refit"]["weights"]
    assert weights
    assert all(row["error"] < 1 for row in weights.values())
    status, out, err = run(capsys, "verify", "less/model.onnx", "model.py", "--masks", "less/masks.safetensors")
    assert status == 0, err
    status, _, err = run(capsys, "verify", "less/model.onnx", "model.py")
    assert status == 2
    assert "was refitted after units were removed" in err
    status, out, err = run(capsys, "prune", "less/recipe.yaml", "-o", "again", "--no-onnx", "--no-evaluate")
    assert status == 0, err
    assert "The recipe was reproduced" in out


def test_the_library_does_the_same(folder: Path) -> None:
    from mfcompile.frontends.sources import load_source

    source = load_source(folder / "model.py")
    compiled = mfcompile.compile_pruned(
        source.model, source.example_inputs, method="comp", flops=0.7, method_options={"step": 0.15, "scorer": "magnitude"}
    )
    assert compiled.joint is not None
    assert compiled.joint.flops[1] / compiled.joint.flops[0] == pytest.approx(0.7, rel=0.01)
    artifact = compiled.export_onnx(folder / "less.onnx")
    assert compiled.verify(artifact).passed
    dense = mfcompile.capture(source.model, source.example_inputs)
    assert sum(item.numel() for item in compiled.module.parameters()) < sum(item.numel() for item in dense.module.parameters())
    exported = compiled.captured.exported
    assert exported is not None
    assert STRUCTURE_KEY in exported.metadata
    both = mfcompile.compile_pruned(
        source.model, source.example_inputs, method="comp+magnitude", flops=0.7, sparsity=0.5,
        method_options={"step": 0.15, "scorer": "magnitude"},
    )  # fmt: skip
    assert both.joint is not None
    assert both.joint.structure == compiled.joint.structure
    assert both.report["totals"]["prunable"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_a_dry_run_says_what_can_go(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "prune", "model.py", "--method", "comp", "--dry-run")
    assert status == 0, err
    assert "Joint pruning may choose of" in out
    assert "parameters:vision" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "best"), "method='best' is not known; choose masks, comp, or comp+multiflow"),
        (("--method", "comp+"), "method='comp+' is not known"),
        (("--method", "comp+best"), "best"),
        (("--flops", "0.5"), "flops is for method 'comp'"),
        (("--method", "comp", "--flops", "50"), "'50' is not in (0, 1]"),
        (("--method", "comp", "--sparsity", "0.5"), "method 'comp' removes units and tokens and masks no weights: sparsity"),
        (("--method", "comp", "--pattern", "2:4"), "masks no weights: pattern says nothing to it"),
        (("--method", "comp+multiflow", "--criterion", "wanda"), "masks by multiflow, and the criterion is 'wanda'"),
        (("--method", "comp", "--tokens", "0.5"), "chooses how many tokens stay: leave out --tokens"),
        (("--method", "comp", "--split", "regions"), "writes one file: leave out --split"),
        (("--method", "comp", "--method-option", "stepp=0.1"), "joint pruning has no option 'stepp'"),
        (("--method", "comp", "--method-option", "loss=mine"), "loss='mine' is not known; choose one of cos, kl, evaluate"),
        (("--method", "comp", "--strategy", "luck"), "invalid choice: 'luck'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, words: tuple[str, ...], message: str
) -> None:
    status, _, err = run(capsys, "prune", "model.py", *words, "-o", "out")
    assert status == 2
    assert message in err
    assert not (folder / "out").exists()


def test_options_are_read_as_they_are_written() -> None:
    options = mfcompile.CompOptions.of({"modes": "a,b", "at": "0.25,0.75", "caps": "a=0.5,b=1", "outputs": ["x"]})
    assert options.modes == ("a", "b")
    assert options.at == (0.25, 0.75)
    assert options.caps == {"a": 0.5, "b": 1.0}
    assert options.outputs == ("x",)
    with pytest.raises(mfcompile.InputError, match="give MODE=SHARE"):
        mfcompile.CompOptions.of({"caps": "a=b"})
