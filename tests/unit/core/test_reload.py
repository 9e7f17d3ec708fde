"""A pruned transformers model is reloaded by plain transformers, zeros and all."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile

transformers = pytest.importorskip("transformers")


def clip() -> nn.Module:
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**common, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**common, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.CLIPModel(config).eval()
    return model


def blip() -> nn.Module:
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**common, "vocab_size": 50, "max_position_embeddings": 12, "encoder_hidden_size": 16}
    config = transformers.BlipConfig(
        text_config=text, vision_config={**common, "image_size": 8, "patch_size": 4}, projection_dim=8, image_text_hidden_size=8
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.BlipForImageTextRetrieval(config).eval()
    return model


MODELS = {"CLIPModel": clip, "BlipForImageTextRetrieval": blip}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (2, 7), generator=generator)
    ids[:, -1] = 49
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "input_ids": ids, "attention_mask": mask}


@cache
def pruned(name: str) -> mfcompile.CompiledModel:
    return mfcompile.compile_pruned(MODELS[name](), inputs(), calibration=[inputs()])


def values(output: Any) -> list[Tensor]:
    return [item for item in output.to_tuple() if isinstance(item, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_gives_the_pruned_model(name: str, tmp_path: Path) -> None:
    path = pruned(name).save(tmp_path / "out", onnx=False)
    assert {item.name for item in path.iterdir()} >= {"config.json", "model.safetensors", "masks.safetensors", "report.json"}
    model = getattr(transformers, name).from_pretrained(path)
    masks = mfcompile.MaskSet.load(path / "masks.safetensors")
    assert masks == pruned(name).masks
    zeros = 0
    for fqn, mask in masks.items():
        assert not model.get_parameter(fqn)[~mask].any(), fqn
        zeros += int((model.get_parameter(fqn) == 0).sum())
    assert zeros == masks.weight_count - masks.kept_count
    with torch.inference_mode():
        expected, found = values(pruned(name).module(**inputs())), values(model.eval()(**inputs()))
    assert len(expected) == len(found) > 0
    # from_pretrained keeps no memory layout: other kernels may round the last bits differently.
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_masked_module_is_still_the_users_class() -> None:
    assert type(pruned("CLIPModel").module) is transformers.CLIPModel
    assert pruned("CLIPModel").module.config.projection_dim == 8  # type: ignore[union-attr]


def test_regions_of_both_models() -> None:
    assert set(pruned("CLIPModel").regions.by_region()) == {"vision", "text"}
    assert set(pruned("BlipForImageTextRetrieval").regions.by_region()) == {"vision", "fusion"}
