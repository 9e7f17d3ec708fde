"""A comparison in words: what ranks, what was compared on what, and the command that follows."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mfcompile.cli.comparison_tables import agreement_table, explanation, next_step, results_table
from mfcompile.cli.console import PLAIN_WIDTH


def pruner(label: str, **given: Any) -> dict[str, Any]:
    plain = {
        "criterion": label, "criterion_options": {}, "allocation": "uniform", "is_allocation_chosen": False,
        "pattern": "unstructured", "update": None, "update_options": {}, "needs": [], "is_floor": label == "random",
    }  # fmt: skip
    return {"label": label, **plain, **given}


def row(label: str, sparsity: Any, **given: Any) -> dict[str, Any]:
    plain = {
        "achieved": 0.5, "output_error": 0.25, "metrics": {"r1": 80.0, "r5": 90.0}, "regions": {"vision": 0.4, "text": 0.6},
        "least_pruned": {"layer": "a", "sparsity": 0.1}, "most_pruned": {"layer": "b", "sparsity": 0.95},
        "emptied_layers": [], "seconds": 1.25, "is_best": False,
    }  # fmt: skip
    return {"pruner": label, "sparsity": sparsity, **plain, **given}


def document(**given: Any) -> dict[str, Any]:
    plain = {
        "metric": {"name": "r5", "is_higher_better": True, "reason": "as asked"},
        "dense": {"metrics": {"r1": 85.0, "r5": 95.0}},
        "pruners": [pruner("lamp"), pruner("random")],
        "rows": [row("lamp", 0.5, is_best=True), row("random", 0.5, output_error=None), row("random", 0.9)],
        "outputs": [{"name": f"out{index}", "kind": "float", "elements": 4, "left_out": index} for index in range(8)],
        "data": {"compared_samples": 32, "compared_on": "example inputs", "samples": 64, "is_held_out": False},
        "agreement": [{"sparsity": 0.5, "pruners": ["lamp", "random"], "kappa": [[1.0, -0.001], [-0.001, 1.0]]}],
        "middle": 0,
    }
    return {**plain, **given}


def printed(table: Any) -> list[str]:
    console = Console(width=PLAIN_WIDTH)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_the_dense_model_comes_first_and_the_best_is_marked() -> None:
    lines = printed(results_table(document()))
    assert lines[1].split()[:6] == ["pruner", "sparsity", "r5", "*", "r1", "output"]
    assert [line.split()[0] for line in lines[3:] if line.strip()] == ["dense", "lamp", "random", "random"]
    cells = next(line for line in lines if "lamp" in line).split()
    assert cells == ["lamp", "(best)", "50.00", "%", "90", "80", "0.250", "40.00", "%", "60.00", "%", "10.0", "to", "95.0", "%",
                     "1.2", "s"]  # fmt: skip
    assert "not finite" in lines[6]


def test_agreement_with_oneself_is_1_and_no_zero_is_negative() -> None:
    lines = printed(agreement_table(document()["agreement"][0]))
    assert [line.split() for line in lines[3:5]] == [["lamp", "1", "0.00"], ["random", "0.00", "1"]]


def test_what_is_said_of_the_data() -> None:
    text = "\n".join(explanation(document()))
    assert "higher r5 is better (as asked)" in text
    assert "(out0, out1, out2, out3, out4, out5 and 2 more), over 32 samples: example inputs without 28 elements" in text
    assert "Calibrated" not in text
    assert "--held-out" not in text
    fitted = document(pruners=[pruner("lamp", update="sparsegpt")], metric=None)
    text = "\n".join(explanation(fitted))
    assert "there is no evaluate" in text
    assert "Calibrated with 64 samples" in text
    assert "--held-out N" in text
    emptied = [row("lamp", 0.5, emptied_layers=["x"]), row("lamp", 0.9, emptied_layers=["x", "y"])]
    notes = [line for line in explanation(document(rows=emptied)) if line.startswith("note")]
    assert notes == ["note: lamp at 50 %: a layer is empty (x)", "note: lamp at 90 %: 2 layers are empty (x)"]


@pytest.mark.parametrize(
    ("chosen", "sparsity", "words"),
    [
        (pruner("lamp"), 0.5, "--criterion lamp --sparsity 0.5"),
        (
            pruner("w", criterion="wanda", pattern="2:4", update="sparsegpt", update_options={"passes": 2}),
            0.5,
            "--criterion wanda --pattern 2:4 --update sparsegpt --update-option passes=2 --sparsity 0.5",
        ),
        (
            pruner("i", criterion="itersnip", criterion_options={"steps": 3}, is_allocation_chosen=True),
            {"vision": 0.5, "text": 0.7},
            "--criterion itersnip --criterion-option steps=3 --allocation uniform --sparsity vision=0.5,text=0.7",
        ),
    ],
)  # fmt: skip
def test_the_next_command_prunes_with_the_best(chosen: dict[str, Any], sparsity: Any, words: str) -> None:
    found = document(
        pruners=[chosen], rows=[row(chosen["label"], sparsity, is_best=True)],
        agreement=[{"sparsity": sparsity, "pruners": [chosen["label"]], "kappa": [[1.0]]}],
    )  # fmt: skip
    said = next_step(found, Path("model.py"))
    assert said is not None
    assert said.endswith(f"mfcompile prune model.py {words}")


def test_no_command_follows_where_random_scores_are_best_or_nothing_is_compared() -> None:
    best = document(rows=[row("random", 0.5, is_best=True), row("lamp", 0.5)])
    assert "nothing does better than random scores" in (next_step(best, Path("model.py")) or "")
    assert next_step(document(rows=[row("lamp", 0.5)]), Path("model.py")) is None


def test_sparsities_by_layer_are_not_made_a_command_that_leaves_them_out() -> None:
    given = pruner("lamp", allocation={"*": 0.5}, is_allocation_chosen=True)
    said = next_step(document(pruners=[given, pruner("random")]), Path("model.py")) or ""
    assert said.endswith("--allocation FILE.")
    assert "mfcompile prune" not in said


def test_the_command_that_follows_takes_the_options_of_the_comparison() -> None:
    said = next_step(document(), Path("model.py"), ["--ignore", "a.*"]) or ""
    assert said.endswith("--sparsity 0.5 --ignore 'a.*'")
