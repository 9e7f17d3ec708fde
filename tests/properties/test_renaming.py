"""No name decides anything: regions and masks are those of the dataflow.

Promised: under any other names of modules, classes and parameters, regions and masks are the same. Under another order
of registration regions are the same, and masks too where no two magnitudes or scores are equal, since ties go to the
weight that is registered first. Names of the inputs do matter: they say what an input is.
"""

from __future__ import annotations

import itertools
import random
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mfcompile
from mfcompile.inputs import output_tensors
from tests.models import tiny_vlm, vlm_batch
from tests.properties.renaming import renamed, reordered

# What a name could mislead by: words for modalities, roles and kinds of layers.
WORDS = [
    "vision", "text", "fusion", "image", "encoder", "decoder", "cross_attention", "self_attn", "query", "key", "value",
    "qkv", "proj", "head", "classifier", "lm_head", "embed_tokens", "weight", "bias", "layer", "blocks", "mlp", "norm",
    "pooler", "x", "q9", "visual", "audio", "mask", "ids", "Linear", "LayerNorm", "Embedding",
]  # fmt: skip


def batches() -> list[dict[str, Tensor]]:
    return [vlm_batch((6, 3, 5), seed=1), vlm_batch((2, 6), seed=2)]


def compiled(model: nn.Module) -> mfcompile.CompiledModel:
    return mfcompile.compile_pruned(model, vlm_batch(), calibration=batches())


@cache
def expected() -> mfcompile.CompiledModel:
    return compiled(tiny_vlm())


def computes_the_same(model: nn.Module) -> bool:
    with torch.no_grad():
        pairs = zip(
            output_tensors(model(**vlm_batch())).values(), output_tensors(tiny_vlm()(**vlm_batch())).values(), strict=True
        )
    return all(torch.equal(one, other) for one, other in pairs)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(st.lists(st.sampled_from(WORDS), min_size=3, max_size=8, unique=True), st.booleans())
def test_names_decide_nothing(words: list[str], numbered: bool) -> None:
    """Names are drawn anew for every attribute, misleading ones included."""
    counter = itertools.count(1)
    given_names = itertools.cycle(words)

    def name(old: str) -> str:
        return f"{next(given_names)}_{next(counter)}" if numbered else f"{next(given_names)}{'_' * next(counter)}"

    model, names = renamed(tiny_vlm(), name)
    assert computes_the_same(model)
    found = compiled(model)
    assert found.regions.weights == {names[fqn]: region for fqn, region in expected().regions.weights.items()}
    reasons = {site.fqn: site.skipped for site in found.regions.skipped_sites}
    assert reasons == {names[site.fqn]: site.skipped for site in expected().regions.skipped_sites}
    assert list(found.masks) == [names[fqn] for fqn in expected().masks]
    for fqn, mask in expected().masks.items():
        assert torch.equal(found.masks[names[fqn]], mask), fqn


@settings(deadline=None, max_examples=4, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_the_order_of_attributes_decides_nothing_without_ties(generator: random.Random) -> None:
    def shuffled(names: list[str]) -> list[str]:
        return generator.sample(names, len(names))

    model = reordered(tiny_vlm(), shuffled)
    assert computes_the_same(model)
    found = compiled(model)
    assert found.regions.weights == expected().regions.weights
    assert found.masks.digest() == expected().masks.digest()
