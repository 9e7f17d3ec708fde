"""What a session costs beside its runs: time to create, first run, memory; each in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mfcompile.benchmark.result import SessionCost
from mfcompile.benchmark.timing import SessionFile
from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs

PROCESSES = 3
"""Processes for each figure."""

TIMEOUT_SECONDS = 600


def measure_cost(
    file: SessionFile, inputs: ExampleInputs, *, threads: int, processes: int = PROCESSES, is_trimmed: bool = False
) -> SessionCost:
    """Medians over several processes that each create one session and run it twice.

    Args:
        file: what is loaded, and how.
        inputs: in the dtypes of the graph; those of all inputs of the graph, and no others.
        threads: threads inside one operator.
        processes: how many processes.
        is_trimmed: give memory back that creating the session left free, so that all that the runs take counts as theirs.

    Raises:
        InputError: the process did not come to an end, or what it was to run failed.
    """
    with tempfile.TemporaryDirectory(prefix="mfcompile-") as folder:
        arrays = Path(folder) / "inputs.npz"
        given: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.tensors().items()}
        np.savez(arrays, **given)
        trivial = _write_trivial(Path(folder) / "trivial.onnx")
        task = {
            "path": str(file.path),
            "inputs": str(arrays),
            "threads": threads,
            "trivial": str(trivial),
            "library": file.library,
            "is_decoded": file.is_decoded,
            "is_trimmed": is_trimmed,
        }
        found = [_run(task) for _ in range(processes)]
    return SessionCost(
        creation_seconds=statistics.median(item["creation_seconds"] for item in found),
        first_run_seconds=statistics.median(item["first_run_seconds"] for item in found),
        second_run_seconds=statistics.median(item["second_run_seconds"] for item in found),
        resident_bytes=_median([item["resident_bytes"] for item in found]),
        run_bytes=_median([item["run_bytes"] for item in found]),
        peak_bytes=_median([item["peak_bytes"] for item in found]),
    )


def _write_trivial(path: Path) -> Path:
    """A graph of one node, whose session takes what onnxruntime itself needs."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "trivial", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def _run(task: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "mfcompile.benchmark.child", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"one session and two runs took more than {TIMEOUT_SECONDS} s in a process of their own") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise InputError(f"the process that measures memory ended with status {done.returncode}{_last(done.stderr)}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise InputError(f"in a process of its own: {found['error']}")
    return found


def _last(text: str) -> str:
    """The last line of an error, after a colon."""
    lines = text.strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _median(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(statistics.median(known)) if known else None
