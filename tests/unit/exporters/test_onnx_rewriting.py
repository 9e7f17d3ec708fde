"""Masks written into a file: nothing else changes, and what runs is the original with zeros."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import mfcompile
from mfcompile import runtime
from mfcompile.compile import CompiledModel
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters import weight_placement
from mfcompile.exporters.packing import EncodedWeight, decode
from mfcompile.exporters.stored_weights import read_weights
from tests.onnx_models import GraphWriter, save, two_towers, two_towers_inputs
from tests.unit.exporters import toy_session


def compiled(path: Path, sparsity: float = 0.63) -> CompiledModel:
    return mfcompile.compile_pruned(str(path), sparsity=sparsity, calibration=[two_towers_inputs()])


def check_only_masked_values_differ(before: onnx.ModelProto, after: onnx.ModelProto, masks: mfcompile.MaskSet) -> None:
    """Field by field; masked values are +0.0 where pruned and bit for bit the old ones elsewhere."""
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        if old.name not in masks:
            assert old == new
            continue
        mask = masks[old.name].numpy()
        values, dense = onnx.numpy_helper.to_array(new), onnx.numpy_helper.to_array(old)
        assert np.array_equal(values[mask].view(np.int32), dense[mask].view(np.int32))
        assert not values[~mask].view(np.int32).any()
        old.ClearField("raw_data")
        new.ClearField("raw_data")
        assert old == new
    del before.graph.initializer[:]
    del after.graph.initializer[:]
    assert before == after


@pytest.mark.parametrize("external", [False, True])
def test_dense_changes_masked_values_and_nothing_else(tmp_path: Path, external: bool) -> None:
    path = save(two_towers(), tmp_path / "model.onnx", external=external)
    model = compiled(path)
    artifact = model.export_onnx(tmp_path / "out" / "model.onnx", format="dense")
    assert artifact.size_bytes == artifact.dense_size_bytes
    assert [file.name for file in artifact.files] == ["model.onnx", *(["model.onnx.data"] if external else [])]
    if external:
        assert artifact.path.read_bytes() == path.read_bytes()
    check_only_masked_values_differ(onnx.load(path), onnx.load(artifact.path), model.masks)
    parity = model.verify(artifact)
    assert parity.passed
    assert parity.max_abs_diff == 0.0


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_packed_decodes_to_the_dense_file(tmp_path: Path, external: bool, values: str) -> None:
    path = save(two_towers(), tmp_path / "model.onnx", external=external)
    model = compiled(path)
    dense = model.export_onnx(tmp_path / "dense" / "model.onnx", format="dense")
    packed = model.export_onnx(tmp_path / "packed" / "model.onnx", values=values, inline=True)
    assert sum(item.stored_bytes for item in packed.encodings) < 0.55 * sum(item.dense_bytes for item in packed.encodings)
    parity = model.verify(packed)
    assert parity.passed
    assert (parity.max_abs_diff == 0.0) is (values == "fp32")
    before, after = onnx.load(dense.path), onnx.load(packed.path)
    kept = [item for item in before.graph.initializer if item.name not in model.masks]
    assert [item for item in after.graph.initializer if item.name in {each.name for each in kept}] == kept
    count = len(after.graph.node) - len(before.graph.node)
    assert list(after.graph.node)[count:] == list(before.graph.node)
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    metadata = {item.key: item.value for item in after.metadata_props}
    assert metadata["license"] == "none"
    assert metadata["mfcompile.masks_sha256"] == model.masks.digest()
    if external:
        assert (packed.path.parent / "model.onnx.data").stat().st_size < (path.parent / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("external", [False, True])
def test_layers_of_a_file_become_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
    """Its weights are stored (in, out): the tensors hold their transposes, which the kernels read."""
    monkeypatch.setattr(weight_placement, "least_sparsity", lambda *_: 0.0)
    path = save(two_towers(), tmp_path / "model.onnx", external=external)
    model = compiled(path)
    dense = model.export_onnx(tmp_path / "dense" / "model.onnx", format="dense")
    packed = model.export_onnx(tmp_path / "packed" / "model.onnx")
    onnx.checker.check_model(packed.path)
    layers = [item.fqn for item in packed.encodings if item.is_sparse]
    assert layers == [item.fqn for item in packed.encodings if item.encoding != "dense"]
    after = onnx.load(packed.path)
    nodes = [node for node in after.graph.node if node.domain == "mfcompile"]
    assert {node.name for node in nodes} == set(layers)
    assert {node.op_type for node in after.graph.node} <= {node.op_type for node in onnx.load(path).graph.node} | {
        node.op_type for node in nodes
    }
    stored = read_weights({item.key: item.value for item in after.metadata_props})
    assert set(stored) == set(layers)
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in after.graph.initializer}
    plain = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(dense.path).graph.initializer}
    for name, item in stored.items():
        assert (item.is_transposed, item.is_sparse) == (True, True)
        gaps, values = (tensors[part] for part in item.tensors)
        decoded = decode(EncodedWeight(name, item.encoding, item.shape[::-1], np.dtype(np.float32), gaps, values))
        assert decoded.T.tobytes() == plain[name].tobytes()
    feeds = {name: tensor.numpy() for name, tensor in two_towers_inputs().items()}
    outputs = toy_session.run(dense.path, feeds)
    assert all(value.tobytes() == outputs[name].tobytes() for name, value in toy_session.run(packed.path, feeds).items())
    assert toy_session.optimised_operators(packed.path, tmp_path) == toy_session.optimised_operators(dense.path, tmp_path)
    parity = model.verify(packed)
    assert parity.passed
    assert (parity.sparse is not None) is runtime.is_available()
    if parity.sparse is not None:
        assert 0 < parity.sparse.max_abs_diff < 1e-4


def test_a_file_with_functions_of_the_package_gets_plain_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_placement, "least_sparsity", lambda *_: 0.0)
    original = two_towers()
    original.opset_import.add(domain="mfcompile", version=1)
    model = compiled(save(original, tmp_path / "model.onnx"))
    packed = model.export_onnx(tmp_path / "packed" / "model.onnx")
    assert {item.is_sparse for item in packed.encodings} == {False}
    assert model.verify(packed).passed


def test_without_masks_the_file_is_copied(tmp_path: Path) -> None:
    path = save(two_towers(), tmp_path / "model.onnx", external=True)
    captured = mfcompile.capture(path, two_towers_inputs())
    artifact = mfcompile.export_onnx(captured, tmp_path / "copy" / "m.onnx", format="dense")
    for old, new in ((path, artifact.path), (tmp_path / "model.onnx.data", tmp_path / "copy" / "model.onnx.data")):
        assert old.read_bytes() == new.read_bytes()


def test_unknown_fields_and_odd_order_survive(tmp_path: Path) -> None:
    """A field that no version of onnx knows, and metadata in front of the graph."""
    data = two_towers().SerializeToString()
    unknown = b"\xfa\x3e\x03abc"  # field 1007, three bytes
    path = tmp_path / "model.onnx"
    path.write_bytes(unknown + data)
    model = compiled(path)
    for format in ("dense", "packed"):
        artifact = model.export_onnx(tmp_path / format / "model.onnx", format=format)
        assert artifact.path.read_bytes().startswith(unknown)
        assert model.verify(artifact).passed


def constant_and_float16(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """One weight in a Constant node, one in float16 that protobuf holds as integers."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 32)
    random = np.random.default_rng(0)
    first = random.standard_normal((32, 32)).astype(np.float32)
    writer.op("Constant", out="first", value=onnx.numpy_helper.from_array(first))
    half = random.standard_normal((32, 32)).astype(np.float16)
    writer.initializers.append(onnx.helper.make_tensor("second", TensorProto.FLOAT16, half.shape, half.flatten().tolist()))
    hidden = writer.op("MatMul", "x", "first")
    wide = writer.op("MatMul", writer.op("Cast", hidden, to=TensorProto.FLOAT16), "second")
    writer.op("Cast", wide, out="y", to=TensorProto.FLOAT)
    assert len(writer.initializers[0].int32_data) or writer.initializers[0].raw_data
    return save(writer.model("y"), tmp_path / "m.onnx"), {"x": torch.randn(3, 32)}


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_other_ways_to_store_a_weight(tmp_path: Path, format: str) -> None:
    path, inputs = constant_and_float16(tmp_path)
    model = mfcompile.compile_pruned(
        str(path), inputs, calibration=[inputs], modalities={"x": "vision"}, targets=["first", "second"], sparsity=0.7
    )
    assert set(model.masks) == {"first", "second"}
    artifact = model.export_onnx(tmp_path / "out.onnx", format=format)
    assert model.verify(artifact).passed
    before, after = onnx.load(path), onnx.load(artifact.path)
    if format == "dense":
        assert [node.op_type for node in before.graph.node] == [node.op_type for node in after.graph.node]


