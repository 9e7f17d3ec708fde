"""A dozen rows of the zoo that differ most, and the zoo's check itself: what is broken is reported, and at its stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

pytest.importorskip("transformers")

import mfcompile
from benchmarks.zoo import check as zoo
from benchmarks.zoo.row import STAGES, Row
from benchmarks.zoo.table import all_rows
from mfcompile.artifact import ExportedArtifact
from mfcompile.compile import CompiledModel, assemble
from mfcompile.errors import MfcompileError

ROWS = all_rows()

# Key -> (last stage, sites by region). Every row goes through the module; parity, which is slow, is that of four.
KNOWN = {
    "CLIPModel": ("parity", {"vision": 12, "text": 12}),  # two towers
    "GitModel": ("parity", {"vision": 12, "fusion": 12}),  # image prefix before text
    "ChameleonModel": ("parity", {"fusion": 14}),  # the image as words of a codebook
    "VisualBertModel": ("parity", {"fusion": 12}),  # one stream
    "Blip2ForConditionalGeneration": ("module", {"vision": 24, "fusion": 12}),  # learned queries
    "Idefics3Model": ("module", {"vision": 12, "fusion": 14}),  # several images between words
    "Step3p7Model": ("module", {"vision": 12, "fusion": 25}),  # experts
    "Qwen2VLModel": ("module", {"vision": 8, "fusion": 14}),  # a packed grid of patches
    "BlipForQuestionAnswering": ("module", {"vision": 8, "fusion": 40}),  # two text stacks that attend to the image
    "WhisperModel": ("module", {"audio": 12, "fusion": 20}),  # audio
    "VideoLlavaModel": ("module", {"vision": 24, "fusion": 14}),  # images and videos
    "GroundingDinoModel": ("module", {"vision": 27, "text": 12, "fusion": 69}),  # a detector
}


@pytest.mark.parametrize("key", KNOWN)
def test_row_reaches_its_stage_with_its_regions(key: str) -> None:
    stage, regions = KNOWN[key]
    record = zoo.check(ROWS[key], until=stage)
    assert record["failed"] is None, record["reason"]
    assert record["passed"][-1] == stage
    assert {name: found["sites"] for name, found in record["regions"].items()} == regions


class Pair(nn.Module):
    """A tower for the image, one for the text, and their product; with a configuration, as the zoo's models have."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="pair")
        self.words = nn.Embedding(20, 8)
        self.read = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.see = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        image, text = pixel_values, self.words(input_ids).mean(1)
        for layer in self.see:
            image = layer(image).relu()
        for layer in self.read:
            text = layer(text).relu()
        result: Tensor = image @ text.T + 1
        return result


class Unnamed(Pair):
    """Its text comes under a name that tells nothing, as floats of two dimensions."""

    def forward(self, pixel_values: Tensor, things: Tensor) -> Tensor:
        result: Tensor = self.see[0](pixel_values) @ self.read[0](things).T
        return result


class Forgetful(Pair):
    """Draws numbers that no seed decides."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return super().forward(pixel_values, input_ids) + torch.rand(1, generator=torch.Generator().manual_seed(id(object())))


class Empty(Pair):
    """Gives nothing but NaN."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return super().forward(pixel_values, input_ids) * float("nan")


ROW = Row("Pair", "vision-text", {})


