"""Runs of the task-agnostic benchmark that take seconds: the real model and data, one step, few samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tavlp.cells import Cell
from benchmarks.tavlp.configuration import Scale
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.records import write_record
from benchmarks.tavlp.tasks.contract import Recipe

TINY = Scale(
    name="tiny",
    calibration=(2, 4),
    pruning={"itersnip_steps": 2, "itersnip_batches": 1, "chita_gradients": 2, "chita_steps": 2, "chita_ridge": 0.1},
    recipes={
        task: Recipe(steps=1, batch_size=4, learning_rate=1e-3, train_size=8, test_size=6)
        for task in ("retrieval", "captioning", "vqa")
    },
)


def folders(path: Path) -> Folders:
    return Folders(path / "results", path / "masks")


def other_recipe(scale: Scale, task: str, **changes: Any) -> Scale:
    return replace(scale, recipes={**scale.recipes, task: replace(scale.recipes[task], **changes)})


def made_up(cell: Cell, metrics: dict[str, float], path: Path, scale: Scale = TINY) -> None:
    """A record of a cell that nobody ran."""
    write_record(cell.path(folders(path).results), cell.config(scale), {"metrics": metrics, "metrics_before": None})
