"""What the cells say together: mean and deviation over seeds, nothing where a cell is missing or stale."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tavlp.cells import Cell, untuned_config, untuned_path
from benchmarks.tavlp.configuration import Scale, config_hash, mask_config, mask_seed
from benchmarks.tavlp.families import family as family_of
from benchmarks.tavlp.pruners import PRUNERS, SEEDS, PrunerRow
from benchmarks.tavlp.pruning import Folders, record_path
from benchmarks.tavlp.records import read_record

MISSING = "."
"""What a table shows where there is no cell."""


@dataclass(frozen=True)
class Figure:
    """A mean over seeds.

    Attributes:
        mean: in the unit of the values.
        deviation: sample standard deviation; None for one seed.
        count: seeds.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure | None:
        """None of no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Results:
    """The records of a scale.

    Attributes:
        folders: where they lie.
        scale: what they must be made with.
        seeds: which to average.
    """

    folders: Folders
    scale: Scale
    seeds: tuple[int, ...] = SEEDS

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell; None where it is missing or stale."""
        return read_record(cell.path(self.folders.results), config_hash(cell.config(self.scale)))

    def figure(self, family: str, task: str, pruner: str, sparsity: float, metric: str) -> Figure | None:
        """A metric over the seeds.

        Args:
            family: name.
            task: name.
            pruner: name; the dense row has one sparsity, whichever is asked for.
            sparsity: fraction removed.
            metric: name.
        """
        at = 0.0 if pruner == "dense" else sparsity
        records = [self.cell(Cell(family, task, pruner, at, seed)) for seed in self.seeds]
        return Figure.of([record["metrics"][metric] for record in records if record is not None])

    def untuned(self, family: str, task: str, pruner: str, sparsity: float, metric: str) -> Figure | None:
        """A metric before fine-tuning over the seeds; one value for pruners without a seed. Arguments as of `figure`."""
        at = 0.0 if pruner == "dense" else sparsity
        seeds = self.seeds if PRUNERS[pruner].is_seeded else self.seeds[:1]
        records = []
        for cell in (Cell(family, task, pruner, at, seed) for seed in seeds):
            expected = config_hash(untuned_config(cell, self.scale))
            records.append(read_record(untuned_path(cell, self.folders), expected))
        return Figure.of([record["metrics"][metric] for record in records if record is not None])

    def masks(self, family: str, row: PrunerRow, sparsity: float, seed: int) -> dict[str, Any] | None:
        """The record of masks: what they cost and what is left where."""
        owner = family_of(family)
        wanted = config_hash(mask_config(owner, row, sparsity, mask_seed(row, seed), self.scale))
        return read_record(record_path(self.folders, owner, row, sparsity, seed), wanted)

    def count(self, cells: Iterable[Cell]) -> tuple[int, int]:
        """Cells that are there, and all."""
        found = [self.cell(cell) is not None for cell in cells]
        return sum(found), len(found)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def with_best(columns: Sequence[Sequence[Figure | None]]) -> list[list[str]]:
    """Rows of figures as text; the largest mean of every column is bold where it has a rival.

    Args:
        columns: (columns, rows).

    Returns:
        (rows, columns).
    """
    shown = []
    for column in columns:
        means = [figure.mean for figure in column if figure is not None]
        best = max(means) if len(means) > 1 else None
        shown.append([MISSING if item is None else f"**{item}**" if item.mean == best else str(item) for item in column])
    return [list(row) for row in zip(*shown, strict=True)]


def title(pruner: str) -> str:
    """How tables call a pruner."""
    return PRUNERS[pruner].title
