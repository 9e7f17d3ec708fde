"""What pruning costs on a model of real size: calibration against plain forward passes, selection in time and memory."""

from __future__ import annotations

import time
from typing import Any

import torch

import mfcompile
from benchmarks.machine import paired, peak_memory
from benchmarks.models import base_inputs, base_model
from mfcompile.passes.allocation import allocate_by_magnitude
from mfcompile.passes.mask_selection import site_weight


def calibration_cost(batch: int = 8, batches: int = 3, rounds: int = 5) -> dict[str, Any]:
    """``mfcompile.calibrate`` as users call it against the same forward passes without observers, in turns."""
    model = base_model()
    inputs = base_inputs(batch)
    captured = mfcompile.capture(model, base_inputs(2))
    regions = mfcompile.infer_regions(captured)

    def plain() -> None:
        with torch.inference_mode():
            for _ in range(batches):
                model(**inputs)

    def observed() -> None:
        mfcompile.calibrate(captured, [inputs] * batches, regions=regions)

    result = paired(plain, observed, rounds)
    return {
        "batch": batch,
        "batches": batches,
        "prunable_weights": sum(site.weight_count for site in regions.pruned_sites),
        **result,
    }


def selection_cost(sparsity: float = 0.63) -> dict[str, Any]:
    """Eq. 7 and Eq. 6 + 8 for 184 M weights, against torch.kthvalue on the concatenated magnitudes for Eq. 7."""
    model = base_model()
    captured = mfcompile.capture(model, base_inputs(2))
    regions = mfcompile.infer_regions(captured)
    statistics = mfcompile.calibrate(captured, [base_inputs(2)], regions=regions)
    weights = sum(site.weight_count for site in regions.pruned_sites)
    with peak_memory() as memory:
        started = time.perf_counter()
        masks = mfcompile.select_masks(captured, regions, statistics, sparsity=sparsity)
        whole_s = time.perf_counter() - started

    def radix() -> None:
        allocate_by_magnitude(regions.by_region(), lambda site: site_weight(captured, site), sparsity)

    def kthvalue() -> None:
        for sites in regions.by_region().values():
            joined = torch.cat([site_weight(captured, site).abs().reshape(-1) for site in sites])
            torch.kthvalue(joined, int(sparsity * joined.numel()))

    budget = paired(kthvalue, radix, 3)
    return {
        "prunable_weights": weights,
        "sites": len(regions.pruned_sites),
        "selection_s": whole_s,
        "selection_rise_mib": memory["rise_mib"],
        "model_mib": sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20,
        "largest_layer_mib": max(site.weight_count for site in regions.pruned_sites) * 4 / 2**20,
        "masks_mib": sum(mask.bits.nbytes for mask in masks.packed.values()) / 2**20,
        "budget_kthvalue_s": budget["first_s"],
        "budget_radix_s": budget["second_s"],
        "budget_ratio": budget["ratio"],
    }
