"""Where a run spends its time: onnxruntime's own profile, by kind of operator."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import onnxruntime

from mfcompile.benchmark.timing import SessionFile
from mfcompile.exporters.stored_weights import DOMAIN
from mfcompile.inputs import ExampleInputs
from mfcompile.session import make_feeds
from mfcompile.session_options import session_options

RUNS = 9
_PRODUCTS = {"MatMul", "Gemm", "FusedGemm"}


def node_times(file: SessionFile, inputs: ExampleInputs, runs: int = RUNS) -> dict[str, float]:
    """Kind of operator -> seconds of one run, one thread.

    ``linear`` is what multiplies by stored weights: sparse layers, and products by a matrix, or by weights that onnxruntime has
    brought into a layout of its own (the profile then lists one input). ``MatMul`` is what multiplies two computed values.

    Of short operators it is the sum over nodes of their shortest time, since other processes make some runs longer. Products by
    weights take so long that something cuts into every one of them: ``linear`` is the median CPU time of a run less all others.
    """
    with tempfile.TemporaryDirectory(prefix="mfcompile-") as folder:
        options = session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        if file.library is not None:
            options.register_custom_ops_library(file.library)
        session = onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
        feeds, _ = make_feeds(session, inputs)
        names = [node.name for node in session.get_outputs()]
        session.run_with_ort_values(names, feeds)
        spent = []
        for _ in range(runs):
            started = time.thread_time()
            session.run_with_ort_values(names, feeds)
            spent.append(time.thread_time() - started)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[_kind(event["args"]), event["name"]].append(event["dur"] / 1e6)
    found: dict[str, float] = {"linear": 0.0}
    for (kind, _), seconds in times.items():
        per_run = len(seconds) / (runs + 1)
        if kind != "linear":
            found[kind] = found.get(kind, 0.0) + min(seconds) * per_run
    return {**found, "linear": statistics.median(spent) - sum(found.values())}


def _kind(arguments: dict[str, object]) -> str:
    name = str(arguments["op_name"])
    if name.startswith("SparseLinear") or arguments.get("domain") == DOMAIN:
        return "linear"
    shapes = arguments.get("input_type_shape")
    is_linear = name in _PRODUCTS and isinstance(shapes, list) and (len(shapes) == 1 or _rank(shapes[1]) == 2)
    return "linear" if is_linear else name


def _rank(shape: dict[str, list[int]]) -> int:
    return len(next(iter(shape.values())))
