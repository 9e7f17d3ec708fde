"""Evaluation by the user's own function, on modules and on ONNX files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mfcompile.cli.console import LineProgress, Terminal
from mfcompile.cli.evaluation import DENSE, ONNX, Evaluation
from mfcompile.cli.onnx_module import OnnxModule
from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs, normalize_inputs
from mfcompile.metrics import read_metrics


class Doubler(nn.Module):
    """y = 2 x, returned beside a number and nested in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.limit = 7

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"inner": (self.scale * x, 3), "y": self.scale * x}

    def encode(self, x: Tensor) -> Tensor:
        return self.scale * x


@pytest.fixture
def module() -> Doubler:
    return Doubler()


@pytest.fixture
def inputs(module: Doubler) -> ExampleInputs:
    return normalize_inputs(module, {"x": torch.ones(2, 3)})


@pytest.fixture
def triples(tmp_path: Path) -> Path:
    """An ONNX file that multiplies by 3, so that it cannot be mistaken for the module."""
    nodes = [helper.make_node("Mul", ["x", "c"], ["inner.0"]), helper.make_node("Mul", ["x", "c"], ["y_out"])]
    shape: list[str | int | None] = ["batch", 3]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("inner.0", "y_out")],
        [numpy_helper.from_array(np.array(3, np.float32), "c")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_onnx_module_has_the_structure_of_the_module(triples: Path, module: Doubler, inputs: ExampleInputs) -> None:
    runs = OnnxModule(triples, module, inputs)
    for output in (runs(torch.ones(5, 3)), runs(x=torch.ones(5, 3))):
        assert torch.equal(output["inner"][0], torch.full((5, 3), 3.0))
        assert torch.equal(output["y"], torch.full((5, 3), 3.0))
        assert output["inner"][1] == 3
    assert next(runs.parameters()).dtype == torch.float32
    assert runs.limit == 7


def test_onnx_module_does_not_pass_off_pytorch_as_onnxruntime(triples: Path, module: Doubler, inputs: ExampleInputs) -> None:
    with pytest.raises(AttributeError, match="an ONNX file has only forward, not encode"):
        OnnxModule(triples, module, inputs).encode(torch.ones(1, 3))


def test_evaluation_of_module_and_file(triples: Path, module: Doubler, inputs: ExampleInputs) -> None:
    evaluation = Evaluation(lambda model: {"sum": model(torch.ones(1, 3))["y"].sum()}, LineProgress(Terminal()))
    evaluation.add(DENSE, module)
    evaluation.add_onnx(triples, module, inputs)
    assert evaluation.metrics == {DENSE: {"sum": 6.0}, ONNX: {"sum": 9.0}}
    assert evaluation.notes == []


def test_a_file_that_cannot_be_evaluated_is_noted(triples: Path, module: Doubler, inputs: ExampleInputs) -> None:
    evaluation = Evaluation(lambda model: model.encode(torch.ones(1, 3)).sum(), LineProgress(Terminal()))
    evaluation.add(DENSE, module)
    evaluation.add_onnx(triples, module, inputs)
    assert evaluation.metrics == {DENSE: {"score": 6.0}}
    assert evaluation.notes == [
        "evaluate does not run on the ONNX file (AttributeError: an ONNX file has only forward, not encode)"
    ]


def test_an_evaluate_that_fails_is_named() -> None:
    evaluation = Evaluation(lambda model: model.missing, LineProgress(Terminal()))
    with pytest.raises(InputError, match=r"evaluate failed on the dense model: AttributeError.*--no-evaluate"):
        evaluation.add(DENSE, Doubler())


def test_the_training_mode_is_given_back(module: Doubler) -> None:
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(model.training)
        return 1.0

    evaluation = Evaluation(evaluate, LineProgress(Terminal()))
    module.train()
    evaluation.add(DENSE, module)
    assert (seen, module.training) == ([False], True)


def test_no_evaluate_does_nothing(module: Doubler) -> None:
    evaluation = Evaluation(None, LineProgress(Terminal()))
    evaluation.add(DENSE, module)
    assert evaluation.metrics == {}


def test_metrics() -> None:
    assert read_metrics(torch.tensor(0.5)) == {"score": 0.5}
    assert read_metrics({"a": np.float32(2), "b": 1}) == {"a": 2.0, "b": 1.0}
    for wrong in (None, "good", {"a": "x"}, [1.0, 2.0]):
        with pytest.raises(InputError, match="it must return a number, or a dict from metric names to numbers"):
            read_metrics(wrong)