def test_a_file_is_not_overwritten_by_its_own_pruning(tmp_path: Path) -> None:
    path = save(two_towers(), tmp_path / "model.onnx", external=True)
    model = compiled(path)
    for target in (path, tmp_path / "other.onnx"):  # the data file of the second has the name of the original's
        with pytest.raises(InputError, match="write to another folder"):
            model.export_onnx(target, format="dense")


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = save(two_towers(), tmp_path / "model.onnx")
    model = compiled(path)
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(InputError, match="has changed since it was read"):
        model.export_onnx(tmp_path / "out.onnx")


def test_old_files_are_written_dense_only(tmp_path: Path) -> None:
    writer = GraphWriter(opset=9, ir_version=3)
    writer.input("x", TensorProto.FLOAT, "batch", 32)
    writer.input("w", TensorProto.FLOAT, 32, 32)  # as files of that age have it
    writer.op("MatMul", "x", writer.weight("w", 32, 32), out="y")
    inputs = {"x": torch.randn(3, 32)}
    path = save(writer.model("y"), tmp_path / "m.onnx")
    model = mfcompile.compile_pruned(str(path), inputs, modalities={"x": "vision"}, targets=["w"])
    with pytest.raises(InputError, match=r"opset 9, IR version 3.*--format dense"):
        model.export_onnx(tmp_path / "packed.onnx")
    assert model.verify(model.export_onnx(tmp_path / "dense.onnx", format="dense")).passed


