"""What pruning costs on a model of real size: calibration against plain forward passes, selection in time and memory."""

from __future__ import annotations

import ctypes
import gc
import time
from typing import Any

import torch
from torch import Tensor

import mfcompile
from benchmarks.machine import paired, peak_memory
from benchmarks.models import base_inputs, base_model
from mfcompile.passes.allocation import allocate_by_magnitude
from mfcompile.passes.criteria.multiflow import Multiflow
from mfcompile.passes.mask_packing import kept_bits_by_site
from mfcompile.passes.mask_selection import site_weight
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.scores import WeightScores
from mfcompile.passes.selection import kept_bits
from mfcompile.region import ROWS, PruneSite


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


def selection_cost(sparsity: float = 0.63, rounds: int = 5) -> dict[str, Any]:
    """Eq. 7 and Eq. 8 for 184 M weights: whole, in time against torch.kthvalue in turns, and in memory."""
    model = base_model()
    captured = mfcompile.capture(model, base_inputs(2))
    regions = mfcompile.infer_regions(captured)
    statistics = mfcompile.calibrate(captured, [base_inputs(2)], regions=regions)
    run = PruningRun(captured, regions, sparsity, statistics=statistics)
    vars(run)["model_fingerprint"] = ""  # reads all weights too, but is no part of Eq. 7 and 8
    sites = regions.pruned_sites
    released = _release_memory()
    with peak_memory() as memory:
        started = time.perf_counter()
        masks = mfcompile.select_masks(captured, regions, statistics, sparsity=sparsity)
        whole_s = time.perf_counter() - started
    result: dict[str, Any] = {
        "prunable_weights": sum(site.weight_count for site in sites),
        "sites": len(sites),
        "selection_with_fingerprint_s": whole_s,
        "memory_was_released_before": released,
        "selection_rise_mib": memory["rise_mib"],
        "model_mib": sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20,
        "largest_layer_mib": max(site.weight_count for site in sites) * 4 / 2**20,
        "masks_mib": sum(mask.bits.nbytes for mask in masks.packed.values()) / 2**20,
    }
    parts = _Kthvalue({site.name: statistics.sites[site.name].input_norm().float() for site in sites})
    groups = {
        region: {site.name: site_weight(captured, site) for site in members} for region, members in regions.by_region().items()
    }
    ours = paired(lambda: parts.prune(groups, sparsity), lambda: run.select(Multiflow()), rounds)
    calls_s = parts.calls_s
    budget = paired(
        lambda: parts.budget(groups, sparsity),
        lambda: allocate_by_magnitude(regions.by_region(), lambda site: site_weight(captured, site), sparsity),
        rounds,
    )
    return result | {
        "kthvalue_s": ours["first_s"],
        "selection_s": ours["second_s"],
        "times_faster": 1 / ours["ratio"],
        "times_faster_low": 1 / ours["ratio_high"],
        "times_faster_high": 1 / ours["ratio_low"],
        "kthvalue_calls_alone_s": calls_s,
        "budget_kthvalue_s": budget["first_s"],
        "budget_s": budget["second_s"],
        "budget_times_faster": 1 / budget["ratio"],
        "rounds": rounds,
    }


class _Kthvalue:
    """The same with torch.kthvalue: on the joined magnitudes of a region, then on the scores of every layer.

    Written from the equations and from what the paper's published code does; it is kept short of nothing that would make it
    slower: no copy of the weights, no scores of other layers.
    """

    def __init__(self, norms: dict[str, Tensor]) -> None:
        self._norms = norms
        self.calls_s = 0.0

    def prune(self, groups: dict[str, dict[str, Tensor]], sparsity: float) -> dict[str, Tensor]:
        """Site -> mask."""
        self.calls_s = 0.0
        masks: dict[str, Tensor] = {}
        for name, (weight, pruned) in self.budget(groups, sparsity).items():
            magnitude = weight.abs()
            flow = magnitude * self._norms[name]
            score = torch.outer(flow.mean(1), flow.mean(0)) * magnitude
            masks[name] = score > self._kth(score.reshape(-1), pruned) if pruned else torch.ones_like(score, dtype=torch.bool)
        return masks

    def budget(self, groups: dict[str, dict[str, Tensor]], sparsity: float) -> dict[str, tuple[Tensor, int]]:
        """Site -> (weight, how many it loses), Eq. 7."""
        found: dict[str, tuple[Tensor, int]] = {}
        for weights in groups.values():
            joined = torch.cat([weight.abs().reshape(-1) for weight in weights.values()])
            threshold = self._kth(joined, int(sparsity * joined.numel()))
            found |= {name: (weight, int((weight.abs() <= threshold).sum())) for name, weight in weights.items()}
        return found

    def _kth(self, values: Tensor, k: int) -> Tensor:
        started = time.perf_counter()
        value = torch.kthvalue(values, k).values
        self.calls_s += time.perf_counter() - started
        return value


def selection_scaling(sparsity: float = 0.63, rounds: int = 3) -> dict[str, Any]:
    """Eq. 7 and Eq. 8 from 10 M to 1 B weights in layers of 1024 x 1024, which are views of 64 M numbers; ns per weight."""
    torch.manual_seed(0)
    side, stored = 1024, torch.randn(1 << 26) * torch.randn(1 << 26)
    norm = torch.rand(side, dtype=torch.float64) + 0.1

    def weight_of(site: PruneSite) -> Tensor:
        start = int(site.name) * 999_983 * 8 % (stored.numel() - side * side)
        return stored[start : start + side * side].view(side, side)

    def choose(layers: int) -> None:
        groups: dict[str, list[PruneSite]] = {"vision": [], "text": []}
        for index in range(layers):
            region = "vision" if index % 2 else "text"
            groups[region].append(PruneSite(str(index), str(index), (0, side), side, side, ROWS, region))
        pruned = allocate_by_magnitude(groups, weight_of, sparsity).pruned
        kept_bits_by_site(
            {site.fqn: [site] for sites in groups.values() for site in sites},
            lambda site: kept_bits(WeightScores(weight_of(site), norm), pruned[site.name]),
        )

    result: dict[str, Any] = {}
    choose(10)
    for millions in (10, 100, 184, 1000):
        layers = round(millions * 1e6 / side**2)
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            choose(layers)
            times.append(time.perf_counter() - started)
        result[f"ns_per_weight_{millions}m"] = min(times) / (layers * side**2) * 1e9
    result["rounds"] = rounds
    return result


def _release_memory() -> bool:
    """Give freed memory back to the system where the C library can, so that none of it hides what is needed anew."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return True
