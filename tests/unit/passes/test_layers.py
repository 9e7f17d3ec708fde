"""Layers found in graphs whose nodes name no submodules."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.passes.layers import LAYERS_FOUND, NO_LAYERS
from tests.onnx_models import WIDTH, GraphWriter, save, two_towers, two_towers_inputs, without_names


def captured_without_names(
    model: onnx.ModelProto, folder: Path, inputs: dict[str, torch.Tensor]
) -> tuple[CapturedGraph, dict[str, str]]:
    renamed, names = without_names(model)
    given = {names[name]: tensor for name, tensor in inputs.items()}
    return mfcompile.capture(save(renamed, folder / "numbers.onnx"), given), names


def blocks(captured: CapturedGraph, names: dict[str, str]) -> dict[str, str | None]:
    """Weight, under its old name -> the block that it was put into."""
    old = {new: name for name, new in names.items()}
    modalities = {spec.name: "vision" if len(spec.shape) > 2 else "text" for spec in captured.inputs}
    evidence = mfcompile.infer_regions(captured, modalities=modalities).evidence
    return {old[fqn]: uses[0].block for fqn, uses in evidence.items()}


def test_self_attention_cross_attention_and_feed_forward_are_one_layer(tmp_path: Path) -> None:
    captured, names = captured_without_names(two_towers(), tmp_path, two_towers_inputs())
    assert LAYERS_FOUND in captured.specialised
    found: dict[str | None, set[str]] = {}
    for name, block in blocks(captured, names).items():
        found.setdefault(block, set()).add(".".join(name.split(".")[:3]))
    assert found.pop(None) == {"head.weight", "vision.patches.weight"}
    assert sorted(next(iter(group)) for group in found.values()) == [
        "text.layers.0",
        "text.layers.1",
        "vision.layers.0",
        "vision.layers.1",
    ]
    assert all(len(group) == 1 for group in found.values())


def test_named_files_keep_their_names(tmp_path: Path) -> None:
    captured = mfcompile.capture(save(two_towers(), tmp_path / "m.onnx"), two_towers_inputs())
    assert LAYERS_FOUND not in captured.specialised


def residual_stack(count: int) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """Layers without attention: two linear layers and a sum each, and a head."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 5, WIDTH)
    value = "x"
    for index in range(count):
        hidden = writer.op("Relu", writer.linear(f"b{index}.up", value, 24, WIDTH))
        value = writer.op("Add", value, writer.linear(f"b{index}.down", hidden, WIDTH, 24))
    writer.op("Identity", writer.linear("head", value, 3, WIDTH), out="y")
    return writer.model("y", rank=3), {"x": torch.randn(2, 5, WIDTH)}


def test_residual_sums_close_layers_without_attention(tmp_path: Path) -> None:
    captured, names = _residual(3, tmp_path)
    found = blocks(captured, names)
    assert [found[f"b{index}.{part}.weight"] for index in range(3) for part in ("up", "down")] == [
        path for index in range(3) for path in [f"stack_0.{index}"] * 2
    ]
    assert found["head.weight"] is None


def test_a_single_layer_without_attention_is_none(tmp_path: Path) -> None:
    captured, names = _residual(1, tmp_path)
    assert NO_LAYERS in captured.specialised
    assert set(blocks(captured, names).values()) == {None}


def _residual(count: int, folder: Path) -> tuple[CapturedGraph, dict[str, str]]:
    model, inputs = residual_stack(count)
    return captured_without_names(model, folder, inputs)
