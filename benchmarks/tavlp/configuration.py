"""How large a run is, and what a result depends on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.tavlp.families.contract import Family
from benchmarks.tavlp.pruners import PrunerRow
from benchmarks.tavlp.tasks import TASKS
from benchmarks.tavlp.tasks.contract import Recipe


@dataclass(frozen=True)
class Scale:
    """The size of everything.

    Attributes:
        name: folder of its results.
        calibration: batches, and pairs in each; the same for all pruners of a seed.
        pruning: numbers that criteria take (see ``pruners.ROWS``).
        recipes: task -> how its models are fine-tuned.
        pruned_as: the scale of the same calibration and pruning, whose masks serve this one too.
    """

    name: str
    calibration: tuple[int, int]
    pruning: Mapping[str, float]
    recipes: Mapping[str, Recipe]
    pruned_as: str | None = None


SMALL = Scale(
    name="small",
    calibration=(32, 32),
    pruning={"itersnip_steps": 10, "itersnip_batches": 8, "chita_gradients": 32, "chita_steps": 6, "chita_ridge": 0.1},
    recipes={
        "retrieval": Recipe(steps=60, batch_size=32, learning_rate=3e-4, train_size=1_920, test_size=500),
        "captioning": Recipe(steps=110, batch_size=24, learning_rate=1e-3, train_size=1_920, test_size=300),
        "vqa": Recipe(steps=80, batch_size=32, learning_rate=1e-3, train_size=4_000, test_size=1_000),
    },
)
"""For two CPU cores: one to three minutes a cell."""

LONG = replace(
    SMALL,
    name="long",
    recipes={task: replace(recipe, steps=4 * recipe.steps) for task, recipe in SMALL.recipes.items()},
    pruned_as=SMALL.name,
)
"""As the small one, but fine-tuned for four times as many steps: which differences between pruners are a matter of time."""

FULL = Scale(
    name="full",
    calibration=(96, 32),
    pruning={"itersnip_steps": 60, "itersnip_batches": 50, "chita_gradients": 50, "chita_steps": 60, "chita_ridge": 0.1},
    recipes={
        "retrieval": Recipe(steps=600, batch_size=128, learning_rate=3e-4, train_size=8_000, test_size=1_000),
        "captioning": Recipe(steps=600, batch_size=96, learning_rate=1e-3, train_size=8_000, test_size=1_000),
        "vqa": Recipe(steps=600, batch_size=128, learning_rate=1e-3, train_size=4_000, test_size=1_000),
    },
)
"""For a GPU: the published numbers of steps and gradients of the iterated pruners."""

SCALES = {scale.name: scale for scale in (SMALL, LONG, FULL)}
LARGEST_CALIBRATION_SHARE = 0.05


def mask_config(family: Family, row: PrunerRow, sparsity: float, seed: int | None, scale: Scale) -> dict[str, Any]:
    """All that masks depend on.

    Raises:
        ValueError: calibration would be more than 5 % of pretraining.
    """
    count, size = scale.calibration
    if count * size > LARGEST_CALIBRATION_SHARE * family.pretraining_pairs:
        raise ValueError(
            f"calibration on {count * size} pairs is more than 5 % of the {family.pretraining_pairs} of pretraining"
        )
    return {
        "family": family.name,
        "checkpoint": checkpoint_hash(family.checkpoint),
        "criterion": row.criterion,
        "criterion_options": row.criterion_options(scale.pruning),
        "allocation": row.allocation,
        "update": row.update,
        "sparsity": sparsity,
        "seed": seed,
        "calibration": {"batches": count, "batch_size": size} if row.needs_statistics or row.needs_batches else None,
        **({"loss": "bf16 autocast"} if row.needs_loss else {}),
    }


def cell_config(family: Family, task: str, row: PrunerRow, sparsity: float, seed: int, scale: Scale) -> dict[str, Any]:
    """All that the figures of a cell depend on."""
    return {
        "masks": mask_config(family, row, sparsity, mask_seed(row, seed), scale) if row.criterion else None,
        "family": family.name,
        "checkpoint": checkpoint_hash(family.checkpoint),
        "task": task,
        "task_version": TASKS[task].version,
        "recipe": asdict(scale.recipes[task]),
        "seed": seed,
    }


def mask_seed(row: PrunerRow, seed: int) -> int | None:
    """The seed of the masks of a cell; None for pruners that do not depend on one."""
    return seed if row.is_seeded else None


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, the first 16 digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def checkpoint_hash(path: Path) -> str:
    """sha256 of a file of weights, the first 16 digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
