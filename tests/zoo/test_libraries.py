"""Models of timm and open_clip, by the same code as all others: regions, sites and masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.compile import CompiledModel
from mfcompile.inputs import output_tensors
from tests.zoo.without_torchvision import stand_ins

# open_clip imports transformers, which asks once which packages there are, for all who come later: not for the stand-ins.
installed: Any = pytest.importorskip("transformers.utils.import_utils")
IS_INSTALLED = (installed.is_torchvision_available(), installed.is_torchvision_v2_available())

with stand_ins("torchvision", "ftfy"):
    timm: Any = pytest.importorskip("timm")
    open_clip: Any = pytest.importorskip("open_clip")

VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def pair() -> dict[str, Tensor]:
    text = torch.randint(1, 60, (2, 12))
    text[:, -1] = 63
    return {"image": image(), "text": text}


def patches() -> tuple[dict[str, Tensor]]:
    """Two images of four patches each, as a model of any resolution takes them."""
    places = torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]] * 2)
    valid = torch.ones(2, 4, dtype=torch.bool)
    return ({"patches": torch.randn(2, 4, 16 * 16 * 3), "patch_coord": places, "patch_valid": valid},)


def coca() -> nn.Module:
    decoder = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    text = {**TEXT, "embed_cls": True, "pad_id": 0, "output_tokens": True}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    model: Any = open_clip.CoCa(32, decoder, text, vision)
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # which it leaves as it finds the memory
    return model  # type: ignore[no-any-return]


def siglip() -> nn.Module:
    """The image tower is timm's, with an attention that pools."""
    tower = {
        "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
        "image_size": 224,
    }  # fmt: skip
    text = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return open_clip.CustomTextCLIP(16, tower, text, init_logit_bias=-10)  # type: ignore[no-any-return]


def swin() -> nn.Module:
    return timm.models.swin_transformer.SwinTransformer(  # type: ignore[no-any-return]
        img_size=32, patch_size=2, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=16, num_classes=5
    )


def eva() -> nn.Module:
    return timm.models.eva.Eva(  # type: ignore[no-any-return]
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, swiglu_mlp=True, use_rot_pos_emb=True
    )


@dataclass(frozen=True)
class Model:
    """One model and the number of sites per region that it must give.

    Attributes:
        build: makes it.
        inputs: what it is called with.
        regions: region -> pruned sites.
        modalities: name of each input -> what it must be taken for.
        options: for ``compile_pruned``.
    """

    build: Callable[[], Any]
    inputs: Callable[[], Any]
    regions: dict[str, int]
    modalities: dict[str, str | None]
    options: dict[str, Any] = field(default_factory=dict)


VISION_ONLY: dict[str, str | None] = {"x": "vision"}
BOTH: dict[str, str | None] = {"image": "vision", "text": "text"}
NAFLEX: dict[str, str | None] = {"x.patches": "vision", "x.patch_coord": None, "x.patch_valid": None}


def vit() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)


def convnext(**changes: Any) -> Any:
    return timm.models.convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5, **changes)


def naflex() -> Any:
    return timm.create_model("naflexvit_base_patch16_gap", depth=2, embed_dim=32, num_heads=2, num_classes=5)


MODELS = {
    "vit": Model(vit, image, {"vision": 8}, VISION_ONLY),
    "convnext": Model(convnext, image, {"vision": 10}, VISION_ONLY),
    "convnext of 1x1 convolutions": Model(
        lambda: convnext(conv_mlp=True),
        image,
        {"vision": 10},
        VISION_ONLY,
        {"targets": [r"re:.*\.mlp\."]},
    ),
    "swin": Model(swin, image, {"vision": 17}, VISION_ONLY),
    "eva": Model(eva, image, {"vision": 8}, VISION_ONLY),
    "naflex, image": Model(naflex, image, {"vision": 8}, VISION_ONLY),
    "naflex, patches": Model(naflex, patches, {"vision": 8}, NAFLEX),
    "clip": Model(lambda: open_clip.CLIP(16, VISION, TEXT), pair, {"vision": 8, "text": 8}, BOTH),
    # Twelve blocks of four, and the layer that pools: q, kv, projection and two of its MLP.
    "siglip": Model(siglip, lambda: {**pair(), "image": torch.randn(2, 3, 224, 224)}, {"vision": 53, "text": 8}, BOTH),
    # The decoder's first self-attention sees no image yet; its cross-attentions read queries, keys and values apart.
    "coca": Model(coca, pair, {"vision": 8, "text": 12, "fusion": 16}, BOTH),
}


@functools.cache
def compiled(name: str) -> CompiledModel:
    torch.manual_seed(0)
    model = MODELS[name]
    return mfcompile.compile_pruned(model.build().eval(), model.inputs(), sparsity=0.5, **model.options)


@pytest.mark.parametrize("name", MODELS)
def test_regions_are_counted_as_expected(name: str) -> None:
    regions = compiled(name).regions
    assert {region: len(sites) for region, sites in regions.by_region().items()} == MODELS[name].regions
    assert {item.name: item.modality for item in regions.modalities} == MODELS[name].modalities


@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_region_is_gone_and_the_model_runs(name: str) -> None:
    found = compiled(name)
    for region, sites in found.regions.by_region().items():
        total = sum(site.weight_count for site in sites)
        kept = sum(int(site.matrix(site.layout.matrices(found.masks[site.fqn])).sum()) for site in sites)
        assert kept == total - total // 2, region
    inputs = found.captured.example_inputs
    with torch.inference_mode():
        for tensor in output_tensors(inputs.call(found.module)).values():
            assert torch.isfinite(tensor).all()
