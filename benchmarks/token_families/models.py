"""Which models are tried: rows of the zoo, vision transformers with registers, biases, windows or two read-outs, and timm's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.build import build
from benchmarks.zoo.row import Ids, Noise, PaddingMask, Row, Spec, image
from benchmarks.zoo.table import all_rows

ZOO = (
    "ViTModel", "Dinov2Model", "SiglipModel", "Siglip2Model", "ViltModel", "FlavaModel", "BridgeTowerModel", "Qwen2VLModel",
    "Qwen2_5_VLModel", "InternVLModel", "PaliGemmaModel", "Idefics3Model", "LlavaNextModel", "LlavaOnevisionModel",
    "Florence2Model", "Pix2StructForConditionalGeneration", "GitModel", "OwlViTModel", "CLIPSegForImageSegmentation",
    "Blip2Model", "InstructBlipModel", "AltCLIPModel", "ChineseCLIPModel", "AlignModel", "XCLIPModel", "WhisperModel",
    "BertModel", "GroupViTModel", "BlipForQuestionAnswering", "VisualBertModel", "MllamaModel", "Kosmos2Model",
    "LxmertModel", "Gemma3Model",
)  # fmt: skip

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

OWN = (
    Row(
        "Dinov2WithRegistersModel", "vision", image(32), {**_SIZES, "mlp_ratio": 2, "num_register_tokens": 4},
        plain_config=True,
    ),
    Row("DeiTModel", "vision", image(32), _SIZES, plain_config=True, variant="distilled"),
    Row("BeitModel", "vision", image(32), {**_SIZES, "use_relative_position_bias": True}, plain_config=True, variant="bias"),
    Row(
        "SwinModel", "vision", image(32),
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        plain_config=True,
    ),
    Row(
        "VideoMAEModel", "vision", {"pixel_values": Noise((2, 4, 3, 32, 32))}, {**_SIZES, "num_frames": 4, "tubelet_size": 2},
        plain_config=True,
    ),
)  # fmt: skip
"""Vision models beside the zoo's."""

INPUTS: dict[str, dict[str, Spec]] = {
    "Blip2Model": {"decoder_input_ids": Ids((2, 6)), "decoder_attention_mask": PaddingMask((2, 6), 1)},
}
"""Other inputs than the zoo's, where two kinds of tokens have one number: the eager reference knows tokens by their number."""

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm/vit-cls": ("vit_tiny_patch16_224", {}),
    "timm/vit-registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "timm/vit-mean": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "timm/deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "timm/beit": ("beit_base_patch16_224", {}),
    "timm/eva02-rotary": ("eva02_tiny_patch14_224", {}),
}
"""Name -> (timm's name, further arguments): images of 32 pixels, patches of 8, 3 blocks."""


def keys() -> tuple[str, ...]:
    """Every model that is tried."""
    return (*(row.key for row in OWN), *TIMM, *ZOO)


def make(key: str) -> tuple[nn.Module, dict[str, Any], dict[str, str] | None]:
    """The model, its inputs, and modalities of inputs that need telling.

    Raises:
        Exception: whatever its library raises for a model that it cannot build.
    """
    if key in TIMM:
        return _timm(*TIMM[key])
    row = (all_rows() | {row.key: row for row in OWN})[key]
    row = replace(row, inputs={**row.inputs, **INPUTS.get(key, {})})
    module, inputs = build(row)
    _tell_tokens_apart(module)
    return module, inputs, dict(row.modalities) or None


def _tell_tokens_apart(module: nn.Module) -> None:
    """Draw matrices anew that are as good as zero: a configuration may say so, and then all tokens score alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and 0 < float(parameter.std()) < 1e-6:
                parameter.normal_(std=0.02, generator=generator)


def _timm(name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], None]:
    import timm

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
    module: nn.Module = timm.create_model(name, pretrained=False, **sizes, **options).eval()
    return module, {"x": torch.randn(2, 3, 32, 32)}, None
