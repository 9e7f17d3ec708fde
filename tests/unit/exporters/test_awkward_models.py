"""Models that are unusual in one respect each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mfcompile.errors import ExportError
from mfcompile.exporters.onnx_model import export_onnx
from tests.unit.exporters import toy_session
from tests.unit.exporters.toy_models import (
    BATCH,
    capture,
    feeds,
    masked,
    random_masks,
    seeded,
)


class Awkward(nn.Module):
    """Outputs that are inputs, parameters, twice the same, numbers or None; an assertion; an unused input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.y = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, spare: Tensor) -> dict[str, Any]:
        torch.ops.aten._assert_async.msg(torch.ops.aten._is_all_true(torch.isfinite(x)), "not finite")
        y = self.layer(x) * self.y
        return {"y": y, "again": y, "x": x, "none": None, "three": 3, "weight": self.layer.weight, "rows": x.shape[0]}


def test_awkward_outputs_and_assertions(tmp_path: Path) -> None:
    module = Awkward().eval()
    captured = capture(module, {"x": torch.randn(2, 4), "spare": torch.randn(2, 4)}, {"x": BATCH, "spare": BATCH})
    artifact = export_onnx(captured, tmp_path / "m.onnx")
    assert artifact.input_names == ("x", "spare")
    assert artifact.output_names == ("y", "again", "x_out", "weight")
    assert artifact.dynamic_axes == {"x": {0: "batch"}, "spare": {0: "batch_2"}}
    assert "input spare is not used by the graph" in artifact.notes
    assert any(note.startswith("output x is called x_out") for note in artifact.notes)
    assert any(note.startswith("parameter y is called y_inner") for note in artifact.notes)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    out = toy_session.run(artifact.path, {"x": x, "spare": x})
    assert out["x_out"].tobytes() == x.tobytes()
    assert out["y"].tobytes() == out["again"].tobytes()
    np.testing.assert_allclose(out["y"], module.layer(torch.from_numpy(x)).detach(), atol=1e-6)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        fused: Tensor = self.attention(text, image, image, need_weights=False)[0]
        return fused


def test_the_packed_projection_of_cross_attention_is_folded(tmp_path: Path) -> None:
    module = seeded(CrossAttention)
    inputs = {"text": torch.randn(2, 5, 32), "image": torch.randn(2, 9, 32)}
    masks = random_masks(module, 0.3)
    captured = capture(module, inputs, {"text": BATCH, "image": BATCH}, masks)
    artifact = export_onnx(captured, tmp_path / "m.onnx")
    assert {item.fqn for item in artifact.encodings} == {"attention.in_proj_weight", "attention.out_proj.weight"}
    operators = toy_session.optimised_operators(artifact.path, tmp_path)
    assert not {"SplitToSequence", "SequenceAt", "ScatterElements", "CumSum"} & set(operators)
    actual = toy_session.run(artifact.path, feeds(inputs))["output_0"]
    np.testing.assert_allclose(actual, masked(module, masks)(**inputs).detach(), atol=1e-5)


class Skipping(nn.Module):
    """Has a layer that forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.skipped = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def test_a_masked_parameter_that_the_graph_does_not_read_is_noted(tmp_path: Path) -> None:
    module = seeded(Skipping)
    captured = capture(module, torch.randn(2, 4), masks=random_masks(module, 0.5))
    artifact = export_onnx(captured, tmp_path / "m.onnx")
    assert [item.fqn for item in artifact.encodings] == ["used.weight"]
    (note,) = artifact.notes
    assert note == "masked parameters that the graph does not read are not in the file (1): skipped.weight"


class Unconvertible(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        eigenvalues: Tensor = torch.linalg.eigvals(x)
        return eigenvalues


def test_an_operator_without_translation_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    captured = capture(Unconvertible(), torch.randn(3, 3))
    with pytest.raises(ExportError, match=r"operator aten\.linalg_eig\.default cannot be converted to ONNX: .*Replace"):
        export_onnx(captured, tmp_path / "sub" / "m.onnx")
    assert os.listdir(tmp_path) == []
