"""Masks of a family, a pruner, a sparsity and a seed: made once, kept in a file, shared by all tasks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from emoji_xvlm.training import quick_attention
from torch import nn

import mfcompile
from benchmarks import machine
from benchmarks.tavlp.configuration import Scale, config_hash, mask_config, mask_seed
from benchmarks.tavlp.families.contract import Batch, Family
from benchmarks.tavlp.pruners import PrunerRow
from benchmarks.tavlp.records import read_record, write_record
from mfcompile.passes.dense_facts import DenseFacts
from mfcompile.passes.gradients import accumulate_gradients
from mfcompile.passes.mask_selection import SelectionOptions, select_masks


@dataclass(frozen=True)
class Folders:
    """Where results and masks lie.

    Attributes:
        results: JSON records, small, kept in the repository.
        masks: masks and new values, large, made again where they are missing.
        pruned: records of masks, and figures before fine-tuning; None puts them beside the results.
    """

    results: Path
    masks: Path
    pruned: Path | None = None

    @property
    def records_of_masks(self) -> Path:
        """Where what does not depend on fine-tuning lies."""
        return self.pruned or self.results

    @classmethod
    def of(cls, scale: Scale, results: Path, masks: Path) -> Folders:
        """Those of a scale.

        Args:
            scale: names the folders, or the scale that names them.
            results, masks: of all scales.
        """
        shared = scale.pruned_as or scale.name
        return cls(results / scale.name, masks / shared, results / shared)


@functools.lru_cache(maxsize=2)
def captured_family(family: Family) -> tuple[mfcompile.CapturedGraph, mfcompile.RegionMap]:
    """A family's pretrained model and its regions."""
    captured = mfcompile.capture(family.build(), family.example_inputs())
    return captured, mfcompile.infer_regions(captured)


@functools.lru_cache(maxsize=2)
def _batches(family: Family, seed: int, calibration: tuple[int, int]) -> list[Batch]:
    return family.calibration_batches(seed, *calibration)


@functools.lru_cache(maxsize=6)
def _statistics(family: Family, seed: int, calibration: tuple[int, int]) -> tuple[mfcompile.CalibrationStatistics, float]:
    """Statistics, which serve all criteria and sparsities of a seed, and the seconds they took."""
    captured, regions = captured_family(family)
    batches = _batches(family, seed, calibration)
    started = time.process_time()
    return mfcompile.calibrate(captured, batches, regions=regions), time.process_time() - started


@functools.lru_cache(maxsize=2)
def _gradients(family: Family, seed: int, calibration: tuple[int, int]) -> tuple[DenseFacts, float]:
    """Mean gradients of the dense model, which serve all sparsities of a seed, and the seconds they took."""
    captured, regions = captured_family(family)
    batches = _batches(family, seed, calibration)
    names = dict.fromkeys(site.fqn for site in regions.pruned_sites)
    started = time.process_time()
    found = accumulate_gradients(captured.module, batches, loss_of(family, {"losses": 0}), tuple(names), seed=seed)
    return DenseFacts(gradients=found), time.process_time() - started


def calibrated(
    family: Family, seed: int, calibration: tuple[int, int]
) -> tuple[mfcompile.CapturedGraph, mfcompile.RegionMap, mfcompile.CalibrationStatistics]:
    """A family's model, captured, and what calibration on the batches of a seed saw.

    Args:
        family: whose pretrained model.
        seed: of the calibration data.
        calibration: batches, and pairs in each.
    """
    return *captured_family(family), _statistics(family, seed, calibration)[0]


def masks_of(family: Family, row: PrunerRow, sparsity: float, seed: int, scale: Scale, folders: Folders) -> mfcompile.MaskSet:
    """The masks, from their file or made anew; what they cost and what is left where is in the record beside the results.

    Args:
        family: whose pretrained model is pruned.
        row: a pruner with a criterion.
        sparsity: fraction removed.
        seed: of the calibration data, and of random scores.
        scale: calibration and numbers of steps.
        folders: of records and masks.
    """
    config = mask_config(family, row, sparsity, mask_seed(row, seed), scale)
    record_file = record_path(folders, family, row, sparsity, seed)
    mask_path = folders.masks / family.name / f"{record_file.stem}.safetensors"
    record = read_record(record_file, config_hash(config))
    if record is not None and mask_path.exists():
        masks = mfcompile.MaskSet.load(mask_path)
        if masks.mask_digest() == record["mask_digest"]:
            return masks
    masks, cost = _made(family, row, sparsity, seed, scale)
    mask_path.parent.mkdir(parents=True, exist_ok=True)
    masks.save(mask_path)
    write_record(
        record_file,
        config,
        {"mask_digest": masks.mask_digest(), "cost": cost, **_sparsities(masks), **movement(masks, captured_family(family)[0])},
    )
    return masks


