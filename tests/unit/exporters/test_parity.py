from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import InputError, ParityError
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.exporters.parity import (
    _compare,
    _Comparison,
    comparable_batch_sizes,
    default_tolerance,
    make_cases,
    raise_on_failure,
    verify,
)
from mfcompile.exporters.tolerances import INT8_SHARE, WORLDS_SHARE
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import ExampleInputs, normalize_inputs
from tests.unit.exporters.toy_models import (
    TWO_TOWER_AXES,
    TwoTower,
    capture,
    masked,
    random_masks,
    seeded,
    two_tower_inputs,
)

RTOL, ATOL = default_tolerance("fp32")


@pytest.fixture(scope="module")
def captured() -> CapturedGraph:
    module = seeded(TwoTower)
    return capture(module, two_tower_inputs(), TWO_TOWER_AXES, random_masks(module, 0.37))


@pytest.fixture(scope="module")
def pruned(captured: CapturedGraph) -> nn.Module:
    assert captured.masks is not None
    return masked(captured.module, captured.masks)


@pytest.fixture(scope="module")
def artifact(captured: CapturedGraph, tmp_path_factory: pytest.TempPathFactory) -> ExportedArtifact:
    return export_onnx(captured, tmp_path_factory.mktemp("parity") / "model.onnx")


@pytest.fixture(scope="module")
def cases(captured: CapturedGraph) -> tuple[ExampleInputs, ...]:
    return make_cases(captured.example_inputs, seed=0, batch_sizes=(2, 5))


def test_a_correct_artifact_passes(artifact: ExportedArtifact, pruned: nn.Module, cases: tuple[ExampleInputs, ...]) -> None:
    report = verify(artifact, pruned, cases, rtol=RTOL, atol=ATOL)
    assert report.passed
    assert [output.name for output in report.outputs] == ["logits", "pooled", "best"]
    assert 0 < report.max_abs_diff < 1e-5
    assert report.outputs[0].max_abs > 0.5
    assert report.batch_sizes == (2, 5)
    assert (report.rtol, report.atol) == (RTOL, ATOL)
    assert report.runtime.startswith("onnxruntime 1.")
    raise_on_failure(report)
    assert verify(artifact.path, pruned, cases, rtol=RTOL, atol=ATOL) == report


def test_the_dense_module_is_not_what_the_file_computes(
    artifact: ExportedArtifact, captured: CapturedGraph, cases: tuple[ExampleInputs, ...]
) -> None:
    report = verify(artifact, captured.module, cases, rtol=RTOL, atol=ATOL)
    assert not report.passed
    with pytest.raises(ParityError, match=r"(?s)disagree in \d of 3 outputs.*logits: off by"):
        raise_on_failure(report)


@pytest.mark.parametrize(("change", "expected"), [(0.01, False), (float("nan"), False), (0.0, True)])
def test_one_altered_weight_in_the_file_is_found(
    captured: CapturedGraph, pruned: nn.Module, cases: tuple[ExampleInputs, ...], tmp_path: Path, change: float, expected: bool
) -> None:
    path = export_onnx(captured, tmp_path / "m.onnx", format="dense").path
    model = onnx.load(path)
    (stored,) = (tensor for tensor in model.graph.initializer if tensor.name == "value.bias")
    value = numpy_helper.to_array(stored).copy()
    value[3] += change
    stored.CopyFrom(numpy_helper.from_array(value, "value.bias"))
    onnx.save(model, path)
    report = verify(path, pruned, cases, rtol=RTOL, atol=ATOL)
    assert report.passed is expected
    if change != change:
        assert any("NaN or infinity" in note for note in report.notes)


def test_training_mode_and_gradients_come_back(
    artifact: ExportedArtifact, pruned: nn.Module, cases: tuple[ExampleInputs, ...]
) -> None:
    pruned.train()
    pruned.get_submodule("norm").eval()
    try:
        verify(artifact, pruned, cases[:1], rtol=RTOL, atol=ATOL)
        assert pruned.training
        assert not pruned.get_submodule("norm").training
        assert pruned.get_submodule("head").training
    finally:
        pruned.eval()


