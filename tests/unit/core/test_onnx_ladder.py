"""Programs give way to the next until one gives a file that onnxruntime agrees with; half precision; refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters import onnx_model
from mfcompile.exporters.parity import read_metadata
from mfcompile.frontends.capture import with_export
from mfcompile.graph import CapturedGraph, ExportedModel
from mfcompile.onnx_ladder import export_accepted, float32_module
from tests.models import TwoLayers, vlm_captured

ROUTES = ["torch.export", "torch.export, shapes fixed", "recorded graph"]


def captured(batch: int = 3) -> CapturedGraph:
    torch.manual_seed(0)
    return mfcompile.capture(TwoLayers().eval(), {"image": torch.randn(batch, 2, 4)})


def failures(graph: CapturedGraph) -> list[tuple[str, str]]:
    return [(item.frontend, item.detail) for item in graph.attempts if not item.succeeded]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Routes whose programs were converted."""
    routes: list[str] = []
    convert: Any = vars(onnx_model)["convert_program"]

    def watched(exported: ExportedModel) -> ir.Model:
        routes.append(exported.route)
        model: ir.Model = convert(exported)
        return model

    monkeypatch.setattr(onnx_model, "convert_program", watched)
    return routes


def spoil(monkeypatch: pytest.MonkeyPatch, *routes: str) -> None:
    """Conversions of these routes run, and give 1.01 times what they should."""
    convert: Any = vars(onnx_model)["convert_program"]

    def wrong(exported: ExportedModel) -> ir.Model:
        model: ir.Model = convert(exported)
        if exported.route in routes:
            (output,) = model.graph.outputs
            factor = ir.node("Constant", [], {"value_float": 1.01})
            scaled = ir.node("Mul", [output, factor.outputs[0]])
            scaled.outputs[0].type, scaled.outputs[0].shape, scaled.outputs[0].name = output.type, output.shape, "scaled"
            model.graph.extend([factor, scaled])
            model.graph.outputs[0] = scaled.outputs[0]
        return model

    monkeypatch.setattr(onnx_model, "convert_program", wrong)


def test_where_the_first_program_holds_no_other_is_made(tried: list[str], tmp_path: Path) -> None:
    artifact, ready = export_accepted(captured(), tmp_path / "model.onnx")
    assert tried == ["torch.export"]
    assert artifact.route == "torch.export"
    assert failures(ready) == []
    assert ready.exported is not None
    export_accepted(ready, tmp_path / "again.onnx")
    assert tried == ["torch.export", "torch.export"], "the accepted program is used again"


