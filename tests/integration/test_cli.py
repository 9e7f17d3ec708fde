"""The command line end to end, on a hand-written model with two towers and their fusion."""

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from safetensors.numpy import load_file

from mfcompile.cli import main
from mfcompile.masks import MaskSet, PackedMask

MODEL = (Path(__file__).parent / "cli_model.py").read_text()

FILES = {
    "masks.safetensors",
    "statistics.safetensors",
    "model.onnx",
    "model.safetensors",
    "recipe.yaml",
    "report.json",
    "sparsity.png",
    "sparsity.svg",
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


def run(*words: object) -> Outcome:
    """Call ``mfcompile`` with these words, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Workplace:
    """A folder with model.py, and what pruning it once gave."""

    folder: Path
    model: Path
    output: Path
    outcome: Outcome


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """One whole run of ``mfcompile prune``."""
    folder = tmp_path_factory.mktemp("cli")
    model = folder / "model.py"
    model.write_text(MODEL)
    return Workplace(folder, model, folder / "out", run("prune", model, "-o", folder / "out"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds model.py and nothing else."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_left(folder: Path) -> Iterator[None]:
    """Whatever happens in the test, model.py is all that there is afterwards."""
    yield
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["model.py"]


def test_prune_writes_all_of_it(done: Workplace) -> None:
    assert (done.outcome.status, done.outcome.err.count("error")) == (0, 0), done.outcome.err
    assert {path.name for path in done.output.iterdir()} == FILES
    report = json.loads((done.output / "report.json").read_text())
    masks = MaskSet.load(done.output / "masks.safetensors")
    recipe = yaml.safe_load((done.output / "recipe.yaml").read_text())
    assert report["digest"] == recipe["digest"] == masks.digest()
    assert report["model"]["fingerprint"] == recipe["fingerprint"] == masks.fingerprint
    assert [row["region"] for row in report["regions"]] == ["vision", "text", "fusion"]
    assert all(row["kept"] == row["weights"] - int(0.63 * row["weights"]) for row in report["regions"])
    assert report["parity"]["passed"] is True
    assert report["calibration"]["batches"] == 4
    assert set(report["files"]) == FILES - {"report.json"}


def test_saved_weights_are_zero_exactly_where_masks_prune(done: Workplace) -> None:
    weights = load_file(done.output / "model.safetensors")
    masks = MaskSet.load(done.output / "masks.safetensors")
    for fqn, mask in masks.items():
        assert np.array_equal(weights[fqn] != 0, mask.numpy()), fqn


def test_the_file_runs_in_stock_onnxruntime(done: Workplace) -> None:
    session = onnxruntime.InferenceSession(done.output / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {
        "pixel_values": np.zeros((3, 3, 4, 4), np.float32),
        "input_ids": np.ones((3, 5), np.int64),
        "attention_mask": np.ones((3, 5), np.int64),
    }
    assert session.run(None, feeds)[0].shape == (3, 2)


def test_prune_says_what_it_did(done: Workplace) -> None:
    out = done.outcome.out
    for text in (
        "Sparsity by region",
        "outside any repeated block",
        "pruned / dense = ",
        "pruning gives no speed there",
        "Parity of onnxruntime",
        "pruned, onnxruntime",
        f"Written to {done.output}",
        f"mfcompile verify {done.output / 'model.onnx'}",
    ):
        assert text in out
    assert "calibrating" in done.outcome.err
    assert "calibrating" not in out


def test_evaluation_agrees_between_pytorch_and_onnxruntime(done: Workplace) -> None:
    metrics = json.loads((done.output / "report.json").read_text())["evaluation"]["metrics"]
    assert list(metrics) == ["dense", "pruned", "pruned, onnxruntime"]
    assert metrics["pruned, onnxruntime"]["mean"] == pytest.approx(metrics["pruned"]["mean"], abs=1e-5)
    assert metrics["dense"]["mean"] != pytest.approx(metrics["pruned"]["mean"], abs=1e-5)


def test_a_recipe_reproduces_its_masks(done: Workplace, tmp_path: Path) -> None:
    result = run("prune", done.output / "recipe.yaml", "-o", tmp_path / "again", "--no-onnx", "--no-evaluate")
    assert result.status == 0, result.err
    assert "The recipe was reproduced" in result.out
    again = MaskSet.load(tmp_path / "again" / "masks.safetensors")
    assert again.digest() == MaskSet.load(done.output / "masks.safetensors").digest()
    assert not (tmp_path / "again" / "model.onnx").exists()


def test_a_recipe_that_is_not_reproduced_fails_and_writes_nothing(done: Workplace, tmp_path: Path) -> None:
    recipe = yaml.safe_load((done.output / "recipe.yaml").read_text())
    recipe.update(digest="0" * 64, source=str(done.model))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run("prune", tmp_path / "recipe.yaml", "-o", tmp_path / "again")
    assert result.status == 1
    assert "the recipe was not reproduced: it records masks 0000000000000000…" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_options_override_a_recipe_and_its_digest_is_not_compared(done: Workplace, tmp_path: Path) -> None:
    result = run("prune", done.output / "recipe.yaml", "--sparsity", "0.5", "-o", tmp_path / "half", "--no-onnx")
    assert result.status == 0, result.err
    assert "with another sparsity: its recorded digest is not compared" in result.err
    recorded = yaml.safe_load((tmp_path / "half" / "recipe.yaml").read_text())
    assert recorded["sparsity"] == 0.5
    assert recorded["digest"] != yaml.safe_load((done.output / "recipe.yaml").read_text())["digest"]


def test_verify_agrees_with_the_masks_and_disagrees_without(done: Workplace) -> None:
    masks = done.output / "masks.safetensors"
    good = run("verify", done.output / "model.onnx", done.model, "--masks", masks)
    assert (good.status, "agrees with" in good.out) == (0, True), good.err
    bad = run("verify", done.output / "model.onnx", done.model)
    assert bad.status == 1
    assert "logits outside of the tolerance" in bad.err
    assert f"pass its masks: --masks {masks}" in bad.err
    assert "OUTSIDE" in bad.out


def test_verify_refuses_the_masks_of_another_run(done: Workplace, tmp_path: Path) -> None:
    masks = MaskSet.load(done.output / "masks.safetensors")
    name = next(iter(masks))
    other = replace(masks, packed={**masks.packed, name: PackedMask.pack(~masks[name])})
    other.save(tmp_path / "other.safetensors")
    result = run("verify", done.output / "model.onnx", done.model, "--masks", tmp_path / "other.safetensors")
    assert result.status == 2
    assert f"was pruned with masks {masks.digest()[:16]}…" in result.err
    assert f"holds masks {other.digest()[:16]}…" in result.err


def test_verify_refuses_what_is_no_onnx_file(done: Workplace) -> None:
    result = run("verify", done.model, done.model)
    assert (result.status, "cannot be read as an ONNX file" in result.err) == (2, True)
    assert "there is no ONNX file" in run("verify", done.folder / "none.onnx", done.model).err


def test_export_applies_saved_masks(done: Workplace, tmp_path: Path) -> None:
    target = tmp_path / "half.onnx"
    words = ("export", done.model, "--masks", done.output / "masks.safetensors", "-o", target, "--values", "fp16")
    result = run(*words)
    assert result.status == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["half.onnx"]
    assert "(packed, fp16)" in result.out
    assert "rtol 0.02" in result.out
    assert f"wrote {target}" in result.out
    assert run(*words).err.startswith(f"error: the output {target} exists already")
    checked = run("verify", target, done.model, "--masks", done.output / "masks.safetensors")
    assert (checked.status, "rtol 0.02" in checked.out) == (0, True), "the file says that its values are fp16"


def test_masks_of_other_weights_are_refused(done: Workplace, folder: Path) -> None:
    (folder / "model.py").write_text(MODEL.replace("manual_seed(0)", "manual_seed(1)"))
    result = run("export", "model.py", "--masks", done.output / "masks.safetensors", "-o", "m.onnx")
    assert result.status == 2
    assert MaskSet.load(done.output / "masks.safetensors").fingerprint[:16] in result.err
    assert "this model's is" in result.err
    assert not (folder / "m.onnx").exists()


def test_corrupt_masks_are_refused(done: Workplace, folder: Path) -> None:
    whole = (done.output / "masks.safetensors").read_bytes()
    (folder / "masks.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = run("verify", done.output / "model.onnx", "model.py", "--masks", "masks.safetensors")
    assert (result.status, "damaged" in result.err) == (2, True)


def test_where_no_file_agrees_the_rest_is_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfcompile.onnx_ladder._disagreement", lambda *given: "it gives other numbers")
    result = run("prune", "model.py", "--no-evaluate")
    assert result.status == 1
    assert "ONNX of recorded graph" in result.err
    assert "it gives other numbers" in result.err
    assert {path.name for path in (folder / "model-pruned").iterdir()} == FILES - {"model.onnx"}


@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_disagrees_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfcompile.exporters.parity.default_tolerance", lambda values: (0.0, -1.0))
    monkeypatch.setattr("mfcompile.onnx_ladder._disagreement", lambda *given: "")  # accepted, and then found wrong
    result = run("prune", "model.py", "--no-evaluate")
    assert result.status == 1
    assert "disagree in 1 of 1 outputs" in result.err
    assert "Traceback" not in result.err


@pytest.mark.usefixtures("nothing_left")
def test_an_interrupted_run_leaves_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    staged: list[str] = []

    def interrupt(report: object, directory: Path) -> None:
        staged.extend(path.name for path in directory.iterdir())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("mfcompile.report_plot.plot_sparsity", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of a parallel test run ignore it
    try:
        result = run("prune", "model.py", "--no-onnx", "--no-evaluate")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == 2
    assert "interrupted" in result.err
    assert {"masks.safetensors", "model.safetensors"} <= set(staged), "the interrupt must come when files are there"


def test_a_failed_run_keeps_what_it_was_to_replace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model-pruned").mkdir()
    (folder / "model-pruned" / "old").touch()
    with monkeypatch.context() as broken:
        broken.setattr("mfcompile.report_plot.plot_sparsity", lambda report, directory: 1 / 0)
        assert run("prune", "model.py", "--no-onnx", "--no-evaluate", "--overwrite").status == 1
    assert [path.name for path in (folder / "model-pruned").iterdir()] == ["old"]
    assert run("prune", "model.py", "--no-onnx", "--no-evaluate", "--overwrite").status == 0
    assert {path.name for path in (folder / "model-pruned").iterdir()} == FILES - {"model.onnx"}


@pytest.mark.usefixtures("nothing_left")
def test_dry_run_shows_the_plan_and_writes_nothing() -> None:
    result = run("prune", "model.py", "--dry-run", "--ignore", "region:fusion")
    assert result.status == 0, result.err
    assert "Plan by region" in result.out
    assert "vision" in result.out
    assert "ignored by the pattern 'region:fusion'" in result.out
    assert "calibration_batches" in result.out
    assert "nothing was written" in result.out


def test_inspect_gives_the_evidence(folder: Path) -> None:
    result = run("inspect", "model.py", "--json", "view.json")
    assert result.status == 0, result.err
    assert "wrote view.json" in result.out
    view = json.loads((folder / "view.json").read_text())
    weights = {row["name"]: row for row in view["weights"]}
    assert weights["left.0.a.weight"]["region"] == "vision"
    assert weights["both.1.k.weight"]["region"] == "fusion"
    assert weights["both.1.k.weight"]["label"] == ["vision"]
    assert weights["both.1.k.weight"]["block_label"] == ["text", "vision"]
    assert weights["head.weight"]["reason"] == "outside any repeated block (a head or a projector)"
    assert view["capture"]["attempts"][0]["succeeded"] is True


def test_inspect_counts_regions_and_draws_them(folder: Path) -> None:
    result = run("inspect", "model.py", "--json", "view.json", "--picture", "regions.svg", "--all")
    assert result.status == 0, result.err
    view = json.loads((folder / "view.json").read_text())
    counts = {row["region"]: row["pruned_elements"] for row in view["regions"]}
    assert set(counts) == {row["region"] for row in view["weights"]}
    assert sum(counts.values()) == sum(row["weights"] for row in view["weights"] if row["reason"] is None)
    assert "all linear weights" in result.out
    assert (folder / "regions.svg").read_text().startswith("<?xml")
    refused = run("inspect", "model.py", "--no-weights")
    assert refused.status == 2
    assert "with torch.device('meta')" in refused.err


@pytest.mark.usefixtures("nothing_left")
def test_inspect_to_stdout_is_json_alone() -> None:
    assert json.loads(run("inspect", "model.py", "--json", "-").out)["format"] == "mfcompile.inspection"


def _occupied(folder: Path) -> tuple[str, ...]:
    (folder / "full").mkdir()
    (folder / "full" / "x").touch()
    return ("-o", "full")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: ("--sparsity", "63"), r"sparsity: 63 is not in [0, 1)"),
        (_occupied, "the output directory full is not empty. Nothing was written"),
        (lambda folder: ("-o", "model.py"), "the output directory model.py is a file"),
        (lambda folder: ("-o", "/proc/none/out"), "cannot be written"),
        (lambda folder: ("--num-calibration-samples", "0"), "num_calibration_samples: 0 is not a whole number"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Path], tuple[str, ...]], message: str
) -> None:
    monkeypatch.setattr("mfcompile.cli.prune.load_recipe", lambda recipe, progress: pytest.fail("the model was loaded"))
    result = run("prune", "model.py", *prepare(folder))
    assert (result.status, result.out) == (2, "")
    assert message in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model = Net()", "net = Net()"), "model"),
        (("example_inputs = batch(2, 0)", ""), "example_inputs"),
        (("return [batch(4, seed) for seed in range(1, 5)]", "return []"), "empty"),
        (("model = Net().eval()", "model = Net().eval(); model.left[0].a.weight.data[0, 0] = float('nan')"), "NaN"),
        (("import torch\n", "import torch\nraise RuntimeError('no luck')\n"), "no luck"),
        (("def forward(self, pixel_values: Tensor, input_ids:", "def forward(self, pixel_values: Tensor, other:"), "other"),
        (('float(model(**batch(3, 99))["logits"].mean())', "model.missing"), "evaluate failed on the dense model"),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_what_is_wrong_with_a_model_is_one_message(folder: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in MODEL
    (folder / "model.py").write_text(MODEL.replace(*change))
    result = run("prune", "model.py", "--no-onnx")
    assert result.status == 2, result.err
    assert "error: " in result.err
    assert message in result.err.rpartition("error: ")[2]
    assert "Traceback" not in result.err


def test_without_calibration_data_the_example_inputs_are_used_and_it_is_said(folder: Path) -> None:
    (folder / "model.py").write_text(MODEL.replace("def calibration_batches", "def something_else"))
    result = run("prune", "model.py", "--no-onnx", "--no-evaluate")
    assert result.status == 0, result.err
    assert "warning: there is no calibration data, so the example inputs stand in for it" in result.err
    report = json.loads((folder / "model-pruned" / "report.json").read_text())
    assert report["calibration"]["source"] == "example inputs"
    assert "example inputs" in result.out


def test_a_source_that_is_not_there(folder: Path) -> None:
    result = run("prune", "nothing.py")
    assert (result.status, "nothing.py does not exist" in result.err) == (2, True)


def test_a_pattern_that_matches_nothing_names_the_nearest(folder: Path) -> None:
    result = run("prune", "model.py", "--ignore", "lefft.*", "--dry-run")
    assert result.status == 2
    assert "'lefft.*' matches no linear weight" in result.err
    assert "left" in result.err


def test_a_model_that_onnx_refuses_is_published_without_onnx(folder: Path) -> None:
    number = (
        "        y = y + float(y.detach().numpy().sum())\n        weight ="  # of this example, whatever the way of exporting
    )
    (folder / "model.py").write_text(MODEL.replace("        weight =", number))
    result = run("prune", "model.py", "--no-evaluate")
    assert result.status == 1, result.err
    assert "error: there is no model.onnx: " in result.err
    assert {path.name for path in (folder / "model-pruned").iterdir()} == FILES - {"model.onnx"}
    assert "torch.export" in json.loads((folder / "model-pruned" / "report.json").read_text())["export_refused"]
