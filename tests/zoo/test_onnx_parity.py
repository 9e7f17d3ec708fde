"""Models whose own code torch.export cannot trace, pruned and written as ONNX: onnxruntime gives what the module gives."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfcompile

pytest.importorskip("transformers")

from benchmarks.zoo.build import build
from benchmarks.zoo.table import all_rows

HARD = {
    "ViltForQuestionAnswering": "positions resized to sizes that are read from a mask, patches drawn at random",
    "Qwen2_5_VLForConditionalGeneration": "walks on the host over the grids of images",
}


@pytest.mark.parametrize("key", HARD)
def test_pruned_models_are_written_from_their_recording(key: str, tmp_path: Path) -> None:
    model, inputs = build(all_rows()[key])
    compiled = mfcompile.compile_pruned(model, inputs, sparsity=0.5)
    artifact = compiled.export_onnx(tmp_path / "model.onnx")
    assert artifact.route == "recorded graph"
    assert {item.fqn for item in artifact.encodings} == set(compiled.masks)
    assert any("numbers that the model reads from its inputs" in note for note in artifact.notes)
    report = compiled.verify(artifact)
    assert report.passed
