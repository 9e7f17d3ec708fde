"""Cells: one model of one family, pruned once, fine-tuned on one task and tested."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import mfcompile
from benchmarks.tavlp.configuration import Scale, cell_config, config_hash, mask_seed
from benchmarks.tavlp.families import VARIANTS
from benchmarks.tavlp.families import family as family_of
from benchmarks.tavlp.families.contract import TaskModel
from benchmarks.tavlp.finetuning import clock, fine_tune, half_precision
from benchmarks.tavlp.pruners import PRUNERS, ROWS, SEEDS, SPARSITIES
from benchmarks.tavlp.pruning import Folders, masks_of, region_sparsity
from benchmarks.tavlp.records import read_record, write_record
from benchmarks.tavlp.tasks import TASKS

FIRST_ROWS = ("dense", "random", "omp", "multiflow", "without-multimodality", "lamp", "wanda", "snip")
"""Rows that make a table worth reading, run before the others and with all seeds first."""
LAST_ROWS = ("itersnip", "chita", "chita++")
"""Rows whose masks cost as much as their cells, run when all others are there."""


@dataclass(frozen=True)
class Cell:
    """A place in the tables; the sparsity of the dense row is 0."""

    family: str
    task: str
    pruner: str
    sparsity: float
    seed: int

    def path(self, results: Path) -> Path:
        """The file of its result."""
        return results / self.family / self.task / f"{self.pruner}-{self.sparsity:g}-{self.seed}.json"

    def config(self, scale: Scale) -> dict[str, Any]:
        """All that its figures depend on."""
        return cell_config(family_of(self.family), self.task, PRUNERS[self.pruner], self.sparsity, self.seed, scale)

    def __str__(self) -> str:
        return f"{self.family} {self.task} {self.pruner} {self.sparsity:g} seed {self.seed}"


@dataclass(frozen=True)
class Choice:
    """Which cells are wanted; an empty sequence means all."""

    families: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    pruners: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()


def cells(choice: Choice, families: Collection[str]) -> Iterator[Cell]:
    """The wanted cells, those first that say most; see `_usefulness`."""
    known = (*families, *VARIANTS)
    wanted = choice.pruners or tuple(row.name for row in ROWS)
    found = [
        Cell(family, task, pruner, sparsity, seed)
        for seed, task, family in product(
            choice.seeds or SEEDS, choice.tasks or tuple(TASKS), choice.families or tuple(families)
        )
        for pruner in wanted
        for sparsity in ((0.0,) if pruner == "dense" else choice.sparsities or SPARSITIES)
    ]
    return iter(sorted(found, key=lambda cell: _usefulness(cell, known)))


def _usefulness(cell: Cell, families: Sequence[str]) -> tuple[int, ...]:
    """What cells are sorted by: retrieval before the other tasks, high sparsities before low ones, one seed before three."""
    sparsities = sorted(SPARSITIES, reverse=True)
    place = 0 if cell.pruner == "dense" else sparsities.index(cell.sparsity)
    is_first, is_lowest, is_repeat = cell.pruner in FIRST_ROWS, place == len(sparsities) - 1, cell.seed != min(SEEDS)
    if cell.pruner in LAST_ROWS:
        stage = 4
    elif is_lowest or (is_repeat and not is_first):
        stage = 3
    elif cell.task != "retrieval":
        stage = 3 if is_repeat else 2
    else:
        stage = 0 if place == 0 and not is_repeat else 1
    row = FIRST_ROWS.index(cell.pruner) if is_first else len(FIRST_ROWS)
    task = tuple(TASKS).index(cell.task)
    return (stage, place, cell.seed, not is_first, task, families.index(cell.family), row)


def run_cell(cell: Cell, scale: Scale, folders: Folders, device: torch.device) -> dict[str, Any]:
    """The metrics of a cell after fine-tuning, from its file or made now.

    Args:
        cell: which.
        scale: its size.
        folders: where results and masks lie.
        device: where the model is fine-tuned and tested; masks are made on the CPU.
    """
    config, path = cell.config(scale), cell.path(folders.results)
    record = read_record(path, config_hash(config))
    if record is None:
        write_record(path, config, _measured(cell, scale, folders, device))
        record = read_record(path, config_hash(config))
        assert record is not None
    metrics: dict[str, Any] = record["metrics"]
    return metrics


def run_untuned(cell: Cell, scale: Scale, folders: Folders, device: torch.device) -> dict[str, Any]:
    """The metrics of a pruned model before any fine-tuning, from their file or made now; cells share them.

    Args:
        cell: which; its task must have a test without fine-tuning.
        scale, folders, device: as of `run_cell`.
    """
    config, path = untuned_config(cell, scale), untuned_path(cell, folders)
    record = read_record(path, config_hash(config))
    if record is None:
        model, _ = _pruned(cell, scale, folders, device)
        metrics = _tested(model, cell, scale, device)
        write_record(path, config, {"metrics": metrics, "device": device.type})
        return metrics
    found: dict[str, Any] = record["metrics"]
    return found


def untuned_path(cell: Cell, folders: Folders) -> Path:
    """The file of the figures before fine-tuning; pruners without a seed have one for all."""
    seed = mask_seed(PRUNERS[cell.pruner], cell.seed)
    name = f"{cell.pruner}-{cell.sparsity:g}-{'any' if seed is None else seed}.json"
    return folders.records_of_masks / cell.family / f"{cell.task}-untuned" / name


def untuned_config(cell: Cell, scale: Scale) -> dict[str, Any]:
    """All that figures before fine-tuning depend on."""
    config = cell.config(scale)
    kept = ("masks", "family", "checkpoint", "task", "task_version")
    return {**{key: config[key] for key in kept}, "test_size": scale.recipes[cell.task].test_size}


def _measured(cell: Cell, scale: Scale, folders: Folders, device: torch.device) -> dict[str, Any]:
    family, task, recipe = family_of(cell.family), TASKS[cell.task], scale.recipes[cell.task]
    before = run_untuned(cell, scale, folders, device) if task.has_zero_shot else None
    model, achieved = _pruned(cell, scale, folders, device)
    tuning = fine_tune(model, task, family, recipe, cell.seed, device)
    if achieved["region_sparsity"]:
        mfcompile.verify_masks(model)
    started = clock(device)
    metrics = _tested(model, cell, scale, device)
    return {
        "metrics": metrics,
        "metrics_before": before,
        **achieved,
        "tuning_s": round(tuning.seconds, 1),
        "test_s": round(clock(device) - started, 1),
        "losses": [round(value, 4) for value in tuning.losses],
        "device": device.type,
    }


def _pruned(cell: Cell, scale: Scale, folders: Folders, device: torch.device) -> tuple[TaskModel, dict[str, Any]]:
    """The model of the task with its masks in force, in eval mode, and the sparsity that was achieved.

    Raises:
        RuntimeError: a mask found no place in the model of the task.
    """
    family, task, row = family_of(cell.family), TASKS[cell.task], PRUNERS[cell.pruner]
    masks = None if row.criterion is None else masks_of(family, row, cell.sparsity, cell.seed, scale, folders)
    torch.manual_seed(cell.seed)
    model: Any = task.model(family)
    achieved: dict[str, Any] = {"sparsity": 0.0, "region_sparsity": {}, "dense_matrices": 0}
    if masks is not None:
        moved = mfcompile.transfer_masks(masks, model, family.mask_names(cell.task))
        lost = [name for name in moved.unmatched if not name.startswith(tuple(family.left_behind(cell.task)))]
        if lost:
            raise RuntimeError(f"{cell}: masks found no place in the task's model: {moved}")
        model = mfcompile.mask_module(model, moved.masks)
        achieved = {
            "sparsity": 1 - moved.masks.kept_count / moved.masks.weight_count,
            "region_sparsity": region_sparsity(moved.masks),
            "dense_matrices": len(moved.dense),
        }
    return model.to(device).eval(), achieved


def _tested(model: TaskModel, cell: Cell, scale: Scale, device: torch.device) -> dict[str, float]:
    with torch.inference_mode(), half_precision(device, scale.recipes[cell.task]):
        return TASKS[cell.task].evaluate(model, family_of(cell.family), scale.recipes[cell.task], device)
