"""Seconds of a graph in onnxruntime, as a share of the dense model's, measured in turns with it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

from mfcompile.graph import CapturedGraph

REPEATS, WARMUP = 15, 3
"""Turns that a state and the dense model take on one thread, of which the median ratio counts."""


class OnnxClock:
    """Writes graphs as ONNX files and times them against the dense one, run by run in turn.

    Args:
        dense: the graph that others are compared with.

    Raises:
        ExportError: it cannot be written as an ONNX file.
    """

    def __init__(self, dense: CapturedGraph) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mfcompile-comp-")
        self._dense = self._written(dense, "dense")
        self._inputs = dense.example_inputs

    def __enter__(self) -> OnnxClock:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def __call__(self, captured: CapturedGraph) -> float:
        """Seconds of a graph over those of the dense one: the median of ratios of runs that stood side by side."""
        from mfcompile.exporters.latency import compare_latency

        paths = {"dense": self._dense, "state": self._written(captured, "state")}
        return compare_latency(paths, self._inputs, repeats=REPEATS, warmup=WARMUP, threads=1).ratio("state", "dense")

    def _written(self, captured: CapturedGraph, name: str) -> Path:
        from mfcompile.exporters.onnx_model import export_onnx

        path = Path(self._folder.name) / f"{name}.onnx"
        export_onnx(captured, path, format="dense")
        return path
