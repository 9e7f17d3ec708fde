"""The orderings that the paper found, held against the cells that are there: differences of two rows, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.tavlp.families import FAMILIES
from benchmarks.tavlp.pruners import SPARSITIES
from benchmarks.tavlp.summary import (
    STANDARD_ERRORS,
    Results,
    standard_error,
    table,
    title,
)
from benchmarks.tavlp.tasks import TASKS

HEADLINES = {"retrieval": ("tr1", "ir1"), "captioning": ("cider",), "vqa": ("accuracy",)}
"""Task -> metrics whose mean stands for it: R@1 of both directions scatters less than that of one."""
GRADIENT_FREE = ("omp", "lamp", "wanda")


@dataclass(frozen=True)
class Ordering:
    """The paper's claim that one row is above another.

    Attributes:
        claim: in words.
        above: the row that should be better.
        below: the other; several stand for the best of them.
    """

    claim: str
    above: str
    below: tuple[str, ...]


ORDERINGS = (
    Ordering("RANDOM above inversion", "random", ("inversion",)),
    Ordering("OMP above RANDOM", "omp", ("random",)),
    Ordering("MULTIFLOW above RANDOM", "multiflow", ("random",)),
    Ordering("distribution helps", "multiflow", ("without-distribution",)),
    Ordering("multimodality helps", "multiflow", ("without-multimodality",)),
    Ordering("MULTIFLOW above the best of OMP, LAMP, WANDA", "multiflow", GRADIENT_FREE),
    Ordering("MULTIFLOW above SNIP", "multiflow", ("snip",)),
    Ordering("MULTIFLOW above CHITA++", "multiflow", ("chita++",)),
)


@dataclass(frozen=True)
class Difference:
    """One row less another, on the same seeds.

    Attributes:
        rival: the other row.
        mean: of the differences.
        error: standard error of the mean, from the scatter of all rows; None where that is not known.
        count: seeds.
    """

    rival: str
    mean: float
    error: float | None
    count: int

    @property
    def verdict(self) -> str:
        """What it says of the claim that it is positive."""
        if self.error is None:
            return "noise not known"
        if abs(self.mean) < STANDARD_ERRORS * self.error:
            return "within noise"
        return "holds" if self.mean > 0 else "**does not hold**"


def difference(results: Results, family: str, task: str, ordering: Ordering, sparsity: float) -> Difference | None:
    """The row above less the (best) row below; None where they share no seed.

    Args:
        results: where cells come from.
        family, task, sparsity: of the cells.
        ordering: which rows. The best of several is chosen by its mean over the same seeds, in favour of the rival.
    """
    metrics = HEADLINES[task]
    own = results.values(family, task, ordering.above, sparsity, metrics)
    scatter = results.scatter(task, metrics)
    found: list[Difference] = []
    for rival in ordering.below:
        other = results.values(family, task, rival, sparsity, metrics)
        shared = sorted(own.keys() & other.keys())
        if shared:
            mean = statistics.fmean(own[seed] - other[seed] for seed in shared)
            error = None if scatter is None else standard_error(len(shared), len(shared), scatter)
            found.append(Difference(rival, mean, error, len(shared)))
    return min(found, key=lambda item: item.mean) if found else None


def orderings(results: Results, tasks: Sequence[str] = tuple(TASKS)) -> str:
    """A table: every claim, where there are cells to judge it by."""
    rows = [row for ordering in ORDERINGS for row in _rows(results, ordering, tasks)]
    return table(["the paper's ordering", "cells", "rival", "difference", "seeds", "here"], rows)


def _rows(results: Results, ordering: Ordering, tasks: Sequence[str]) -> Iterator[list[str]]:
    for task in tasks:
        for family in FAMILIES:
            for sparsity in SPARSITIES:
                found = difference(results, family, task, ordering, sparsity)
                if found is not None:
                    spread = "" if found.error is None else f" ± {found.error:.1f}"
                    where = f"{family}, {task}, {100 * sparsity:.0f} %"
                    shown = f"{found.mean:+.1f}{spread}"
                    yield [ordering.claim, where, title(found.rival), shown, str(found.count), found.verdict]


def headline_title(task: str) -> str:
    """How tables and pictures call the headline of a task."""
    names = [TASKS[task].metrics[metric] for metric in HEADLINES[task]]
    return names[0] if len(names) == 1 else "R@1"
