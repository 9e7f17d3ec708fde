"""A mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


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
    def of(cls, values: Sequence[float]) -> Self | None:
        """None of no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one seed."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread} ({self.count})"
