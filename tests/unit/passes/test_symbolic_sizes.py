"""Sizes that only values decide: images of a batch that are left out because they are blank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Idefics3Config, Idefics3Model

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.passes.flops import count_flops
from mfcompile.passes.symbolic_sizes import values_in_example
from tests.structured_models import largest_difference, outputs
from tests.token_models import clip_like

IMAGE = 4


def idefics3_like() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two samples of up to two images each; one image is blank and belongs to no token."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "model_type": "llama", "vocab_size": 99, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = Idefics3Config(
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, text_config=text, image_token_id=IMAGE, scale_factor=2
    )
    model: nn.Module = Idefics3Model(config)
    batch = {
        "input_ids": torch.randint(5, 99, (2, 10)),
        "attention_mask": torch.ones(2, 10, dtype=torch.long),
        "pixel_values": torch.randn(2, 2, 3, 16, 16),
    }
    batch["input_ids"][0, :2], batch["input_ids"][1, 0] = IMAGE, IMAGE
    batch["pixel_values"][1, 1] = 0.0
    return model.eval(), batch


@pytest.fixture(scope="module")
def idefics() -> tuple[nn.Module, dict[str, Tensor], CapturedGraph]:
    model, batch = idefics3_like()
    return model, batch, mfcompile.with_token_program(mfcompile.capture(model, batch))


def flops_of(model: nn.Module, batch: dict[str, Tensor]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    return int(counter.get_total_flops())


def test_images_of_the_example_are_counted(idefics: tuple[nn.Module, dict[str, Tensor], CapturedGraph]) -> None:
    """torch counts what the eager model multiplies."""
    model, batch, captured = idefics
    assert captured.exported is not None
    program = captured.exported.program
    assert 3 in values_in_example(program).values()
    assert count_flops(program).total == pytest.approx(flops_of(model, batch), rel=0.02)  # of rotary tables
    full = dict(batch, pixel_values=torch.ones(2, 2, 3, 16, 16), input_ids=batch["input_ids"].clone())
    full["input_ids"][1, 1] = IMAGE
    assert flops_of(model, full) > 1.1 * flops_of(model, batch)  # so that the number of images does show


def test_nothing_is_run_where_inputs_decide_all_sizes() -> None:
    model, batch = clip_like()
    captured = mfcompile.with_token_program(mfcompile.capture(model, batch))
    assert captured.exported is not None
    assert values_in_example(captured.exported.program) == {}


def test_tokens_are_cut_in_images_whose_number_is_open(
    idefics: tuple[nn.Module, dict[str, Tensor], CapturedGraph],
) -> None:
    _, batch, captured = idefics
    sites = mfcompile.find_token_sites(captured).sites
    assert sum(site.name.startswith("vision_model") for site in sites) == 2
    whole = mfcompile.prune_tokens(captured, {site.name: site.tokens for site in sites})
    dense = outputs(captured.module, batch)
    assert all(torch.equal(value, dense[name]) for name, value in outputs(whole.module, batch).items())
    fewer = mfcompile.prune_tokens(captured, {"vision_model.encoder.layers.0.self_attn": 3})
    found = outputs(fewer.module, batch)
    assert 1e-4 < largest_difference(dense, found) < 1e3


def test_heads_without_a_result_are_found_beside_an_open_batch(
    idefics: tuple[nn.Module, dict[str, Tensor], CapturedGraph],
) -> None:
    """Eq. 7 of CoMP: by masks, and by factors of one's own, the same tokens stay."""
    model, batch, captured = idefics
    site = "vision_model.encoder.layers.0.self_attn"
    weight = model.get_parameter(f"{site}.out_proj.weight")
    before = weight.detach().clone()
    expected = mfcompile.prune_tokens(captured, {site: 2}, head_factors={site: torch.tensor([1.0, 0.0, 1.0, 1.0])})
    with torch.no_grad():
        weight[:, 8:16] = 0.0
    try:
        found = outputs(mfcompile.prune_tokens(captured, {site: 2}).module, batch)
        assert all(torch.equal(value, found[name]) for name, value in outputs(expected.module, batch).items())
    finally:
        with torch.no_grad():
            weight.copy_(before)
