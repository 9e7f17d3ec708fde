"""What the cells say together: mean and deviation over seeds, nothing where a cell is missing or stale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.over_seeds import Figure
from benchmarks.tavlp.cells import Cell, untuned_config, untuned_path
from benchmarks.tavlp.configuration import Scale, config_hash, mask_config, mask_seed
from benchmarks.tavlp.families import FAMILIES
from benchmarks.tavlp.families import family as family_of
from benchmarks.tavlp.pruners import PRUNERS, SEEDS, SPARSITIES, PrunerRow
from benchmarks.tavlp.pruning import Folders, record_path
from benchmarks.tavlp.records import read_record

MISSING = "."
"""What a table shows where there is no cell."""
NEAR = "≈"
"""In front of figures that noise alone may keep from being the best."""
STANDARD_ERRORS = 2.0
"""A difference of fewer standard errors is noise."""


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
    _read: dict[Cell, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell; None where it is missing or stale."""
        if cell not in self._read:
            record = read_record(cell.path(self.folders.results), config_hash(cell.config(self.scale)))
            if record is None:
                return None
            self._read[cell] = record
        return self._read[cell]

    def figure(self, family: str, task: str, pruner: str, sparsity: float, metric: str) -> Figure | None:
        """A metric over the seeds.

        Args:
            family: name.
            task: name.
            pruner: name; the dense row has one sparsity, whichever is asked for.
            sparsity: fraction removed.
            metric: name.
        """
        return Figure.of(list(self.values(family, task, pruner, sparsity, (metric,)).values()))

    def values(self, family: str, task: str, pruner: str, sparsity: float, metrics: Sequence[str]) -> dict[int, float]:
        """Seed -> mean of some metrics, of the seeds that are there. Arguments as of `figure`."""
        at = 0.0 if pruner == "dense" else sparsity
        found: dict[int, float] = {}
        for seed in self.seeds:
            record = self.cell(Cell(family, task, pruner, at, seed))
            if record is not None:
                found[seed] = statistics.fmean(record["metrics"][metric] for metric in metrics)
        return found

    def scatter(self, task: str, metrics: Sequence[str]) -> float | None:
        """Standard deviation over seeds of the mean of some metrics, pooled over all rows, sparsities and families.

        Single rows have three seeds at most, whose own deviation is off by half; all rows together say what it is.

        Returns:
            None where no row has two seeds.
        """
        squares, freedom = 0.0, 0
        for family, pruner, sparsity in product(FAMILIES, PRUNERS, SPARSITIES):
            values = list(self.values(family, task, pruner, sparsity, metrics).values())
            if len(values) > 1 and (pruner != "dense" or sparsity == SPARSITIES[0]):
                squares += statistics.variance(values) * (len(values) - 1)
                freedom += len(values) - 1
        return math.sqrt(squares / freedom) if freedom else None

    def untuned(self, family: str, task: str, pruner: str, sparsity: float, *metrics: str) -> Figure | None:
        """The mean of some metrics before fine-tuning; one value for pruners without a seed. Arguments as of `figure`."""
        at = 0.0 if pruner == "dense" else sparsity
        seeds = self.seeds if PRUNERS[pruner].is_seeded else self.seeds[:1]
        records = []
        for cell in (Cell(family, task, pruner, at, seed) for seed in seeds):
            expected = config_hash(untuned_config(cell, self.scale))
            records.append(read_record(untuned_path(cell, self.folders), expected))
        there = [record["metrics"] for record in records if record is not None]
        return Figure.of([statistics.fmean(found[metric] for metric in metrics) for found in there])

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


def with_best(columns: Sequence[Sequence[Figure | None]], scatters: Sequence[float | None]) -> list[list[str]]:
    """Rows of figures as text; the largest mean of every column is bold where it has a rival, those near it have a sign.

    Args:
        columns: (columns, rows).
        scatters: (columns) standard deviation over seeds; None puts no signs.

    Returns:
        (rows, columns).
    """
    shown = []
    for column, scatter in zip(columns, scatters, strict=True):
        there = [figure for figure in column if figure is not None]
        best = max(there, key=lambda figure: figure.mean) if len(there) > 1 else None
        shown.append([_marked(item, best, scatter) for item in column])
    return [list(row) for row in zip(*shown, strict=True)]


def standard_error(one: int, two: int, scatter: float) -> float:
    """Standard error of the difference of two means over so many seeds."""
    return scatter * math.sqrt(1 / one + 1 / two)


def _marked(item: Figure | None, best: Figure | None, scatter: float | None) -> str:
    if item is None:
        return MISSING
    if best is None:
        return str(item)
    if item.mean == best.mean:
        return f"**{item}**"
    is_near = scatter is not None and best.mean - item.mean < STANDARD_ERRORS * standard_error(item.count, best.count, scatter)
    return f"{NEAR} {item}" if is_near else str(item)


def title(pruner: str) -> str:
    """How tables call a pruner."""
    return PRUNERS[pruner].title