class Fixed(nn.Module):
    """Returns tensors that it was given beforehand."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor, unused: Tensor | None = None) -> Any:
        return self.outputs


def constant_model(path: Path, **outputs: np.ndarray) -> Path:
    """An ONNX model with input x whose outputs are constants."""
    nodes = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)) for name, value in outputs.items()]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in outputs.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph(nodes, "g", [x], infos)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def report_on(path: Path, stored: np.ndarray, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> Any:
    inputs = ExampleInputs((torch.zeros(3, 2),), {}, ("x",))
    return verify(constant_model(path, y=stored), Fixed({"y": expected}), [inputs], rtol=rtol, atol=atol)


F = np.float32
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("stored", "expected", "passes"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, 3e38], [1.0, INF], False),
        ([1.0, 2.3], [1.0, 2.0], False),
        ([1.0, 2.2], [1.0, 2.0], True),
        ([0.05, 2.0], [0.0, 2.0], True),
        ([0.051, 2.0], [0.0, 2.0], False),
    ],
)
def test_elements_are_compared_one_by_one(tmp_path: Path, stored: list[float], expected: list[float], passes: bool) -> None:
    report = report_on(tmp_path / "m.onnx", np.array(stored, F), torch.tensor(expected), rtol=0.1, atol=0.05001)
    assert report.passed is passes


def test_the_difference_is_relative_to_pytorch(tmp_path: Path) -> None:
    assert not report_on(tmp_path / "m.onnx", np.array([2.0], F), torch.tensor([1.0]), rtol=0.6).passed
    assert report_on(tmp_path / "m.onnx", np.array([1.0], F), torch.tensor([2.0]), rtol=0.6).passed


def test_integers_and_bools_are_equal_or_wrong(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert report_on(path, np.array([7]), torch.tensor([7]), rtol=1, atol=1).passed
    assert not report_on(path, np.array([7]), torch.tensor([8]), rtol=1, atol=1).passed
    assert not report_on(path, np.array([True]), torch.tensor([False]), rtol=1, atol=1).passed


def test_shape_dtype_and_missing_outputs_are_failures_that_say_so(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    shape = report_on(path, np.zeros((2, 1), F), torch.zeros(1, 2))
    assert (shape.passed, shape.notes) == (False, ("output y: shape (2, 1) in onnxruntime, (1, 2) in PyTorch",))
    dtype = report_on(path, np.zeros(2, np.float64), torch.zeros(2))
    assert (dtype.passed, dtype.notes) == (False, ("output y: dtype torch.float64 in onnxruntime, torch.float32 in PyTorch",))
    inputs = ExampleInputs((torch.zeros(3, 2),), {}, ("x",))
    missing = verify(constant_model(path, z=np.zeros(2, F)), Fixed({"y": torch.zeros(2)}), [inputs], rtol=0, atol=0)
    assert (missing.passed, missing.notes) == (False, ("output y: the ONNX graph has no such output; it has z",))


def test_a_run_that_fails_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    inputs = ExampleInputs((torch.zeros(3, 5),), {}, ("x",))
    path = constant_model(tmp_path / "m.onnx", y=np.zeros(2, F))
    report = verify(path, Fixed({"y": torch.zeros(2)}), [inputs], rtol=0, atol=0)
    assert not report.passed
    assert "onnxruntime fails on case 1 (x (3, 5))" in report.notes[0]


def test_inputs_that_the_graph_lacks_are_noted(tmp_path: Path) -> None:
    inputs = ExampleInputs((torch.zeros(3, 2), torch.zeros(1)), {}, ("x", "unused"))
    path = constant_model(tmp_path / "m.onnx", y=np.zeros(2, F))
    report = verify(path, Fixed({"y": torch.zeros(2)}), [inputs], rtol=0, atol=0)
    assert report.passed
    assert report.notes == ("input unused is not in the ONNX graph",)


def test_no_outputs_and_no_cases_do_not_pass(tmp_path: Path) -> None:
    path = constant_model(tmp_path / "m.onnx", y=np.zeros(2, F))
    with pytest.raises(InputError, match="no inputs to compare"):
        verify(path, Fixed({}), [], rtol=0, atol=0)
    inputs = ExampleInputs((torch.zeros(3, 2),), {}, ("x",))
    assert not verify(path, Fixed({}), [inputs], rtol=0, atol=0).passed


def test_missing_and_damaged_files_and_inputs(tmp_path: Path) -> None:
    inputs = ExampleInputs((torch.zeros(3, 2),), {}, ("other",))
    with pytest.raises(InputError, match="no ONNX file at"):
        verify(tmp_path / "no.onnx", Fixed({}), [inputs], rtol=0, atol=0)
    path = constant_model(tmp_path / "m.onnx", y=np.zeros(2, F))
    with pytest.raises(InputError, match="needs input x, but the inputs are other"):
        verify(path, Fixed({}), [inputs], rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cannot load .*m\.onnx.*export it again"):
        verify(path, Fixed({}), [inputs], rtol=0, atol=0)


def test_tolerances_are_ordered_and_named() -> None:
    (rtol, atol), (rtol16, atol16) = default_tolerance("fp32"), default_tolerance("fp16")
    assert 0 < rtol < rtol16 < 0.1
    assert 0 < atol < atol16 < 0.1
    assert default_tolerance("int8") == (0.0, INT8_SHARE)
    assert WORLDS_SHARE < INT8_SHARE <= 0.1
    with pytest.raises(InputError, match="values='int4'"):
        default_tolerance("int4")


def test_fp16_values_need_the_wider_tolerance(
    captured: CapturedGraph, pruned: nn.Module, cases: tuple[ExampleInputs, ...], tmp_path: Path
) -> None:
    half = export_onnx(captured, tmp_path / "m.onnx", values="fp16")
    without_argmax = [output for output in verify(half, pruned, cases, rtol=2e-2, atol=1e-2).outputs if output.name != "best"]
    assert all(output.within for output in without_argmax)
    assert not verify(half, pruned, cases, rtol=0, atol=1e-6).passed


def test_cases_are_held_out_reproducible_and_keep_rows_together() -> None:
    rows = torch.arange(4)[:, None].expand(4, 3)
    example = ExampleInputs(
        (),
        {
            "pixels": torch.randn(4, 3, 8, 8) * 2 + 5,
            "ids": rows.clone(),
            "mask": (rows % 2).bool(),
            "float_mask": (rows % 2).float(),
            "missing": None,
        },
        ("pixels", "ids", "mask", "float_mask"),
    )
    first, second, third = make_cases(example, seed=3, batch_sizes=(4, 2, 9))
    for case, size in ((first, 4), (second, 2), (third, 9)):
        tensors = case.tensors()
        assert case.batch_size() == size
        assert case.kwargs["missing"] is None
        assert torch.equal(tensors["ids"] % 2 == 1, tensors["mask"])
        assert torch.equal(tensors["float_mask"], tensors["mask"].float())
        assert bool((tensors["ids"] == tensors["ids"][:, :1]).all())
    pixels, old = first.tensors()["pixels"], example.kwargs["pixels"]
    assert not torch.equal(pixels, old)
    assert abs(float(pixels.mean() - old.mean())) < 0.2
    assert abs(float(pixels.std() - old.std())) < 0.2
    assert float(pixels.max()) <= float(old.max())
    assert sorted(first.tensors()["ids"][:, 0].tolist()) == [0, 1, 2, 3]
    again = make_cases(example, seed=3, batch_sizes=(4, 2, 9))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), again[0].tensors().values(), strict=True))
    other = make_cases(example, seed=4)
    assert not torch.equal(other[0].tensors()["pixels"], pixels)
    assert len(make_cases(example, seed=0, batch_sizes=(1, 2), count=3)) == 6


def test_inputs_without_a_batch_dimension_give_one_case_at_the_same_size() -> None:
    example = ExampleInputs((torch.randn(3, 4), torch.arange(5)), {}, ("patches", "ids"))
    (case,) = make_cases(example, seed=0, batch_sizes=(2, 4))
    assert torch.equal(case.args[1], torch.arange(5))
    assert case.args[0].shape == (3, 4)
    assert not torch.equal(case.args[0], example.args[0])


def test_batch_sizes_to_compare_follow_the_free_axes(artifact: ExportedArtifact, captured: CapturedGraph) -> None:
    assert comparable_batch_sizes(artifact, captured.example_inputs) == (2, 3)
    assert comparable_batch_sizes(artifact.path, captured.example_inputs) == (2, 3)
    ragged = normalize_inputs(captured.module, {**two_tower_inputs(), "pixel_values": torch.zeros(3, 3, 16, 16)})
    assert comparable_batch_sizes(artifact, ragged) == ()


def test_an_output_of_small_values_is_held_to_its_own_scale() -> None:
    reference = torch.full((4,), 0.01)
    for factor, within in ((1.0005, True), (1.01, False)):
        item = _Comparison("small")
        _compare(item, reference * factor, reference, rtol=1e-3, atol=1e-4)
        assert item.within is within


def test_coordinates_beside_content_are_not_drawn_anew() -> None:
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).expand(2, 3, 2)
    content, pixels = torch.randn(2, 3, 4), torch.arange(24.0).reshape(2, 3, 4)
    inputs = ExampleInputs((torch.cat([places, content], dim=-1), pixels), {}, ("patches", "pixels"))
    for case in make_cases(inputs, seed=0, count=2, rows=False):
        patches = case.tensors()["patches"]
        assert torch.equal(patches[..., :2], places)
        assert not torch.isclose(patches[..., 2:], content).any()
        assert not torch.equal(case.tensors()["pixels"], pixels)  # whole numbers alone are content
