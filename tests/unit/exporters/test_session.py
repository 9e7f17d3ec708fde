from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.exporters.session import TORCH_DTYPES, make_feeds, open_session, run_session
from mfcompile.inputs import ExampleInputs


def identity_model(path: Path, kind: int, *, operator: str = "Identity") -> Path:
    x, y = (helper.make_tensor_value_info(name, kind, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def run(path: Path, x: Tensor) -> Tensor:
    session = open_session(path, threads=1)
    feeds, _ = make_feeds(session, ExampleInputs((x,), {}, ("x",)))
    return run_session(session, feeds)["y"]


@pytest.mark.parametrize(
    ("kind", "x"),
    [
        (TensorProto.FLOAT, torch.tensor([1.5, -0.0, float("nan")])),
        (TensorProto.DOUBLE, torch.tensor([1.5], dtype=torch.float64)),
        (TensorProto.FLOAT16, torch.tensor([1.5, 65504.0], dtype=torch.float16)),
        (TensorProto.BFLOAT16, torch.tensor([1.5, -3e38], dtype=torch.bfloat16)),
        (TensorProto.INT64, torch.tensor([2**40])),
        (TensorProto.INT32, torch.tensor([-5], dtype=torch.int32)),
        (TensorProto.UINT8, torch.tensor([255], dtype=torch.uint8)),
        (TensorProto.BOOL, torch.tensor([True, False])),
    ],
)
def test_every_dtype_goes_in_and_out_unchanged(tmp_path: Path, kind: int, x: Tensor) -> None:
    y = run(identity_model(tmp_path / "m.onnx", kind), x)
    assert y.dtype == x.dtype
    assert y.view(torch.uint8).tolist() == x.view(torch.uint8).tolist()


def test_inputs_are_converted_to_the_dtype_that_the_graph_declares(tmp_path: Path) -> None:
    path = identity_model(tmp_path / "m.onnx", TensorProto.INT64)
    assert run(path, torch.tensor([3], dtype=torch.int32)).dtype == torch.int64
    strided = torch.arange(6).reshape(2, 3).T[1]
    assert run(path, strided).tolist() == strided.tolist()


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no ONNX file at .*missing\.onnx"):
        open_session(tmp_path / "missing.onnx")
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"onnxruntime .* cannot load .*m\.onnx: .*export it again"):
        open_session(path)
    identity_model(path, TensorProto.FLOAT, operator="NoSuchOperator")
    with pytest.raises(InputError, match="NoSuchOperator"):
        open_session(path)


def test_inputs_that_cannot_be_fed(tmp_path: Path) -> None:
    session = open_session(identity_model(tmp_path / "m.onnx", TensorProto.STRING))
    assert session.get_inputs()[0].type not in TORCH_DTYPES
    with pytest.raises(InputError, match=r"input x of the ONNX graph is a tensor\(string\)"):
        make_feeds(session, ExampleInputs((torch.zeros(1),), {}, ("x",)))
