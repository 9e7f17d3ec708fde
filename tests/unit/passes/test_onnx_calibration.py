"""Calibration in onnxruntime against sums that numpy makes of the same activations, and against a module's calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from tests.onnx_models import WIDTH, GraphWriter, save, two_towers, two_towers_inputs


def activations(path: Path, inputs: dict[str, torch.Tensor], names: list[str]) -> dict[str, np.ndarray]:
    """What plain onnxruntime gives for some inner values of a file."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, found, strict=True))


def test_sums_are_those_of_the_activations_without_padding(tmp_path: Path) -> None:
    path = save(two_towers(), tmp_path / "m.onnx")
    inputs = two_towers_inputs()
    captured = mfcompile.capture(path, inputs)
    regions = mfcompile.infer_regions(captured)
    statistics = mfcompile.calibrate(captured, [inputs], regions=regions)
    assert statistics.padding_masks == ("attention_mask",)
    assert statistics.diagnostics == ()
    model = onnx.load(path)
    reads = {node.input[1]: node.input[0] for node in model.graph.node if node.op_type == "MatMul"}
    found = activations(path, inputs, sorted({reads[name] for name in statistics.sites}))
    tokens = inputs["attention_mask"].numpy() != 0
    for name, site in statistics.sites.items():
        rows = found[reads[name]].astype(np.float64)
        is_text = rows.shape[1] == tokens.shape[1]
        counted = rows[tokens] if is_text else rows.reshape(-1, rows.shape[-1])
        assert np.allclose(site.sum_of_squares.numpy(), np.square(counted).sum(0), rtol=1e-6), name
        assert site.token_count == len(counted), name
        assert site.padding_count == (int((~tokens).sum()) if is_text else 0), name
        assert site.sample_count == 2


def test_image_fed_keys_count_every_image_row(tmp_path: Path) -> None:
    captured = mfcompile.capture(save(two_towers(), tmp_path / "m.onnx"), two_towers_inputs())
    sites = mfcompile.calibrate(captured, [two_towers_inputs()]).sites
    assert sites["text.layers.0.cross.k.weight"].token_count == 2 * 4
    assert sites["text.layers.0.cross.q.weight"].token_count == 2 * 6 - 2


def test_batches_may_differ_and_add_up(tmp_path: Path) -> None:
    captured = mfcompile.capture(save(two_towers(), tmp_path / "m.onnx"), two_towers_inputs())
    one, two = two_towers_inputs(1, batch=3), two_towers_inputs(2, batch=1)
    shorter = {**two, "input_ids": two["input_ids"][:, :4], "attention_mask": two["attention_mask"][:, :4]}
    both = mfcompile.calibrate(captured, [one, shorter])
    parts = mfcompile.calibrate(captured, [one]).merge(mfcompile.calibrate(captured, [shorter]))
    assert both.batch_count == parts.batch_count == 2
    for name, site in both.sites.items():
        assert torch.allclose(site.sum_of_squares, parts.sites[name].sum_of_squares, rtol=1e-12)
        assert site.token_count == parts.sites[name].token_count


def test_padding_holds_what_it_holds(tmp_path: Path) -> None:
    """Other tokens at padded places change no sum."""
    captured = mfcompile.capture(save(two_towers(), tmp_path / "m.onnx"), two_towers_inputs())
    inputs = two_towers_inputs()
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])}
    one, two = (mfcompile.calibrate(captured, [batch], padding_mask="attention_mask") for batch in (inputs, other))
    for name, site in one.sites.items():
        assert torch.allclose(site.sum_of_squares, two.sites[name].sum_of_squares, rtol=1e-6), name


def test_a_weight_that_is_called_twice_counts_distinct_samples_once(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", "length", 4)
    writer.input("z", TensorProto.FLOAT, "batch", "length", 4)
    writer.weight("w", 4, 4)
    writer.op("Add", writer.op("MatMul", "x", "w"), writer.op("MatMul", "z", "w"), out="y")
    x = torch.randn(2, 3, 4)
    captured = mfcompile.capture(save(writer.model("y", rank=3), tmp_path / "m.onnx"), {"x": x, "z": x + 1})
    regions = mfcompile.infer_regions(captured, modalities={"x": "text", "z": "text"}, targets=["w"])
    different = mfcompile.calibrate(captured, [{"x": x, "z": x + 1}], regions=regions).sites["w"]
    equal = mfcompile.calibrate(captured, [{"x": x, "z": x.clone()}], regions=regions).sites["w"]
    assert (different.token_count, equal.token_count) == (12, 6)
    assert torch.allclose(equal.sum_of_squares, x.double().square().sum((0, 1)), rtol=1e-6)


def test_half_precision_is_summed_wide(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT16, "batch", 4)
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float16)
    writer.op("Cast", writer.op("MatMul", "x", writer.store("w", weight)), out="y", to=TensorProto.FLOAT)
    x = torch.full((2000, 4), 200.0, dtype=torch.float16)
    captured = mfcompile.capture(save(writer.model("y"), tmp_path / "m.onnx"), {"x": x})
    regions = mfcompile.infer_regions(captured, modalities={"x": "vision"}, targets=["w"])
    assert float(mfcompile.calibrate(captured, [{"x": x}], regions=regions).sites["w"].sum_of_squares[0]) == 2000 * 200.0**2


