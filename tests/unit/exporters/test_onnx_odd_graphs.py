"""ONNX files with constructs that are no plain linear layer: pruned, written both ways, and held to the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

import mfcompile
from tests.onnx_models import GraphWriter, save

Case = tuple[GraphWriter, dict[str, Tensor], str, int]


def convolution() -> Case:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 3, 8, 8)
    writer.op("Conv", "x", writer.weight("w", 16, 3, 1, 1), out="y")
    return writer, {"x": torch.rand(2, 3, 8, 8)}, "w", 4


def experts() -> Case:
    """One matrix for every place of the first dimension."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, 3, "rows", 8)
    writer.op("MatMul", "x", writer.weight("w", 3, 8, 16), out="y")
    return writer, {"x": torch.randn(3, 5, 8)}, "w", 3


def sequence() -> Case:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 8)
    writer.nodes.append(helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1, keepdims=1))
    part = writer.op("SequenceAt", "parts", writer.store("first", np.array(0)))
    writer.op("Add", writer.op("MatMul", "x", writer.weight("w", 8, 8)), part, out="y")
    return writer, {"x": torch.randn(2, 8)}, "w", 2


def behind_a_loop() -> Case:
    """The body reads a weight that stays dense; the one behind it is pruned."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 8)
    writer.weight("inner", 8, 8)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("MatMul", ["value", "inner"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, [None, None]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [None, None]),
        ],
    )
    limits = writer.store("count", np.array(2)), writer.store("start", np.array(True))
    writer.nodes.append(helper.make_node("Loop", [*limits, "x"], ["looped"], body=body))
    writer.op("MatMul", "looped", writer.weight("w", 8, 8), out="y")
    return writer, {"x": torch.randn(2, 8)}, "w", 2


def brain_floats() -> Case:
    """A weight in bfloat16 that is cast before it is used."""
    writer = GraphWriter(opset=19, ir_version=9)
    writer.input("x", TensorProto.FLOAT, "batch", 32)
    values = np.random.default_rng(0).standard_normal(1024).tolist()
    writer.initializers.append(helper.make_tensor("w", TensorProto.BFLOAT16, [32, 32], values))
    writer.op("MatMul", "x", writer.op("Cast", "w", to=TensorProto.FLOAT), out="y")
    return writer, {"x": torch.randn(4, 32)}, "w", 2


def a_vector() -> Case:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, 8)
    writer.op("MatMul", "x", writer.weight("w", 8, 32), out="y")
    return writer, {"x": torch.randn(8)}, "w", 1


@pytest.mark.parametrize("make", [convolution, experts, sequence, behind_a_loop, brain_floats, a_vector])
def test_it_is_pruned_and_computes_what_the_original_with_zeros_computes(make: Callable[[], Case], tmp_path: Path) -> None:
    writer, inputs, target, rank = make()
    path = save(writer.model("y", rank=rank), tmp_path / "model.onnx")
    captured = mfcompile.capture(path, inputs)
    regions = mfcompile.infer_regions(captured, modalities={"x": "vision"}, targets=[target])
    assert {site.fqn for site in regions.pruned_sites} == {target}
    statistics = mfcompile.calibrate(captured, [inputs], regions=regions)
    masks = mfcompile.select_masks(captured, regions, statistics, sparsity=0.6)
    assert masks.kept_count == masks.weight_count - int(0.6 * masks.weight_count)
    pruned = mfcompile.apply_masks(captured, masks)
    for format in ("packed", "dense"):
        artifact = mfcompile.export_onnx(pruned, tmp_path / format / "model.onnx", format=format)
        parity = mfcompile.verify(artifact, pruned)
        assert parity.passed
        assert all(output.max_abs_diff == 0.0 for output in parity.outputs)


def test_sums_of_a_convolution_and_of_experts(tmp_path: Path) -> None:
    for make, expected in (
        (convolution, lambda x: [x.square().sum((0, 2, 3))]),
        (experts, lambda x: list(x.square().sum(1))),
    ):
        writer, inputs, target, rank = make()
        captured = mfcompile.capture(save(writer.model("y", rank=rank), tmp_path / "m.onnx"), inputs)
        regions = mfcompile.infer_regions(captured, modalities={"x": "vision"}, targets=[target])
        sites = mfcompile.calibrate(captured, [inputs], regions=regions).sites.values()
        wanted = expected(inputs["x"].double())  # type: ignore[no-untyped-call]
        assert len(sites) == len(wanted)
        for site, sums in zip(sites, wanted, strict=True):
            assert torch.allclose(site.sum_of_squares, sums, rtol=1e-6)


@pytest.mark.parametrize("also", ["unread", "w"], ids=["a tensor that nobody reads", "the weight is an output as well"])
def test_stored_tensors_that_are_no_operands(also: str, tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 32)
    writer.weight("unread", 16, 16)
    writer.op("MatMul", "x", writer.weight("w", 32, 32), out="y")
    outputs = ("y", "w") if also == "w" else ("y",)
    inputs = {"x": torch.randn(3, 32)}
    path = save(writer.model(*outputs), tmp_path / "model.onnx")
    model = mfcompile.compile_pruned(str(path), inputs, modalities={"x": "vision"}, targets=["w"])
    for format in ("packed", "dense"):
        assert model.verify(model.export_onnx(tmp_path / format / "model.onnx", format=format)).passed
    saved = model.save(tmp_path / "saved")
    assert {file.name for file in saved.iterdir()} == {"masks.safetensors", "model.onnx", "report.json"}
