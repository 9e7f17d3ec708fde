"""Inputs that are made up for a file, and those that a user gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from mfcompile.errors import InputError
from mfcompile.frontends.onnx_synthesis import looked_up_rows, synthesize
from mfcompile.onnx_file import OnnxFile
from mfcompile.onnx_inputs import name_inputs
from tests.onnx_models import WORDS, GraphWriter, save, two_towers, two_towers_inputs


def test_ids_lie_in_their_table_and_images_have_the_size_of_the_file(tmp_path: Path) -> None:
    file = OnnxFile(save(two_towers(), tmp_path / "m.onnx"))
    assert looked_up_rows(file.proto) == {"input_ids": WORDS}
    found = synthesize(file).tensors()
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "pixel_values": (2, 3, 8, 8),
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
    }
    assert float(found["pixel_values"].std()) > 0.5
    assert torch.equal(found["pixel_values"], synthesize(file).tensors()["pixel_values"])


def test_positions_count_and_types_are_zero(tmp_path: Path) -> None:
    writer = GraphWriter()
    for name, rows in (("a", 40), ("b", 16), ("c", 2)):
        writer.input(name, TensorProto.INT64, "batch", "length")
        writer.op(
            "Gather", writer.weight(f"{name}.table", rows, 4), writer.op("Cast", name, to=TensorProto.INT64), out=f"{name}.rows"
        )
    writer.op("Sum", "a.rows", "b.rows", "c.rows", out="y")
    found = synthesize(OnnxFile(save(writer.model("y", rank=3), tmp_path / "m.onnx"))).tensors()
    assert len(set(found["a"].flatten().tolist())) > 4
    assert found["b"].tolist() == [list(range(8))] * 2
    assert not found["c"].any()


def test_images_of_free_size_are_tried(tmp_path: Path) -> None:
    """The graph adds positions of 16 patches: only an image of 32 pixels has as many."""
    writer = GraphWriter()
    writer.input("pixel_values", TensorProto.FLOAT, "batch", 3, "height", "width")
    patches = writer.op("Conv", "pixel_values", writer.weight("k", 4, 3, 8, 8), strides=[8, 8], kernel_shape=[8, 8])
    rows = writer.op("Reshape", patches, writer.store("shape", np.array([0, 4, -1])))
    writer.op("Add", rows, writer.weight("positions", 4, 16), out="y")
    found = synthesize(OnnxFile(save(writer.model("y", rank=3), tmp_path / "m.onnx"))).tensors()
    assert tuple(found["pixel_values"].shape) == (2, 3, 32, 32)


def test_what_cannot_be_made_up_is_asked_for(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", "odd")
    writer.op("MatMul", "x", writer.weight("w", 5, 4), out="y")
    with pytest.raises(InputError, match=r"no example inputs could be made up .*--calibration batches\.npz, arrays named x"):
        synthesize(OnnxFile(save(writer.model("y"), tmp_path / "m.onnx")))


def test_given_inputs_take_any_form(tmp_path: Path) -> None:
    file = OnnxFile(save(two_towers(), tmp_path / "m.onnx"))
    inputs = two_towers_inputs()
    forms = (
        inputs,
        {name: tensor.numpy() for name, tensor in inputs.items()},
        tuple(inputs.values()),
        {name: tensor.tolist() for name, tensor in inputs.items()},
    )
    for form in forms:
        found = name_inputs(file, form, what="the inputs").tensors()
        assert list(found) == list(inputs)
        assert all(torch.equal(found[name], inputs[name]) for name in inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.rand(2, 6)}, "input_ids is torch.float32, the file takes torch.int64"),
        ({"labels": torch.ones(2)}, "names labels, which it does not take"),
        ({"attention_mask": None}, "lacks attention_mask"),
        ({"attention_mask": "all"}, "attention_mask is a str"),
    ],
)
def test_unfit_inputs_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = OnnxFile(save(two_towers(), tmp_path / "m.onnx"))
    with pytest.raises(InputError, match=message):
        name_inputs(file, {**two_towers_inputs(), **change}, what="the inputs")