def _check(monkeypatch: pytest.MonkeyPatch, module: nn.Module, until: str = "module", **inputs: Tensor) -> dict[str, Any]:
    inputs = inputs or {"pixel_values": torch.randn(2, 8), "input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    monkeypatch.setattr(zoo, "build", lambda row: (module.eval(), inputs))
    record = zoo.check(ROW, until)
    assert record["passed"] == list(STAGES[: len(record["passed"])])
    if record["failed"]:
        assert record["failed"] == STAGES[len(record["passed"])]
        assert record["reason"]
        assert record["limit"]
    return record


def test_a_sound_model_passes_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _check(monkeypatch, Pair(), until="parity")
    assert record["failed"] is None, record["reason"]
    assert tuple(record["passed"]) == STAGES
    assert record["sparsity"] == zoo.SPARSITY
    assert record["batch_sizes"] == [2, 3]
    assert {name: found["sites"] for name, found in record["regions"].items()} == {"text": 2, "vision": 2}


def test_nothing_runs_behind_the_last_stage_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _check(monkeypatch, Pair(), until="capture")["passed"] == ["build", "run", "capture"]


def test_a_class_that_cannot_be_built_is_transformers_limit() -> None:
    record = zoo.check(Row("CLIPModel", "vision-text", {}, {"text_config": {"hidden_size": 33}}))
    assert (record["failed"], record["limit"]) == ("build", "transformers")


def test_a_class_that_does_not_run_is_transformers_limit() -> None:
    record = zoo.check(Row("CLIPModel", "vision-text", {"no_such_input": ROWS["CLIPModel"].inputs["pixel_values"]}))
    assert (record["failed"], record["limit"]) == ("run", "transformers")


def test_a_recording_that_does_not_replay_fails_at_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _check(monkeypatch, Forgetful())["failed"] == "capture"


def test_an_input_without_a_modality_fails_at_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _check(monkeypatch, Unnamed(), pixel_values=torch.randn(2, 8), things=torch.randn(2, 8))
    assert (record["failed"], "things" in record["reason"]) == ("regions", True)


def test_masks_of_another_sparsity_fail_at_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    select = mfcompile.select_masks
    monkeypatch.setattr(mfcompile, "select_masks", lambda *args, sparsity: select(*args, sparsity=sparsity / 2))
    assert _check(monkeypatch, Pair())["failed"] == "prune"


@pytest.mark.parametrize("name", ["see.1.weight", "see.1.bias"], ids=["masked", "untouched"])
def test_a_stripped_weight_that_is_wrong_fails_at_masks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def alter(module: nn.Module) -> None:
        with torch.no_grad():
            module.get_parameter(name).view(-1)[0] += 1

    _spoil(monkeypatch, strip=alter)
    record = _check(monkeypatch, Pair())
    assert (record["failed"], record["limit"]) == ("masks", "mfcompile")
    assert name in record["reason"]


def test_a_module_whose_masks_are_not_in_force_fails_at_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_masks(captured: Any, *args: Any, **options: Any) -> CompiledModel:
        compiled = assemble(captured, *args, **options)
        stripped = compiled.strip()
        monkeypatch.setattr(CompiledModel, "strip", lambda _: stripped)  # the zeros are there, and nothing enforces them
        return replace(compiled, module=captured.module)

    monkeypatch.setattr(zoo, "assemble", without_masks)
    record = _check(monkeypatch, Pair())
    assert (record["failed"], record["limit"]) == ("module", "mfcompile")


def test_a_model_that_gives_nothing_but_nan_fails_at_module(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _check(monkeypatch, Empty())
    assert (record["failed"], "NaN" in record["reason"]) == ("module", True)


def test_a_file_that_is_not_written_fails_at_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CompiledModel, path: Path) -> ExportedArtifact:
        raise MfcompileError("no file")

    monkeypatch.setattr(CompiledModel, "export_onnx", refuse)
    assert _check(monkeypatch, Pair(), until="parity")["failed"] == "onnx"


def test_a_file_with_a_wrong_weight_fails_at_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    export = CompiledModel.export_onnx

    def spoilt(self: CompiledModel, path: Path) -> ExportedArtifact:
        artifact = export(self, path)
        model = onnx.load(path)
        weight = max(model.graph.initializer, key=lambda item: sum(item.dims) * (item.data_type == onnx.TensorProto.FLOAT))
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        onnx.save(model, path)
        return artifact

    monkeypatch.setattr(CompiledModel, "export_onnx", spoilt)
    record = _check(monkeypatch, Pair(), until="parity")
    assert (record["failed"], record["limit"]) == ("parity", "onnxruntime")
    assert "is off by" in record["reason"]


def _spoil(monkeypatch: pytest.MonkeyPatch, strip: Callable[[nn.Module], None]) -> None:
    whole = CompiledModel.strip

    def spoilt(self: CompiledModel) -> nn.Module:
        module = whole(self)
        strip(module)
        return module

    monkeypatch.setattr(CompiledModel, "strip", spoilt)


def test_masks_are_compared_by_tensor_not_by_name() -> None:
    dense = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    dense["other"].weight = dense["one"].weight
    mask = torch.arange(16).reshape(4, 4) % 2 == 0
    stripped = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    stripped.load_state_dict({name: item * mask if "weight" in name else item for name, item in dense.state_dict().items()})
    zoo._check_masks(dense, dict(dense.named_parameters(remove_duplicate=False)), stripped, {"one.weight": mask})
