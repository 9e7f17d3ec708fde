from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfcompile.exporters import onnx_files
from mfcompile.exporters.onnx_files import needs_external_data, plan_files, strip_metadata, write_files, write_model


def model_of(*arrays: np.ndarray) -> ir.Model:
    """A model that adds up its initializers w0, w1, ...."""
    x = ir.val("x", ir.DataType.FLOAT, [])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="g")
    total = x
    for number, array in enumerate(arrays):
        value = ir.val(f"w{number}", const_value=ir.tensor(array, name=f"w{number}"))
        graph.initializers.add(value)
        node = ir.node("Sum", [total, value], metadata_props={"pkg.torch.onnx.stack_trace": "/home/user/model.py"})
        graph.append(node)
        total = node.outputs[0]
        total.name = f"t{number}"
    total.dtype, total.shape = ir.DataType.FLOAT, ir.Shape([None])
    graph.outputs.append(total)
    return ir.Model(graph, ir_version=10)


RNG = np.random.default_rng(0)
ARRAYS = [
    RNG.standard_normal(shape).astype(dtype)
    for shape, dtype in [((), "f4"), ((0,), "f4"), ((7,), "f4"), ((300,), "f8"), ((33, 65), "f4"), ((600, 600), "f4")]
]


@pytest.mark.parametrize("data_name", [None, "m.onnx.data"])
def test_what_is_written_is_what_was_planned_and_reads_back(tmp_path: Path, data_name: str | None) -> None:
    model = model_of(*ARRAYS)
    path, data_path = tmp_path / "m.onnx", None if data_name is None else tmp_path / data_name
    layout = plan_files(model, data_name)
    write_files(layout, path, data_path)
    assert layout.model_size_bytes == path.stat().st_size
    assert layout.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    read = ir.load(path)
    assert list(read.graph.initializers) == [f"w{number}" for number in range(len(ARRAYS))]
    for value, array in zip(read.graph.initializers.values(), ARRAYS, strict=True):
        assert value.const_value is not None
        assert value.const_value.numpy().tobytes() == array.tobytes()
        assert value.const_value.numpy().shape == array.shape
        is_external = isinstance(value.const_value, ir.ExternalTensor)
        assert is_external == (data_name is not None and array.nbytes >= onnx_files.EXTERNAL_LEAST_BYTES)
    onnx.checker.check_model(str(path))


def test_planning_leaves_the_model_as_it_was() -> None:
    model = model_of(*ARRAYS)
    before = ir.to_proto(model).SerializeToString()
    plan_files(model, "data")
    assert ir.to_proto(model).SerializeToString() == before


def test_large_external_tensors_start_on_a_page() -> None:
    offsets = {item.tensor.name: item.offset for item in plan_files(model_of(*ARRAYS), "data").tensors}
    assert offsets["w0"] is None
    assert offsets["w5"] is not None
    assert offsets["w5"] % 4096 == 0
    assert offsets["w5"] > 0


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 3000)), min_size=1, max_size=6))
def test_tensors_inside_of_the_file_are_aligned_too(tensors: list[tuple[int, int]]) -> None:
    model = model_of(*(np.full(size, number, np.uint8) for number, (_, size) in enumerate(tensors)))
    for (length, _), value in zip(tensors, list(model.graph.initializers.values()), strict=True):
        value.name = f"{value.name}.{'n' * length}"
    layout = plan_files(model, None)
    file = io.BytesIO()
    write_model(layout, file)
    data = file.getvalue()
    assert len(data) == layout.model_size_bytes
    proto = onnx.ModelProto.FromString(data)
    for number, (item, (_, size)) in enumerate(zip(proto.graph.initializer, tensors, strict=True)):
        assert item.raw_data == bytes([number]) * size
        assert not item.doc_string.strip()
        if size >= onnx_files.EXTERNAL_LEAST_BYTES:
            assert any(data[place : place + size] == item.raw_data for place in range(0, len(data), 64))
        else:
            assert not item.doc_string


def test_external_data_is_needed_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [ir.tensor(np.zeros(1000, np.uint8)) for _ in range(3)]
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT_BYTES", 3000)
    assert not needs_external_data(tensors)
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT_BYTES", 2999)
    assert needs_external_data(tensors)
    assert not any(needs_external_data([ir.tensor(np.zeros(10))]) for _ in range(1))


def test_a_tensor_of_another_size_than_planned_is_refused(tmp_path: Path) -> None:
    model = model_of(np.zeros(4, np.float32))
    short = ir.LazyTensor(lambda: ir.tensor(np.zeros(3, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape([4]), name="w0")
    model.graph.initializers["w0"].const_value = short
    with pytest.raises(ValueError, match="w0 has 12 bytes; 16 were planned"):
        write_files(plan_files(model, None), tmp_path / "m.onnx", None)


def test_stack_traces_are_removed() -> None:
    model = model_of(*ARRAYS)
    assert b"/home/user" in ir.to_proto(model).SerializeToString()
    strip_metadata(model)
    assert b"/home/user" not in ir.to_proto(model).SerializeToString()


@given(st.integers(0, 2**63 - 1))
def test_varint_is_protobufs(number: int) -> None:
    field_of_dims = b"\x08"  # protobuf reads it back as the dimension of a tensor
    assert list(onnx.TensorProto.FromString(field_of_dims + onnx_files._varint(number)).dims) == [number]
