"""A transformers model with a tiny random configuration, all the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.exporters.parity import comparable_batch_sizes, default_tolerance, make_cases, verify
from tests.unit.exporters import toy_session
from tests.unit.exporters.toy_models import TWO_TOWER_AXES, capture, feeds, masked, random_masks

transformers = pytest.importorskip("transformers")


class Clip(nn.Module):
    """CLIPModel with the outputs that a user asks for."""

    def __init__(self) -> None:
        super().__init__()
        common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {**common, "vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": 98}
        vision = {**common, "image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        self.clip = transformers.CLIPModel(config)

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        out = self.clip(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return {"logits_per_image": out.logits_per_image, "text_embeds": out.text_embeds, "image_embeds": out.image_embeds}


def test_clip_is_written_packed_and_verified_at_two_batch_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Clip().eval()
    ids = torch.randint(0, 97, (2, 9))
    ids[:, -1] = 98
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    masks = random_masks(module, 0.37)
    captured = capture(module, inputs, TWO_TOWER_AXES, masks)
    dense = export_onnx(captured, tmp_path / "dense.onnx", format="dense")
    packed = export_onnx(captured, tmp_path / "packed.onnx")
    assert {item.fqn for item in packed.encodings} == set(masks)
    assert packed.pruned_ratio <= 0.47
    assert packed.dynamic_axes.keys() == set(inputs)
    sizes = comparable_batch_sizes(packed, captured.example_inputs)
    assert sizes == (2, 3)
    cases = make_cases(captured.example_inputs, seed=1, batch_sizes=sizes)
    rtol, atol = default_tolerance("fp32")
    report = verify(packed, masked(module, masks), cases, rtol=rtol, atol=atol)
    assert report.passed, report
    assert not verify(packed, module, cases, rtol=rtol, atol=atol).passed
    for case in cases:
        one, other = (toy_session.run(artifact.path, feeds(case)) for artifact in (dense, packed))
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert "ScatterElements" not in toy_session.optimised_operators(packed.path, tmp_path)
