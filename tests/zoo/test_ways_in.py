"""The same architecture by other ways in: from a .pt2 archive, and without its weights. Regions must not change."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import mfcompile
from mfcompile.frontends.sources import load_source
from mfcompile.region import RegionMap

pytest.importorskip("transformers")

from tests.zoo import families

FAMILIES = (
    "clip", "siglip", "blip_itm", "blip_cap", "blip_vqa", "blip2", "instructblip", "llava", "qwen2vl", "vilt", "florence",
    "mllama", "flava", "bridgetower", "chameleon", "whisper", "clap", "idefics3", "lxmert", "bert", "vit",
)  # fmt: skip


@functools.cache
def built(name: str) -> tuple[Any, dict[str, torch.Tensor], RegionMap]:
    torch.manual_seed(0)
    model, inputs = getattr(families, name)()
    return model.eval(), inputs, mfcompile.infer_regions(mfcompile.capture(model, inputs))


def without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device in which tied weights are tied."""
    memo: dict[int, Any] = {id(item): nn.Parameter(item.detach().to("meta"), item.requires_grad) for item in model.parameters()}
    memo |= {id(item): item.to("meta") for item in model.buffers()}
    return copy.deepcopy(model, memo)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_has_the_regions_of_the_model(name: str) -> None:
    model, inputs, expected = built(name)
    found = mfcompile.infer_regions(mfcompile.capture(without_values(model), inputs))
    assert found.sites == expected.sites
    assert dict(found.weights) == dict(expected.weights)
    assert [(item.name, item.modality) for item in found.modalities] == [
        (item.name, item.modality) for item in expected.modalities
    ]


@pytest.mark.parametrize("name", ["clip", "blip_itm", "llava"])
def test_an_archive_has_the_regions_and_masks_of_the_model(name: str, tmp_path: Path) -> None:
    model, inputs, expected = built(name)
    exported = copy.deepcopy(model)
    for config in (exported.config, getattr(exported.config, "text_config", None)):
        if config is not None:
            config.use_cache = False
    free = {key: {0: Dim.AUTO} if item.is_floating_point() else {0: Dim.AUTO, 1: Dim.AUTO} for key, item in inputs.items()}
    program = torch.export.export(exported, (), inputs, dynamic_shapes=free, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    source = load_source(tmp_path / "model.pt2")
    found = mfcompile.compile_pruned(source.model, source.example_inputs, sparsity=0.5)
    assert found.regions.pruned_sites == expected.pruned_sites
    assert {fqn: found.regions.weights[fqn] for fqn in expected.evidence} == {
        fqn: expected.weights[fqn] for fqn in expected.evidence
    }
    assert found.masks == mfcompile.compile_pruned(model, inputs, sparsity=0.5).masks
