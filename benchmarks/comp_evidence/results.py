"""What the cells say together: means over seeds, and differences of arms over the seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.comp_evidence.arms import ARMS, FLOPS, SEEDS
from benchmarks.comp_evidence.cells import Cell, dense_score, read
from benchmarks.over_seeds import Figure

MISSING = "missing"
UNREACHED = "cannot reach"
TOLERANCE = 0.01
"""A landing further from its target than this share of it is interpolated, never taken as it is."""
STANDARD_ERRORS = {3: 4.30, 4: 3.18, 5: 2.78}
"""Seeds -> how many standard errors a difference must have not to be noise: 95 % of Student's t, both sides."""
FEWEST = min(STANDARD_ERRORS)
"""Of fewer seeds, no difference is called anything but open."""


class Mean(Figure):
    """A mean that is judged."""

    @property
    def verdict(self) -> str:
        """Of a difference: "more", "less", "noise", or "open" with too few seeds."""
        if self.error is None or self.count < FEWEST:
            return "open"
        if abs(self.mean) <= STANDARD_ERRORS[self.count] * self.error:
            return "noise"
        return "more" if self.mean > 0 else "less"


class Results:
    """The cells of a folder.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Cell, dict[str, Any] | None] = {}

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """Of a cell; None where it was not run."""
        if cell not in self._read:
            self._read[cell] = read(cell, self.folder)
        return self._read[cell]

    def dense(self) -> float | None:
        """r1 of the dense model."""
        found = dense_score(self.folder)
        return None if found is None else found["r1"]

    def value(self, cell: Cell, metric: str = "r1") -> float | None:
        """A metric of a cell at its target; None where there is none."""
        record = self.record(cell)
        if record is None or "metrics" not in record:
            return None
        if abs(record["achieved"] - cell.flops) <= TOLERANCE * cell.flops:
            value: float = record["metrics"][metric]
            return value
        others = [self.record(Cell(cell.arm, share, cell.seed, cell.tuning)) for share in FLOPS]
        points = {other["achieved"]: other["metrics"][metric] for other in others if other and "metrics" in other}
        dense = dense_score(self.folder)
        return interpolated({**points, **({} if dense is None else {1.0: dense[metric]})}, cell.flops)

    def mean(self, arm: str, flops: float, tuning: str, metric: str = "r1") -> Mean | None:
        """Over the seeds that are there."""
        values = [self.value(Cell(arm, flops, seed, tuning), metric) for seed in SEEDS]
        return Mean.of([value for value in values if value is not None])

    def is_unreached(self, arm: str, flops: float, tuning: str) -> bool:
        """The arm was tried, and cannot be this small."""
        found = [self.record(Cell(arm, flops, seed, tuning)) for seed in SEEDS]
        return any(record is not None and "cannot_reach" in record for record in found)

    def difference(self, one: str, other: str, flops: float, tuning: str) -> Mean | None:
        """How much more r1 an arm has than another, over the seeds that both have."""
        pairs = [(self.value(Cell(one, flops, seed, tuning)), self.value(Cell(other, flops, seed, tuning))) for seed in SEEDS]
        return Mean.of([own - rival for own, rival in pairs if own is not None and rival is not None])

    def count(self, flops: float, tuning: str) -> int:
        """Cells that are there."""
        return sum(self.record(Cell(arm, flops, seed, tuning)) is not None for arm in ARMS for seed in SEEDS)

    def seconds(self) -> list[float]:
        """CPU seconds of every cell that was read."""
        return [record["cpu_s"] for record in self._read.values() if record is not None]


def interpolated(points: Mapping[float, float], at: float) -> float | None:
    """Linear between the two points around a place; None beyond all points."""
    below, above = max((x for x in points if x <= at), default=None), min((x for x in points if x >= at), default=None)
    if below is None or above is None:
        return None
    if below == above:
        return points[below]
    share = (at - below) / (above - below)
    return (1 - share) * points[below] + share * points[above]
