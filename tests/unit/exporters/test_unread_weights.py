"""Weights whose product no output needs: models compute them all the same, programs drop them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.masks import MaskSet
from tests.unit.exporters.toy_models import random_masks


class LayerBeforeLast(nn.Module):
    """Reads the features before the last layer, in a way that hangs on a number in an input: torch.export gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, pixel_values: Tensor, lengths: Tensor) -> Tensor:
        states = [pixel_values]
        for layer in self.layers:
            states.append(layer(states[-1]))
        features = states[-2] if int(lengths.max()) > 4 else states[-2].relu()
        logits: Tensor = self.head(features)
        return logits


def test_the_mask_of_a_weight_that_the_program_dropped_is_no_mistake(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LayerBeforeLast().eval()
    inputs = {"pixel_values": torch.randn(2, 5, 8), "lengths": torch.tensor([5, 3])}
    masks: MaskSet = random_masks(model, {f"layers.{number}.weight": 0.5 for number in range(3)})
    pruned = mfcompile.apply_masks(mfcompile.capture(model, inputs), masks)
    artifact = mfcompile.export_onnx(pruned, tmp_path / "model.onnx")
    assert artifact.route == "recorded graph"  # what torch.export makes of a whole model keeps every parameter
    assert any("layers.2.weight" in note for note in artifact.notes)
    assert mfcompile.verify(artifact, pruned).passed