def test_names_of_decode_nodes_give_way(tmp_path: Path) -> None:
    """A file that uses the names which decode nodes would have."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 32)
    value = writer.op("MatMul", "x", writer.weight("w", 32, 32), out="w.values")
    writer.op("Relu", writer.op("Relu", value, out="zeros.float.1024"), out="flat")
    inputs = {"x": torch.randn(3, 32)}
    path = save(writer.model("flat"), tmp_path / "m.onnx")
    model = mfcompile.compile_pruned(str(path), inputs, modalities={"x": "vision"}, targets=["w"])
    assert model.verify(model.export_onnx(tmp_path / "packed.onnx")).passed


def test_shared_bytes_are_refused_dense_and_parted_packed(tmp_path: Path) -> None:
    """Two initializers that lie in the same bytes of the data file, of which one is masked."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 32)
    for name in ("a", "b"):
        writer.weight(name, 32, 32)
    writer.op("Add", writer.op("MatMul", "x", "a"), writer.op("MatMul", "x", "b"), out="y")
    path = save(writer.model("y"), tmp_path / "m.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[1].external_data.MergeFrom([])
    for entry in model.graph.initializer[1].external_data:
        if entry.key == "offset":
            entry.value = "0"
    path.write_bytes(model.SerializeToString())
    inputs = {"x": torch.randn(3, 32)}
    pruned = mfcompile.compile_pruned(str(path), inputs, modalities={"x": "vision"}, targets=["a"])
    with pytest.raises(ExportError, match="lie in the same bytes"):
        pruned.export_onnx(tmp_path / "dense" / "m.onnx", format="dense")
    assert pruned.verify(pruned.export_onnx(tmp_path / "packed" / "m.onnx")).passed


def test_bad_arguments(tmp_path: Path) -> None:
    model = compiled(save(two_towers(), tmp_path / "model.onnx"))
    with pytest.raises(InputError, match="choose one of packed, dense"):
        model.export_onnx(tmp_path / "o.onnx", format="zip")
    with pytest.raises(InputError, match="is a directory"):
        model.export_onnx(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
