"""Sessions in turns: a form that cannot be loaded or computes something else is reported, and the others are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mfcompile import runtime
from mfcompile.benchmark.cost import measure_cost
from mfcompile.benchmark.machine import BUSY_LOAD, BUSY_STRETCH, busy_notes, describe_machine
from mfcompile.benchmark.result import InputSize
from mfcompile.benchmark.sizes import SizedInputs
from mfcompile.benchmark.timing import Clock, Measured, SessionFile, measure, output_error
from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs
from tests.sparse_models import random_weight, sparse_model

ROWS, COLUMNS = 24, 16
WEIGHT = random_weight(np.random.default_rng(0), ROWS, COLUMNS, 0.3)


def sized(rows: int, name: str = "X", columns: int = COLUMNS) -> SizedInputs:
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return SizedInputs(InputSize(rows, None, {name: (rows, columns)}), ExampleInputs((), {name: tensor}, (name,)))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return product(tmp_path / "dense.onnx", WEIGHT)


def product(path: Path, weight: np.ndarray) -> Path:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["X", "W"], ["Y"])], "product",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["rows", weight.shape[1]])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["rows", weight.shape[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "W")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run_in_turns(files: list[SessionFile], sizes: list[SizedInputs], threads: int = 1) -> tuple[Measured, Clock]:
    clock = Clock()
    return measure(files, sizes, baseline="dense", threads=threads, rounds=2, clock=clock), clock


def test_every_form_is_timed_at_every_size(dense: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.onnx"
    onnx.save(sparse_model(WEIGHT), packed)
    found, clock = run_in_turns([SessionFile("dense", dense), SessionFile("packed", packed)], [sized(1), sized(5)])
    assert [(item.variant, item.size, item.rounds) for item in found.timings] == [
        ("dense", 0, 2), ("packed", 0, 2), ("dense", 1, 2), ("packed", 1, 2),
    ]  # fmt: skip
    assert all(item.seconds > 0 and (item.speedup or 0) > 0 for item in found.timings)
    assert all((item.max_error or 0) < 1e-6 for item in found.timings)
    assert found.failures == []
    assert clock.stretch is not None


def test_a_form_that_does_not_load_is_reported_and_the_others_are_measured(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    found, _ = run_in_turns([SessionFile("dense", dense), SessionFile("packed", broken)], [sized(2)])
    assert [item.variant for item in found.timings] == ["dense"]
    (failure,) = found.failures
    assert (failure.variant, failure.size, failure.threads) == ("packed", 0, 1)
    assert "cannot load it" in failure.reason


def test_without_the_baseline_the_others_have_times_and_no_ratio(dense: Path, tmp_path: Path) -> None:
    found, _ = run_in_turns([SessionFile("dense", tmp_path / "absent.onnx"), SessionFile("packed", dense)], [sized(2)])
    (only,) = found.timings
    assert (only.variant, only.speedup, only.max_error) == ("packed", None, None)


def test_a_size_that_does_not_run_leaves_the_others(dense: Path) -> None:
    found, _ = run_in_turns([SessionFile("dense", dense)], [sized(2, columns=COLUMNS + 1), sized(2)])
    assert [item.size for item in found.timings] == [1]
    assert "it does not run" in found.failures[0].reason


def test_wrong_outputs_are_shown_and_broken_ones_are_no_result(dense: Path, tmp_path: Path) -> None:
    wrong = product(tmp_path / "wrong.onnx", 2 * WEIGHT)
    broken = product(tmp_path / "nan.onnx", np.full_like(WEIGHT, np.nan))
    files = [SessionFile("dense", dense), SessionFile("runtime", wrong), SessionFile("int8", broken)]
    found, _ = run_in_turns(files, [sized(3)])
    errors = {item.variant: item.max_error for item in found.timings}
    assert errors["runtime"] == pytest.approx(1.0)
    assert "int8" not in errors
    assert "NaN or infinity" in found.failures[0].reason


def test_several_threads_are_timed_by_the_clock(dense: Path) -> None:
    found, clock = run_in_turns([SessionFile("dense", dense)], [sized(2)], threads=2)
    assert found.timings[0].threads == 2
    assert clock.stretch is None


@pytest.mark.parametrize(
    ("own", "wanted", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -3.0], [1.0, -4.0], 0.25),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([0.5], [0.0], 0.5),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_error_of_outputs(own: list[float], wanted: list[float], error: float) -> None:
    assert output_error([np.array(own)], [np.array(wanted)]) == error


def test_cost_is_measured_in_a_process_of_its_own(dense: Path) -> None:
    found = measure_cost(SessionFile("dense", dense), sized(3).inputs, threads=1, processes=1)
    assert found.creation_seconds > 0
    assert found.first_run_seconds > 0
    if found.resident_bytes is not None and found.peak_bytes is not None:
        assert 0 < found.resident_bytes <= found.peak_bytes


def test_a_cost_that_cannot_be_measured_has_a_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in a process of its own: .*absent\.onnx"):
        measure_cost(SessionFile("dense", tmp_path / "absent.onnx"), sized(3).inputs, threads=1, processes=1)


def test_the_runtime_is_registered(tmp_path: Path) -> None:
    if not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    path = tmp_path / "sparse.onnx"
    onnx.save(sparse_model(WEIGHT, with_function=False), path)  # without the library nothing can stand in for its node
    with pytest.raises(InputError, match="cannot load it"):
        SessionFile("packed", path).open(1)
    assert SessionFile("runtime", path, runtime.library_path()).open(1).get_inputs()[0].name == "X"


def test_a_busy_machine_is_pointed_out() -> None:
    quiet = {"load_average": 1.0, "cores": 2}
    assert busy_notes(quiet, 1.0) == busy_notes({"load_average": None, "cores": 2}, None) == []
    (loaded,) = busy_notes({"load_average": 2 * BUSY_LOAD + 0.1, "cores": 2}, None)
    assert "load average 1.1 on 2 cores" in loaded
    (shared,) = busy_notes(quiet, BUSY_STRETCH + 0.4)
    assert "1.50x as long on the clock" in shared
    assert describe_machine("avx2")["sparse_runtime"] == "avx2"
