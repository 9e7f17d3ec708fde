"""Units removed from CLIP-, BLIP- and LLaVA-like models, and MULTIFLOW on what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mfcompile
from tests.structured_models import check_removal, largest_difference, outputs, spread_out
from tests.token_models import blip_like, clip_like, llava_like


@pytest.mark.parametrize("family", [clip_like, blip_like, llava_like])
def test_removal_is_zeros_in_the_output_weight_and_multiflow_runs_on_what_is_left(family: Any) -> None:
    model, batch = family()
    spread_out(model)
    biases = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    captured = mfcompile.with_token_program(mfcompile.capture(model, batch))
    units, smaller = check_removal(model, batch, captured)
    own = dict(smaller.module.named_parameters())
    cut = {name for name in biases if own[name].shape != model.get_parameter(name).shape}
    assert cut  # biases of what is gone are gone
    assert {unit.output_weight for unit in units.units} <= {
        name for name, parameter in own.items() if parameter.shape != model.get_parameter(name).shape
    }
    regions = mfcompile.infer_regions(smaller)
    statistics = mfcompile.calibrate(smaller, [batch], regions=regions)
    masks = mfcompile.select_masks(smaller, regions, statistics, sparsity=0.5, criterion="multiflow")
    assert masks.weight_count == sum(own[site.fqn].numel() for site in regions.pruned_sites)
    assert masks.kept_count == masks.weight_count - int(0.5 * masks.weight_count)
    masked = mfcompile.apply_masks(smaller, masks)
    found = outputs(mfcompile.mask_module(masked.module, masks), batch)
    before = outputs(smaller.module, batch)
    with torch.no_grad():
        for name in masks:
            own[name].mul_(masks[name])
    assert largest_difference(outputs(smaller.module, batch), found) < 1e-4
    assert largest_difference(before, found) > 1e-2