def record_path(folders: Folders, family: Family, row: PrunerRow, sparsity: float, seed: int) -> Path:
    """Where the record of masks lies; pruners without a seed have one for all."""
    name = f"{row.name}-{sparsity:g}-{'any' if mask_seed(row, seed) is None else seed}.json"
    return folders.records_of_masks / family.name / "masks" / name


def _made(family: Family, row: PrunerRow, sparsity: float, seed: int, scale: Scale) -> tuple[mfcompile.MaskSet, dict[str, Any]]:
    captured, regions = captured_family(family)
    batches = _batches(family, seed, scale.calibration) if row.needs_statistics or row.needs_batches else []
    statistics, calibrate_s = _statistics(family, seed, scale.calibration) if row.needs_statistics else (None, 0.0)
    facts, gradients_s = _gradients(family, seed, scale.calibration) if row.shares_gradients else (None, 0.0)
    counts = {"losses": 0, "batches": 0}
    started = time.process_time()
    with machine.peak_memory() as memory:
        masks = select_masks(
            captured,
            regions,
            statistics,
            SelectionOptions(
                sparsity,
                row.criterion or "",
                row.criterion_options(scale.pruning),
                row.allocation,
                update=row.update,
                seed=seed,
            ),
            batches=_counted(batches, counts) if row.needs_batches else None,
            loss_fn=loss_of(family, counts) if row.needs_loss else None,
            known=facts,
        )
    shared = len(batches) if row.shares_gradients else 0
    return masks, {
        "select_s": round(time.process_time() - started, 2),
        "calibrate_s": round(calibrate_s + gradients_s, 2),
        "forward_batches": (len(batches) if row.needs_statistics else 0) + counts["batches"] + shared,
        "backward_batches": counts["losses"] + shared,
        "memory_rise_mib": round(memory["rise_mib"], 1),
    }


def _counted(batches: list[Batch], counts: dict[str, int]) -> Callable[[], Iterator[Batch]]:
    def read() -> Iterator[Batch]:
        for batch in batches:
            counts["batches"] += 1
            yield batch

    return read


def loss_of(family: Family, counts: dict[str, int]) -> Callable[[nn.Module, Batch], Any]:
    """The pretraining loss of a batch in bf16; ``counts["losses"]`` goes up with every one."""

    def loss(model: nn.Module, batch: Batch) -> Any:
        counts["losses"] += 1
        with torch.autocast("cpu", torch.bfloat16), quick_attention(torch.device("cpu")):
            return family.loss(model, batch)

    return loss


def _sparsities(masks: mfcompile.MaskSet) -> dict[str, Any]:
    """Fraction removed: of all, by region, and by layer in the order of the model."""
    return {
        "sparsity": 1 - masks.kept_count / masks.weight_count,
        "region_sparsity": region_sparsity(masks),
        "layer_sparsity": {name: round(1 - mask.kept_count / mask.weight_count, 5) for name, mask in masks.packed.items()},
        "layer_region": dict(masks.regions),
        "weights": masks.weight_count,
    }


def movement(masks: mfcompile.MaskSet, captured: mfcompile.CapturedGraph) -> dict[str, float]:
    """How far an update moved the weights that stay, relative to their own size; nothing for pruners that move none."""
    moved, size = 0.0, 0.0
    for fqn in masks.new_values:
        mask, weight = masks[fqn], captured.parameter(fqn).detach()
        new = masks.updated_weight(fqn, weight)[mask].double()
        moved += float((new - weight[mask].double()).square().sum())
        size += float(weight[mask].double().square().sum())
    return {"kept_weights_moved": math.sqrt(moved / size)} if masks.new_values else {}


def region_sparsity(masks: mfcompile.MaskSet) -> dict[str, float]:
    """Fraction removed in every region."""
    found: dict[str, float] = {}
    for region in dict.fromkeys(masks.regions.values()):
        members = [mask for name, mask in masks.packed.items() if masks.regions[name] == region]
        found[region] = 1 - sum(mask.kept_count for mask in members) / sum(mask.weight_count for mask in members)
    return found
