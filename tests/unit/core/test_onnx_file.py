"""Opening ONNX files: what is mapped, what is registered, and what a broken file is answered with."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mfcompile.errors import InputError
from mfcompile.onnx_file import OnnxFile
from mfcompile.onnx_heads import skeleton
from mfcompile.onnx_wire import field_bytes, read_fields, read_file, read_varint, varint
from tests.onnx_models import save, two_towers, two_towers_inputs


def test_varints_round_trip() -> None:
    for number in (0, 1, 127, 128, 300, 2**31, 2**63 - 1):
        assert read_varint(varint(number), 0) == (number, len(varint(number)))
    with pytest.raises(ValueError, match="too long"):
        read_varint(b"\xff" * 12, 0)


def test_fields_cover_every_byte() -> None:
    data = two_towers().SerializeToString()
    fields = list(read_fields(data, 0, len(data)))
    assert fields[0].start == 0
    assert fields[-1].end == len(data)
    assert all(one.end == two.start for one, two in pairwise(fields))
    assert next(read_fields(field_bytes(5, b"abc"), 0, 5)).payload == 2


@pytest.mark.parametrize("external", [False, True])
def test_records_say_where_values_lie(tmp_path: Path, external: bool) -> None:
    model = two_towers()
    path = save(model, tmp_path / "m.onnx", external=external)
    record = read_file(path)
    assert [file.name for file in record.data_files] == (["m.onnx.data"] if external else [])
    for item in model.graph.initializer:
        found = record.tensors[item.name]
        assert found.dims == tuple(item.dims)
        raw = onnx.numpy_helper.to_array(item).tobytes()
        if found.external is not None:
            data = found.external.path.read_bytes()[found.external.offset :][: found.external.length]
        else:
            assert found.values is not None
            data = path.read_bytes()[slice(*found.values)]
        assert data == raw


def test_a_skeleton_is_the_model_without_the_values_that_were_stripped(tmp_path: Path) -> None:
    model = two_towers()
    record = read_file(save(model, tmp_path / "m.onnx", external=True))
    stripped = onnx.ModelProto.FromString(skeleton(record, frozenset({"text.words.weight"})))
    for old, new in zip(model.graph.initializer, stripped.graph.initializer, strict=True):
        if old.name == "text.words.weight":
            assert not new.raw_data
            assert new.data_location == onnx.TensorProto.EXTERNAL
        else:
            assert np.array_equal(onnx.numpy_helper.to_array(old), onnx.numpy_helper.to_array(new))
    assert stripped.graph.node == model.graph.node


@pytest.mark.parametrize("external", [False, True])
def test_it_computes_what_the_file_computes(tmp_path: Path, external: bool) -> None:
    path = save(two_towers(), tmp_path / "m.onnx", external=external)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = two_towers_inputs()
    expected = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    for name, value in zip(("logits", "image"), expected, strict=True):
        assert np.array_equal(OnnxFile(path)(**inputs)[name].numpy(), value)


def test_parameters_are_in_force_as_they_are_now(tmp_path: Path) -> None:
    file = OnnxFile(save(two_towers(), tmp_path / "m.onnx"))
    before = file(**two_towers_inputs())["logits"]
    head = file.get_submodule("head")
    head.weight = torch.nn.Parameter(torch.zeros_like(file.get_parameter("head.weight")), requires_grad=False)
    assert torch.equal(file(**two_towers_inputs())["logits"], file.get_parameter("head.bias").expand_as(before))
    assert not torch.equal(before, file.get_parameter("head.bias").expand_as(before))


def test_a_copy_runs_and_shares_nothing_that_it_must_not(tmp_path: Path) -> None:
    file = OnnxFile(save(two_towers(), tmp_path / "m.onnx"))
    first = file(**two_towers_inputs())["logits"]
    assert torch.equal(copy.deepcopy(file)(**two_towers_inputs())["logits"], first)


def test_external_weights_cost_no_memory(tmp_path: Path) -> None:
    """Aligned values are mapped from the file, not copied."""
    file = OnnxFile(save(two_towers(), tmp_path / "m.onnx", external=True))
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8") if Path("/proc/self/maps").exists() else ""
    if not mapped:
        pytest.skip("this system does not list what is mapped")
    places = [line.split()[0].split("-") for line in mapped.splitlines() if line.endswith("m.onnx.data")]
    weight = file.get_parameter("text.words.weight")
    assert any(int(start, 16) <= weight.data_ptr() < int(stop, 16) for start, stop in places)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a model at all, but a text of some length", "cannot be read as an ONNX file"),
        (b"\x50\x4b\x03\x04" + bytes(range(200)), "cannot be read as an ONNX file"),
        (bytes(64), "cannot be read as an ONNX file"),
    ],
    ids=["empty", "text", "archive", "zeros"],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        OnnxFile(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    data = two_towers().SerializeToString()
    for length in (3, 40, len(data) // 2, len(data) - 1):
        path = tmp_path / f"{length}.onnx"
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cannot be read as an ONNX file|not valid ONNX"):
            OnnxFile(path)


def test_missing_and_short_external_data_are_named(tmp_path: Path) -> None:
    path = save(two_towers(), tmp_path / "m.onnx", external=True)
    data = tmp_path / "m.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"m\.onnx\.data, bytes .* ends at .*truncated"):
        OnnxFile(path)
    data.unlink()
    with pytest.raises(InputError, match=r"in m\.onnx\.data, and there is no such file .* Put it beside"):
        OnnxFile(path)


def test_a_missing_file_and_an_unknown_opset_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no ONNX file"):
        OnnxFile(tmp_path / "none.onnx")
    model = two_towers()
    model.opset_import[0].version = 999
    with pytest.raises(InputError, match=r"uses opset 999, and the installed onnx .* knows up to"):
        OnnxFile(save(model, tmp_path / "new.onnx"))


def test_an_invalid_graph_is_refused(tmp_path: Path) -> None:
    model = two_towers()
    model.graph.node[0].op_type = "Convolute"
    with pytest.raises(InputError, match=r"not valid ONNX: .*Convolute"):
        OnnxFile(save(model, tmp_path / "m.onnx"))
