"""``mfcompile compare`` end to end, on the model of test_cli.py."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from mfcompile.cli import main
from mfcompile.masks import MaskSet

MODEL = (Path(__file__).parent / "cli_model.py").read_text()
MORE_DATA = ("range(1, 5)", "range(1, 9)")
WITH_LOSS = MODEL + "\n\ndef loss_fn(model, batch):\n    return model(**batch)['logits'].square().mean()\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds model.py and nothing else."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``mfcompile`` with these words."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return status, out.getvalue(), err.getvalue()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def test_a_comparison_is_printed_written_and_repeated_by_prune(folder: Path) -> None:
    near = "-float((model(**batch(3, 99))['logits'] - Net.forward(globals()['model'], **batch(3, 99))['logits']).norm())"
    (folder / "model.py").write_text(
        WITH_LOSS.replace(*MORE_DATA).replace('float(model(**batch(3, 99))["logits"].mean())', near)
    )
    words = ("compare", "model.py", "--criteria", "multiflow", "snip@uniform", "wanda:2:4", "--sparsity", "0.5", "0.75")
    status, out, err = run(*words, "-o", "out", "--metric", "mean:max")
    assert status == 0, err
    assert names(folder) == {"model.py", "out"}
    assert names(folder / "out") == {"compare.json", "compare.png", "compare.svg"}
    document = json.loads((folder / "out" / "compare.json").read_text())
    assert (document["format"], document["seed"], document["source"]) == (
        "mfcompile.comparison", 0, {"path": "model.py", "kind": "python"}
    )  # fmt: skip
    assert [len([row for row in document["rows"] if row["sparsity"] == value]) for value in (0.5, 0.75)] == [4, 3]
    assert document["data"]["compared_on"] == "1 held-out calibration batch"
    for text in ("mean *", "higher mean is better (as asked)", "(best)", "Agreement of masks at 75 %", "50.00 %", "logits",
                 "1 held-out calibration batch", "Wrote out/compare.json"):  # fmt: skip
        assert text in out
    assert "pruning to 75 %" in err
    assert "pruning to 75 %" not in out
    best = next(row for row in document["rows"] if row["is_best"] and row["sparsity"] == 0.75)
    command = out[out.index("mfcompile prune") :].split()[1:]
    assert command[:4] == ["prune", "model.py", "--criterion", best["pruner"].partition("@")[0]]
    status, _, err = run(*command, "--num-calibration-samples", "28", "--no-onnx", "--no-evaluate", "-o", "pruned")
    assert status == 0, err
    masks = MaskSet.load(folder / "pruned" / "masks.safetensors")
    assert (best["pruner"], masks.digest()) == ("multiflow", best["digest"])


def test_without_an_output_directory_nothing_is_written(folder: Path) -> None:
    status, out, err = run("compare", "model.py", "--sparsity", "0.5", "--no-evaluate")
    assert status == 0, err
    assert names(folder) == {"model.py"}
    for name in (
        "multiflow",
        "magnitude",
        "lamp",
        "l2",
        "wanda",
        "random",
        "output error *",
        "calibration data, none held out",
    ):
        assert name in out
    assert "snip" not in out


def test_a_criterion_of_model_py_is_compared_by_its_name(folder: Path) -> None:
    own = """
from mfcompile import Criterion
class Mine(Criterion):
    name = "mine"
    def score(self, site):
        return site.weight.abs() ** 3
criterion = Mine()
"""
    (folder / "model.py").write_text(MODEL + own)
    status, out, err = run("compare", "model.py", "--criteria", "mine@uniform", "magnitude@uniform", "--sparsity", "0.5")
    assert status == 0, err
    assert "mine@uniform" in out
    cells = [line.split() for line in out[out.index("Agreement") :].splitlines()]
    assert ["mine@uniform", "1", "1.00"] in [row[:3] for row in cells], "cubes of magnitudes rank as magnitudes do"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--criteria", "multiflw"), "did you mean multiflow"),
        (("--criteria", "lamp@"), "names no pruner: the form is CRITERION"),
        (("--criteria", "lamp@none.yaml"), "the allocation none.yaml cannot be read"),
        (("--criteria", "snip", "lamp"), "snip: the criterion 'snip' needs gradients"),
        (("--sparsity", "63"), "did you mean 0.63"),
        (("--metric", "mean", "--no-evaluate"), "there is no evaluate"),
        (("-o", "model.py"), "the output directory model.py is a file"),
        (("--criterion", "lamp"), "Did you mean --criteria instead of --criterion?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message_with_status_2(folder: Path, words: tuple[str, ...], message: str) -> None:
    status, out, err = run("compare", "model.py", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert names(folder) == {"model.py"}
