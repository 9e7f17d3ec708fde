from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mfcompile.errors import InputError
from mfcompile.exporters.latency import LatencyComparison, compare_latency
from mfcompile.inputs import ExampleInputs

INPUTS = ExampleInputs((torch.randn(64, 256),), {}, ("x",))


def products(path: Path, count: int) -> Path:
    """``count`` matrix products in a row."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 256]) for name in ("x", "y"))
    names = ["x", *(f"h{i}" for i in range(count - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in itertools.pairwise(names)]
    weight = numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_more_work_takes_longer(tmp_path: Path) -> None:
    paths = {"one": products(tmp_path / "a.onnx", 1), "forty": products(tmp_path / "b.onnx", 40)}
    result = compare_latency(paths, INPUTS, repeats=7, warmup=1, threads=1)
    assert {name: len(times) for name, times in result.seconds.items()} == {"one": 7, "forty": 7}
    assert all(time > 0 for times in result.seconds.values() for time in times)
    assert result.ratio("forty", "one") > 4
    assert result.ratio("one", "one") == 1.0


def test_medians_and_paired_ratios() -> None:
    result = LatencyComparison({"a": (1.0, 10.0, 3.0), "b": (2.0, 20.0, 3.0)})
    assert result.median("a") == 3.0
    assert result.ratio("a", "b") == 0.5


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = products(tmp_path / "a.onnx", 1)
    with pytest.raises(InputError, match="nothing to measure"):
        compare_latency({}, INPUTS, repeats=1, warmup=0)
    with pytest.raises(InputError, match="repeats=0"):
        compare_latency({"a": path}, INPUTS, repeats=0, warmup=0)
    with pytest.raises(InputError, match="no ONNX file"):
        compare_latency({"a": tmp_path / "no.onnx"}, INPUTS, repeats=1, warmup=0)
