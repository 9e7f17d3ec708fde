"""The variant whose stacks differ in size: the same function, the same masks where every stack has a budget of its own."""

from __future__ import annotations

import torch

import mfcompile
from benchmarks.tavlp.families import family
from benchmarks.tavlp.families.unequal import FACTOR


def test_it_computes_what_the_family_computes_with_larger_text_weights() -> None:
    plain, unequal = family("xvlm"), family("xvlm-text-x2")
    models = [owner.build().eval() for owner in (plain, unequal)]
    (batch,) = plain.calibration_batches(0, 1, 8)
    with torch.inference_mode():
        one, two = (model(**batch) for model in models)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)
    for name, parameter in models[0].named_parameters():
        other = models[1].get_parameter(name)
        if name.startswith("text_encoder.layers.") and parameter.ndim == 2:
            assert torch.equal(other, FACTOR * parameter), name
        elif not name.startswith("text_encoder."):
            assert torch.equal(other, parameter), name


def test_one_group_for_all_stacks_spares_the_larger_one_and_groups_by_region_do_not() -> None:
    shares: dict[tuple[str, str], float] = {}
    counts = []
    for name in ("xvlm", "xvlm-text-x2"):
        owner = family(name)
        captured = mfcompile.capture(owner.build(), owner.example_inputs())
        regions = mfcompile.infer_regions(captured)
        statistics = mfcompile.calibrate(captured, owner.calibration_batches(0, 2, 8), regions=regions)
        for allocation in ("magnitude-per-region", "magnitude-global"):
            masks = mfcompile.select_masks(captured, regions, statistics, sparsity=0.75, allocation=allocation)
            kept = [masks.packed[fqn] for fqn, region in masks.regions.items() if region == "text"]
            shares[name, allocation] = 1 - sum(m.kept_count for m in kept) / sum(m.weight_count for m in kept)
            if allocation == "magnitude-per-region":
                counts.append([mask.kept_count for mask in masks.packed.values()])
    assert counts[0] == counts[1]
    assert abs(shares["xvlm-text-x2", "magnitude-per-region"] - 0.75) < 1e-4
    assert abs(shares["xvlm", "magnitude-global"] - 0.75) < 0.05
    assert shares["xvlm-text-x2", "magnitude-global"] < 0.6