def test_old_opsets_are_observed_too(tmp_path: Path) -> None:
    inputs = two_towers_inputs()
    sums = []
    for opset in (13, 17):
        model = two_towers()
        if opset == 13:
            model = _without_layer_norm(model)
        captured = mfcompile.capture(save(model, tmp_path / f"{opset}.onnx"), inputs)
        sums.append(mfcompile.calibrate(captured, [inputs]).sites["vision.layers.0.attention.q.weight"])
    assert sums[0].token_count == sums[1].token_count


def _without_layer_norm(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in opset 13, with the norm's scale in place of the norm."""
    model.opset_import[0].version = 13
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            node.op_type = "Mul"
            del node.attribute[:]
            del node.input[2:]
    return model


def test_padding_that_is_lost_is_said(tmp_path: Path) -> None:
    writer = GraphWriter(opset=18)
    writer.input("input_ids", TensorProto.INT64, "batch", "length")
    writer.input("attention_mask", TensorProto.INT64, "batch", "length")
    words = writer.op("Gather", writer.weight("table", 30, WIDTH), "input_ids")
    order = writer.op("Cast", "attention_mask", to=TensorProto.INT64)
    count = writer.op("ReduceMax", order, out="")
    del count
    writer.nodes.append(onnx.helper.make_node("TopK", [words, writer.store("k", np.array([2]))], ["top", "where"], axis=1))
    writer.op("MatMul", "top", writer.weight("w", WIDTH, WIDTH), out="y")
    inputs = two_towers_inputs()
    batch = {"input_ids": inputs["input_ids"] % 30, "attention_mask": inputs["attention_mask"]}
    captured = mfcompile.capture(save(writer.model("y", rank=3), tmp_path / "m.onnx"), batch)
    regions = mfcompile.infer_regions(captured, targets=["w"])
    statistics = mfcompile.calibrate(captured, [batch], regions=regions)
    assert [item.subject for item in statistics.diagnostics] == ["TopK"]
    assert "all rows behind it count as tokens" in statistics.diagnostics[0].reason
    assert statistics.sites["w"].padding_count == 0


def test_refusals(tmp_path: Path) -> None:
    captured = mfcompile.capture(save(two_towers(), tmp_path / "m.onnx"), two_towers_inputs())
    with pytest.raises(CalibrationError, match=r"calibration batch 0 does not fit .*lacks attention_mask"):
        mfcompile.calibrate(captured, [{"pixel_values": torch.rand(2, 3, 8, 8), "input_ids": torch.ones(2, 6)}])
    with pytest.raises(CalibrationError, match=r"onnxruntime failed on calibration batch 1 \(pixel_values"):
        mfcompile.calibrate(captured, [two_towers_inputs(), {**two_towers_inputs(), "input_ids": torch.full((2, 6), 999)}])
    with pytest.raises(InputError, match="observed by onnxruntime"):
        mfcompile.calibrate(captured, [two_towers_inputs()], observe="module")
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        mfcompile.calibrate(captured, [{**two_towers_inputs(), "pixel_values": torch.full((2, 3, 8, 8), float("nan"))}])


def test_random_inputs_are_called_random(tmp_path: Path) -> None:
    captured = mfcompile.capture(save(two_towers(), tmp_path / "m.onnx"))
    assert captured.specialised[0].startswith("random inputs")
    regions = mfcompile.infer_regions(captured)
    assert regions.diagnostics[0].subject == "example inputs"
    statistics = mfcompile.calibrate(captured, None, regions=regions)
    assert statistics.source == "random inputs"
    ids = captured.example_inputs.tensors()["input_ids"]
    assert int(ids.max()) < 50
    assert len(set(ids.flatten().tolist())) > 2
    assert bool((captured.example_inputs.tensors()["attention_mask"] == 1).all())
