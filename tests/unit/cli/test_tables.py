"""Tables: they show the report's numbers, show text as it is, and do not flood the screen."""

from typing import Any

import pytest
from rich.console import Console, RenderableType

from mfcompile.cli import tables
from mfcompile.cli.results import latency_lines, size_lines, sparse_lines


def _text(view: RenderableType | None) -> str:
    assert view is not None
    console = Console(width=140, force_terminal=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def _skipped(reason: str, name: str, weights: int = 10) -> dict[str, Any]:
    return {"name": name, "region": "text", "shape": [2, 5], "weights": weights, "reason": reason}


def test_skipped_sites_are_grouped_by_reason() -> None:
    sites = [_skipped("outside any repeated block", f"head.{index}.weight") for index in range(200)]
    sites.append(_skipped("ignored by the pattern 'x'", "x.weight[0:4]", 7))
    text = _text(tables.skipped_table({"skipped": sites}))
    assert "Left dense: 201 linear weights" in text
    assert "head.0.weight, head.1.weight and 198 more" in text
    assert "x.weight[0:4]" in text
    assert len(text.splitlines()) < 8


def test_many_reasons_do_not_flood_the_screen() -> None:
    sites = [_skipped(f"reason {index}", f"site{index}") for index in range(100)]
    text = _text(tables.skipped_table({"skipped": sites}))
    assert "92 further reasons (see report.json)" in text
    assert len(text.splitlines()) < 15


def test_nothing_skipped_is_no_table() -> None:
    assert tables.skipped_table({"skipped": []}) is None


def test_region_table_shows_rows_and_totals() -> None:
    report = {
        "regions": [
            {
                "region": "vision",
                "sites": 2,
                "weights": 1000,
                "kept": 370,
                "sparsity_requested": 0.63,
                "sparsity": 0.63,
                "tokens_min": 320,
                "tokens_max": 1280,
                "padding_tokens_max": 12,
            }
        ],
        "sites": [{}, {}],
        "totals": {
            "prunable": {"weights": 1000, "kept": 370, "sparsity_requested": 0.63, "sparsity": 0.63},
            "all_parameters": {"weights": 2000, "kept": 1370, "sparsity": 0.315},
        },
    }
    lines = _text(tables.regions_table(report)).splitlines()
    row = next(line.split() for line in lines if "vision" in line)
    assert row == ["vision", "2", "1,000", "63.00", "%", "63.00", "%", "370", "320", "to", "1,280", "12"]
    assert any(line.split()[:3] == ["prunable", "2", "1,000"] for line in lines)
    assert any(line.split()[:5] == ["all", "parameters", "2,000", "31.50", "%"] for line in lines)


def test_parity_outside_of_the_tolerance_stands_out() -> None:
    outputs = [
        {"name": "a", "max_abs_diff": 1e-6, "max_abs": 1.0, "within": True},
        {"name": "b", "max_abs_diff": None, "max_abs": 1.0, "within": False},
    ]
    text = _text(tables.parity_table({"runtime": "onnxruntime 1", "atol": 1e-4, "rtol": 1e-3, "outputs": outputs}))
    assert "onnxruntime 1 with PyTorch (atol 0.0001, rtol 0.001)" in text
    assert "1.00e-06" in text
    assert "not finite" in text
    assert text.count("OUTSIDE") == 1


def test_evaluation_has_a_column_per_variant() -> None:
    text = _text(tables.evaluation_table({"dense": {"r1": 96.8, "r5": 99.0}, "pruned": {"r1": 90.25}}))
    assert "96.8" in text
    assert "90.25" in text
    assert text.splitlines()[-2].split() == ["r5", "99", "-"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_345, "12.3 kB"), (2_400_000, "2.4 MB"), (1.5e9, "1.5 GB"), (2e12, "2,000 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert tables.size(count) == text


def test_latency_is_stated_plainly() -> None:
    latency = {
        "runtime": "onnxruntime 1.20, CPU",
        "batch_size": 2,
        "repeats": 20,
        "medians_ms": {"dense": 10.0, "pruned": 10.2},
        "ratio": 1.02,
        "load_ms": {"dense": 5.0, "pruned": 50.0},
    }
    text = "\n".join(latency_lines(latency))
    assert "dense 10 ms, pruned 10.2 ms, pruned / dense = 1.02" in text
    assert "pruning gives no speed there" in text
    assert "batch 2, 20 turns" in text
    assert "mfcompile.runtime" not in text


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(0.5, "5 ms, 2.00x as fast as dense."), (0.99, "as fast as dense."), (1.6, "slower than dense (1.60 of its time).")],
)
def test_latency_with_the_sparse_kernels_says_which_is_faster(ratio: float, words: str) -> None:
    latency = {
        "runtime": "onnxruntime 1.31, CPU",
        "batch_size": None,
        "repeats": 3,
        "medians_ms": {"dense": 10.0, "pruned": 10.0},
        "ratio": 1.0,
        "load_ms": {"dense": 5.0, "pruned": 50.0},
    }
    measured = {
        "medians_ms": {"dense": 10.0, "pruned": 10.0, "sparse": 10 * ratio},
        "sparse_ratio": ratio,
        "load_ms": {"dense": 5.0, "pruned": 50.0, "sparse": 7.0},
    }
    text = "\n".join(latency_lines({**latency, **measured}))
    assert f"{10 * ratio:.3g} ms, {words.removeprefix('5 ms, ')}" in text
    assert "7 ms with mfcompile.runtime" in text
    text = "\n".join(latency_lines({**latency, "sparse_missing": "no compiler. Install one"}))
    assert "Not measured with mfcompile.runtime, which skips zeros: no compiler. Install one" in text


