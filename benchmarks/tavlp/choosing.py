"""Which pruner to choose: a table a sparsity, the best rows first."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product

from benchmarks.over_seeds import Figure
from benchmarks.tavlp.families import FAMILIES
from benchmarks.tavlp.orderings import HEADLINES, headline_title
from benchmarks.tavlp.pruners import PRUNERS, SPARSITIES
from benchmarks.tavlp.summary import MISSING, Results, table, title, with_best
from benchmarks.tavlp.tasks import TASKS


def choice(results: Results) -> str:
    """For every sparsity: pruners with any cell, what they ask for, the headline of every task and family, and their mean
    share of the dense model's. Rows with all cells come first, by that share; the others keep their order."""
    parts = []
    for sparsity in SPARSITIES:
        found = _table(results, sparsity)
        if found:
            parts.append(f"### {100 * sparsity:.0f} % removed\n\n{found}")
    return "\n\n".join(parts)


def _table(results: Results, sparsity: float) -> str:
    places = [
        (family, task)
        for task, family in product(TASKS, FAMILIES)
        if any(_figure(results, family, task, name, sparsity) for name in PRUNERS if name != "dense")
    ]
    names = [
        name
        for name in PRUNERS
        if name != "dense" and any(_figure(results, family, task, name, sparsity) for family, task in places)
    ]
    columns = [[_figure(results, family, task, name, sparsity) for name in names] for family, task in places]
    dense = [_figure(results, family, task, "dense", sparsity) for family, task in places]
    shares = [_share(row, dense) for row in zip(*columns, strict=True)]
    shown = with_best(columns, [results.scatter(task, HEADLINES[task]) for _, task in places])
    rows = [
        [title(name), PRUNERS[name].asks_for, *cells, MISSING if share is None else f"{100 * share:.0f}"]
        for name, cells, share in zip(names, shown, shares, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda place: -(shares[place] or 0.0))
    top = ["DENSE", "", *(MISSING if figure is None else str(figure) for figure in dense), "100"]
    headings = ["pruner", "asks for", *(f"{family} {headline_title(task)}" for family, task in places), "of dense, %"]
    return table(headings, [top, *(rows[place] for place in order)]) if names else ""


def _figure(results: Results, family: str, task: str, pruner: str, sparsity: float) -> Figure | None:
    return Figure.of(list(results.values(family, task, pruner, sparsity, HEADLINES[task]).values()))


def _share(row: Sequence[Figure | None], dense: Sequence[Figure | None]) -> float | None:
    """Mean over columns of what is left of the dense model's figure; None where a cell is missing."""
    shares = [one.mean / whole.mean for one, whole in zip(row, dense, strict=True) if one is not None and whole is not None]
    return statistics.fmean(shares) if len(shares) == len(dense) else None
