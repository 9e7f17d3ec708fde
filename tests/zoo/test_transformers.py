"""Architectures of transformers: labels, regions and sites are those of the golden files (``--update-golden`` writes them)."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mfcompile
from mfcompile.compile import CompiledModel
from mfcompile.region import WeightUse

pytest.importorskip("transformers")

from tests.zoo import families
from tests.zoo.renaming import rename

GOLDEN = Path(__file__).parents[1] / "golden"
CONVOLUTIONS = "convolutions are listed: those of patches may be targeted, the others say why not"
LETTERS = {"vision": "V", "text": "T", "audio": "A"}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        labels: number of linear weights by the labels of their inputs (V, T, A; 0 for none; a/b for several calls).
        note: what is not obvious about its regions.
    """

    labels: str
    note: str = ""


FAMILIES = {
    "clip": Family("T:13 V:13", "logits are a product of both modalities, and fuse nothing"),
    "siglip": Family(
        "0/V:1 T:13 V:15",
        "the pooling head's in_proj reads a learned probe (queries) and the image (keys, values); with its MLP it is a layer",
    ),
    "blip_itm": Family("T:5 TV:12 V:12", "image-fed keys and values belong to the text blocks, which all fuse"),
    "blip_cap": Family("T:5 TV:13 V:12", "one TV weight is the tied word table"),
    "blip_vqa": Family("T:10 TV:28 V:12", "every text block attends to the image: two groups, as the authors have them"),
    "blip2": Family("0:5 TV:13 V:20", "the query transformer reads nothing but the image: vision"),
    "instructblip": Family("T:7 TV:25 V:10", "the query transformer reads the instruction as well: fusion"),
    "llava": Family("TV:15 V:14", "the language model reads image tokens in its text: all of it is fusion"),
    "qwen2vl": Family("TV:15 V:10", "the merger's MLP lies outside the repeated blocks"),
    "vilt": Family("TV:15", "one stream from the first layer"),
    "florence": Family("T:5 TV:12 V:9", "T are the decoder's first self-attention and cross-attention query"),
    "mllama": Family("T:8 TV:5 V:27", "text layers before the first cross-attention layer are text; its gates start at zero"),
    "flava": Family("T:14 TV:13 V:14", "three towers"),
    "bridgetower": Family("T:20 TV:29 V:16", "the image reads the text in the cross-modal layers, too"),
    "chameleon": Family("TV:15 V:1", "the image enters as the indices of its code book, a table that is no layer"),
    "whisper": Family("A:16 AT:12 T:5", "audio and text fuse in every decoder block"),
    "clap": Family("A:15 T:15", "the merging layers of the audio stages lie in repeated stages"),
    "idefics3": Family("TV:15 V:13"),
    "lxmert": Family("0:1 T:6 T/V:3 TV:14 V:7", "one cross-attention serves both directions: shared; boxes are control"),
    "bert": Family("T:13"),
    "vit": Family("V:13"),
}


@functools.cache
def compiled(name: str) -> CompiledModel:
    torch.manual_seed(0)
    model, inputs = getattr(families, name)()
    return mfcompile.compile_pruned(model.eval(), inputs, sparsity=0.5)


def letters(use: WeightUse) -> str:
    return "".join(sorted(LETTERS[label] for label in use.label)) or "0"


def described(model: CompiledModel, note: str) -> dict[str, Any]:
    """Region and fate of every site, and every padding mask."""
    sites = {
        site.name: site.region + (f" (dense: {site.skipped})" if site.skipped else " (shared)" if site.is_shared else "")
        for site in model.regions.sites
    }
    if any(len(model.captured.parameter(site.fqn).shape) > 2 for site in model.regions.sites):
        note += ("; " if note else "") + CONVOLUTIONS
    return {"note": note, "padding_masks": list(model.statistics.padding_masks), "sites": sites}


@pytest.mark.parametrize("name", FAMILIES)
def test_labels(name: str) -> None:
    evidence = compiled(name).regions.evidence.values()
    linear = [uses for uses in evidence if uses[0].reading.patches is None]
    found = Counter("/".join(sorted({letters(use) for use in uses})) for uses in linear)
    assert " ".join(f"{key}:{count}" for key, count in sorted(found.items())) == FAMILIES[name].labels


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_golden(name: str, update_golden: bool) -> None:
    path = GOLDEN / f"regions_{name}.json"
    found = described(compiled(name), FAMILIES[name].note)
    if update_golden:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == found


# LLaVA asks its tower for hidden states, which transformers collects by the names of submodules: it does not run renamed.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava"])
def test_random_names_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = getattr(families, name)()
    names = rename(model.eval(), classes_too=False)
    found = mfcompile.compile_pruned(model, inputs, sparsity=0.5)
    expected = compiled(name)
    assert {names[fqn]: region for fqn, region in found.regions.weights.items()} == dict(expected.regions.weights)
    assert {names[fqn] for fqn in found.masks} == set(expected.masks)
    for fqn in found.masks:
        assert torch.equal(found.masks[fqn], expected.masks[names[fqn]]), names[fqn]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_region_is_pruned_as_asked(name: str) -> None:
    model = compiled(name)
    for region, sites in model.regions.by_region().items():
        total = sum(site.weight_count for site in sites)
        kept = sum(int(model.masks[site.fqn][site.rows[0] : site.rows[1]].sum()) for site in sites)
        assert kept == total - int(0.5 * total), region
    assert model.statistics.diagnostics == ()