def test_layers_that_run_sparse_and_those_that_do_not() -> None:
    export = {"sparse_layers": ["a", "b"], "dense_layers": {"c": "Gather reads it", "d": "asked", "e": "asked", "f": "asked"}}
    lines = sparse_lines(export)
    assert lines[0].startswith("Sparse: 2 of 6 pruned weights")
    assert lines[1:] == ["  dense: c: Gather reads it", "  dense: d, e and 1 more: asked"]
    assert sparse_lines({"sparse_layers": [], "dense_layers": {}}) == []


DENSE_FILE = {
    "file": "model.onnx",
    "size_bytes": 1000,
    "dense_size_bytes": 1000,
    "size_ratio": 1.0,
    "pruned_ratio": 1.0,
    "format": "dense",
    "values": "fp32",
    "notes": ["dimension 1 of x is fixed"],
}


def test_a_file_without_units_is_compared_with_the_whole_model() -> None:
    structure = {"parameters": {"dense": 500, "left": 250}}
    lines = size_lines(DENSE_FILE, structure, is_masked=False)
    assert lines == [
        "Size: model.onnx takes 1 kB, 0.50x of the 2 kB that the parameters of the whole model take in fp32.",
        "note: dimension 1 of x is fixed",
    ]
    packed = DENSE_FILE | {"size_bytes": 400, "size_ratio": 0.4, "format": "packed"}
    lines = size_lines(packed, structure)
    assert "0.20x of the 2 kB" in lines[0]
    assert "0.40x of the dense file of what is left, which is 1 kB" in lines[1]


def test_a_dense_file_is_said_to_hold_zeros() -> None:
    lines = size_lines(DENSE_FILE)
    assert "1.00x of the dense file's 1 kB" in lines[0]
    assert "Use --format packed" in lines[1]
    assert lines[2] == "note: dimension 1 of x is fixed"


def test_notes_that_say_the_same_are_one_line() -> None:
    same = [{"subject": f"layers.{index}.fc1.weight", "reason": "called with different modalities"} for index in range(4)]
    lines = tables.note_lines([same[0], {"subject": "head", "reason": "has no input"}, *same[1:]])
    assert lines == [
        "note: layers.0.fc1.weight, layers.1.fc1.weight and 2 more: called with different modalities",
        "note: head: has no input",
    ]
    assert tables.note_lines(same[:2]) == ["note: layers.0.fc1.weight, layers.1.fc1.weight: called with different modalities"]
