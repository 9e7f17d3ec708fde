"""``mfcompile prune``: every recipe repeats its masks, and what cannot be met is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mfcompile.cli import main
from mfcompile.masks import MaskSet

MODEL = (Path(__file__).parent / "cli_model.py").read_text() + (
    "\n\ndef loss_fn(model, batch):\n    return model(**batch)['logits'].square().mean()\n"
)

OWN = """

from mfcompile.passes.criteria.base import Criterion
from dataclasses import dataclass

@dataclass(frozen=True)
class Power(Criterion):
    name = "power"
    exponent: float = 2.0
    first_row: float = 1.0

    def score(self, site):
        score = site.weight.abs() ** self.exponent
        score[0] *= self.first_row
        return score

criterion = Power()
"""

BUDGETS = {"*": 0.5, "left.*": 0.75}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with model.py and a file of sparsities by layer."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "budgets.yaml").write_text(yaml.safe_dump(BUDGETS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_written(folder: Path) -> Iterator[None]:
    """Whatever happens in the test, no directory of results is there afterwards."""
    yield
    assert {path.name for path in folder.iterdir()} <= {"model.py", "budgets.yaml", "__pycache__"}


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Status, output and messages of ``mfcompile`` with these words."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def prune(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """``mfcompile prune`` without what takes long."""
    return run(capsys, "prune", *words, "--no-onnx", "--no-evaluate")


@pytest.mark.parametrize(
    "words",
    [
        ("--sparsity", "vision=0.5,text=0.7,fusion=0.6"),
        ("--allocation", "budgets.yaml", "--criterion", "wanda"),
        ("--pattern", "2:4", "--criterion", "snip"),
        ("--criterion", "chita", "--criterion-option", "ridge=1e-4", "--sparsity", "0.5"),
        ("--criterion", "itersnip", "--criterion-option", "steps=3"),
        ("--update", "sparsegpt", "--update-option", "passes=1", "--precision", "float64"),
        ("--weighting", "cip", "--sparsity", "0.5"),
    ],
    ids=" ".join,
)
def test_every_recipe_repeats_its_masks(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    status, _, err = prune(capsys, "model.py", *words, "-o", "first")
    assert status == 0, err
    status, out, err = prune(capsys, "first/recipe.yaml", "-o", "again")
    assert status == 0, err
    assert "The recipe was reproduced" in out
    assert MaskSet.load("again/masks.safetensors").mask_digest() == MaskSet.load("first/masks.safetensors").mask_digest()


def test_a_recipe_remembers_the_statistics_that_it_was_given(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert prune(capsys, "model.py", "--num-calibration-samples", "4", "-o", "few")[0] == 0
    status, _, err = prune(capsys, "model.py", "--statistics", "few/statistics.safetensors", "-o", "reused")
    assert status == 0, err
    assert yaml.safe_load((folder / "reused/recipe.yaml").read_text())["statistics"] == "../few/statistics.safetensors"
    status, out, err = prune(capsys, "reused/recipe.yaml", "-o", "again")
    assert (status, "The recipe was reproduced" in out) == (0, True), err
    assert MaskSet.load("again/masks.safetensors") == MaskSet.load("few/masks.safetensors")


def test_statistics_that_are_not_needed_are_said_to_be_unused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = prune(capsys, "model.py", "--criterion", "magnitude", "--statistics", "nowhere.safetensors", "-o", "out")
    assert (status, "--statistics is not used: the criterion magnitude needs none" in err) == (0, True), err


def test_nobody_misses_calibration_data_where_statistics_are_given(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "model.py").write_text(MODEL.replace("def calibration_batches", "def unused"))
    _, _, err = prune(capsys, "model.py", "-o", "first")
    assert "there is no calibration data" in err
    status, _, err = prune(capsys, "model.py", "--statistics", "first/statistics.safetensors", "-o", "second")
    assert (status, "there is no calibration data" in err) == (0, False), err


def test_a_recipe_takes_another_allocation_or_pattern_without_a_word_on_sparsity(capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(capsys, "model.py", "--sparsity", "0.63", "-o", "first")[0] == 0
    for number, words in enumerate((("--pattern", "2:4"), ("--allocation", "budgets.yaml"))):
        status, _, err = prune(capsys, "first/recipe.yaml", *words, "-o", f"other{number}")
        assert status == 0, err
    assert MaskSet.load("other0/masks.safetensors").sparsity == 0.5


def test_the_report_of_sparsities_by_layer_asks_nothing_of_a_region(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert prune(capsys, "model.py", "--allocation", "budgets.yaml", "-o", "out")[0] == 0
    report = json.loads((folder / "out/report.json").read_text())
    assert [row["sparsity_requested"] for row in report["regions"]] == [None] * 3
    assert {row["region"]: row["sparsity"] for row in report["regions"]} == {"vision": 0.75, "text": 0.5, "fusion": 0.5}


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sparsity", "0.5", "0.75", "--pattern", "2:4"), "the pattern 2:4 removes 0.5 of every layer, but sparsity 0.75"),
        (("--sparsity", "0.5", "1.5"), "1.5 is not in [0, 1)"),
        (("--sparsity", "vision=0.5,vision=0.6"), "gives the region vision twice"),
        (("--sparsity", "vision=0.5", "vision=0.6"), "the region vision is given twice"),
        (("--sparsity", "0.5", "0.7", "--allocation", "budgets.yaml"), "leave one of them out"),
        (("--criterion", "nosuch"), "criterion='nosuch' is unknown"),
        (("--criterion", "magnitude", "--criterion-option", "steps=3"), "has no option 'steps'"),
        (("--allocation", "fair"), "allocation='fair' is unknown"),
        (("--criterion", "chita", "--pattern", "4x1"), "chooses single weights together"),
        (
            ("--sparsity", "vision=0.5,text=0.5,fusion=0.5", "--allocation", "score-global"),
            "sets one threshold for the whole model",
        ),
        (("--update-option", "passes=3"), "none is asked for"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_what_cannot_be_met_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str, dry: tuple[str, ...]
) -> None:
    status, _, err = prune(capsys, "model.py", *words, *dry, "-o", "out")
    assert status == 2
    assert message in err
    assert "capturing" not in err


@pytest.mark.usefixtures("nothing_written")
def test_a_dry_run_shows_sparsities_by_layer_and_every_sparsity(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = prune(capsys, "model.py", "--dry-run", "--allocation", "budgets.yaml")
    assert status == 0, err
    assert [line.split()[-3] for line in out.splitlines() if line.split()[:1] in (["vision"], ["text"])] == ["75.00", "50.00"]
    status, out, err = prune(capsys, "model.py", "--dry-run", "--sparsity", "0.5", "0.75", "--criterion", "magnitude")
    assert (status, out.count("Plan by region"), err.count("loading the model")) == (0, 2, 1), err
    assert "magnitude-global shares out one budget among all layers" in out
    assert "Calibration: none, the criterion magnitude needs none." in out


def test_several_results_appear_together_and_replace_what_was_there(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfcompile.cli import outputs

    (folder / "out").mkdir()
    (folder / "out" / "stale").write_text("old")
    written, publish = [], outputs.publish

    def fails_twice(*args: object, **kwargs: object) -> object:
        written.append(args[0])
        if len(written) == 2:
            raise KeyboardInterrupt
        return publish(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(outputs, "publish", fails_twice)
    words = ("model.py", "--sparsity", "0.5", "0.6300001", "0.63", "-o", "out", "--overwrite")
    assert prune(capsys, *words)[0] == 2
    assert sorted(path.name for path in folder.glob("out/*")) == ["stale"]
    assert not list(folder.glob(".out*"))
    monkeypatch.setattr(outputs, "publish", publish)
    status, out, err = prune(capsys, *words)
    assert status == 0, err
    assert sorted(path.name for path in folder.glob("out/*")) == ["0.5", "0.63", "0.6300001"]
    assert f"Written to {Path('out/0.63')}" in out
    assert yaml.safe_load((folder / "out/0.5/recipe.yaml").read_text())["source"] == "../../model.py"
    assert "The recipe was reproduced" in prune(capsys, "out/0.63/recipe.yaml", "-o", "again")[1]


def test_the_next_step_after_a_recipe_names_the_model(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run(capsys, "prune", "model.py", "--no-evaluate", "-o", "first")[0] == 0
    status, out, err = run(capsys, "prune", "first/recipe.yaml", "--no-evaluate", "-o", "again")
    assert status == 0, err
    assert f"mfcompile verify {Path('again/model.onnx')} {folder / 'model.py'} --masks" in out


def test_the_criterion_of_the_model_answers_to_its_name_and_takes_options(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "model.py").write_text(MODEL + OWN)
    assert prune(capsys, "model.py", "-o", "plain")[0] == 0
    status, _, err = prune(capsys, "model.py", "--criterion", "power", "--criterion-option", "first_row=0.0", "-o", "changed")
    assert status == 0, err
    plain, changed = (MaskSet.load(f"{name}/masks.safetensors") for name in ("plain", "changed"))
    assert all(not changed[name][0].any() for name in changed)
    assert any(bool(plain[name][0].any()) for name in plain)
    assert "The recipe was reproduced" in prune(capsys, "changed/recipe.yaml", "-o", "again")[1]
    status, _, err = prune(capsys, "model.py", "--criterion-option", "base=3", "-o", "odd")
    assert (status, "'power', has no option 'base'; it has exponent, first_row" in err) == (2, True), err


def test_a_comparison_refuses_at_once_what_one_pruner_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("--criteria", "magnitude", "chita:4x1"), "chita:4x1"),
        (("--criteria", "lamp@magnitude-global", "--sparsity", "vision=0.5,text=0.5,fusion=0.5"), "lamp@magnitude-global"),
    ):
        status, _, err = run(capsys, "compare", "model.py", *words)
        assert (status, message in err, "capturing" in err) == (2, True, False), err


def test_the_command_after_a_comparison_keeps_the_options_that_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--ignore", "left.1.*", "--num-calibration-samples", "8", "--seed", "3", "--modality", "input_ids=text")
    status, out, err = run(
        capsys,
        "compare",
        "model.py",
        "--criteria",
        "magnitude",
        "lamp",
        "--sparsity",
        "0.5",
        *given,
        "--no-evaluate",
        "--no-floor",
    )
    assert status == 0, err
    command = next(line for line in out.splitlines() if "Best at" in line)
    for words in ("--ignore 'left.1.*'", "--num-calibration-samples 8", "--seed 3", "--modality input_ids=text"):
        assert words in command