def test_a_conversion_that_runs_and_is_wrong_gives_way(
    tried: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(monkeypatch, "torch.export")
    artifact, ready = export_accepted(captured(), tmp_path / "model.onnx")
    assert tried == ROUTES[:2]
    assert artifact.route == "torch.export, shapes fixed"
    ((frontend, detail),) = failures(ready)
    assert frontend == "ONNX of torch.export"
    assert "disagree in 1 of 1 outputs beyond rtol=0.001" in detail
    assert "dimension 0 (batch) of image is fixed to 3" in " ".join(artifact.notes)
    assert mfcompile.verify(artifact, captured()).passed
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_the_recording_is_the_last_resort_and_serves_masks(
    tried: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(monkeypatch, *ROUTES[:2])
    torch.manual_seed(0)
    model = TwoLayers().eval()
    compiled = mfcompile.compile_pruned(model, {"image": torch.randn(3, 2, 4)}, modalities={"image": "vision"})
    artifact = compiled.export_onnx(tmp_path / "model.onnx")
    assert tried == ROUTES
    assert artifact.route == "recorded graph"
    assert {item.fqn for item in artifact.encodings} == set(compiled.masks)
    report = compiled.verify(artifact)
    assert report.passed
    assert report.batch_sizes == (3,)


def test_a_second_file_starts_where_the_first_came_about(tried: list[str], tmp_path: Path) -> None:
    graph = with_export(captured())
    artifact, ready = export_accepted(graph, tmp_path / "model.onnx", first="recorded graph")
    assert tried == ["recorded graph"]
    assert artifact.route == "recorded graph"
    export_accepted(ready, tmp_path / "again.onnx", first="recorded graph")
    assert tried == ["recorded graph"] * 2


def test_a_refusal_lists_every_way_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil(monkeypatch, *ROUTES)
    with pytest.raises(ExportError) as caught:
        mfcompile.export_onnx(captured(), tmp_path / "model.onnx")
    message = str(caught.value)
    for route in ROUTES:
        assert f"ONNX of {route}" in message
    assert "transformers.exporters, shapes fixed: CaptureError: the model is not one of transformers" in message
    assert "--no-onnx" in message
    assert not list(tmp_path.iterdir())


class AddsItsSum(TwoLayers):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + float(image.sum())


def test_a_model_that_no_way_exports_is_refused_quietly_with_its_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    found = with_export(mfcompile.capture(AddsItsSum().eval(), {"image": torch.randn(3, 2, 4)}))
    assert found.exported is None
    assert with_export(found) is found
    with pytest.raises(
        ExportError, match=r"(?s)at test_onnx_ladder\.py:\d+, in forward: .*float\(image\.sum\(\)\).*--no-onnx"
    ) as caught:
        mfcompile.export_onnx(found, tmp_path / "model.onnx")
    assert len(str(caught.value)) < 3000
    assert "def forward" not in "".join(capfd.readouterr())


def test_a_model_in_bfloat16_is_written_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoLayers(8).eval().bfloat16()
    before = copy.deepcopy(model.state_dict())
    given = {"image": torch.randn(4, 8).bfloat16()}
    compiled = mfcompile.compile_pruned(model, given, modalities={"image": "vision"})
    artifact = compiled.export_onnx(tmp_path / "model.onnx")
    assert any("computed in float32" in note for note in artifact.notes)
    assert read_metadata(artifact)["mfcompile.computes"] == "float32"
    report = compiled.verify(artifact)
    assert report.passed
    assert report.max_abs_diff < 1e-4, "both sides compute in float32"
    assert all(item.dtype == torch.bfloat16 for item in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = {item.fqn: item.kept_count for item in artifact.encodings}
    assert kept == {fqn: int(compiled.masks[fqn].sum()) for fqn in compiled.masks}


class Buffered(nn.Module):
    scale: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("places", torch.arange(2))


def test_only_half_precision_is_cast() -> None:
    half = Buffered().half()
    half.inner.requires_grad_(False)
    wide: Any = float32_module(half)
    assert wide.inner.weight.dtype == wide.scale.dtype == torch.float32
    assert wide.places.dtype == torch.int64
    assert not wide.inner.weight.requires_grad
    assert half.inner.weight.dtype == half.scale.dtype == torch.float16


def test_the_program_that_is_given_comes_first(tried: list[str], tmp_path: Path) -> None:
    graph = with_export(captured())
    assert graph.exported is not None
    renamed = replace(graph, exported=replace(graph.exported, route="torch.export, shapes fixed"))
    export_accepted(renamed, tmp_path / "model.onnx")
    assert tried == ["torch.export, shapes fixed"]


class NamesItsDtype(nn.Module):
    """Casts its input to bfloat16, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        states = image.to(torch.bfloat16)
        for layer in self.layers:
            states = layer(states)
        return states


def test_a_model_that_insists_on_bfloat16_is_refused_with_what_to_change(tmp_path: Path) -> None:
    compiled = mfcompile.compile_pruned(NamesItsDtype().bfloat16().eval(), {"image": torch.randn(4, 8)}, sparsity=0.5)
    with pytest.raises(ExportError, match=r"(?s)does not run with them in float32.*let it take that of a parameter"):
        compiled.export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_and_a_graph_in_the_wrong_order_are_told_apart() -> None:
    with pytest.raises(InputError, match=r"in that order; got CapturedGraph and PosixPath"):
        mfcompile.verify(vlm_captured(), Path("model.onnx"))  # type: ignore[arg-type]
