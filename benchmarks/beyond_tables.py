"""The tables of docs/recipes.md, from the files that ``benchmarks.beyond`` and ``benchmarks.tavlp`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.beyond import (
    CHOSEN,
    COMBINATIONS,
    DAMPINGS,
    EVIDENCE,
    FAMILY,
    PAIRS,
    SEARCH_PAIRS,
    SEARCH_SPARSITY,
    SPARSITIES,
    search_path,
    tokens_path,
)
from benchmarks.over_seeds import Figure
from benchmarks.tavlp.configuration import Scale
from benchmarks.tavlp.families import FAMILIES
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.summary import MISSING, Results, table, title
from mfcompile.files import write_atomically

FIRST, LAST = "<!-- tables: python -m benchmarks.beyond tables -->", "<!-- end of tables -->"
RECALLS = ("tr1", "ir1")


def write_tables(folders: Folders, scale: Scale, page: Path) -> None:
    """Put the tables between the two comments of the page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(FIRST)
    _, _, after = rest.partition(LAST)
    parts = "\n\n".join((FIRST, *_parts(Results(folders, scale)), LAST))
    write_atomically(page, f"{before}{parts}{after}".encode())


def _parts(results: Results) -> Iterator[str]:
    yield "### Retrieval, before and after fine-tuning"
    yield evidence(results)
    yield "### What it costs"
    yield costs(results)
    yield f"### What was tried: {FAMILY} at {100 * SEARCH_SPARSITY:.0f} %, {SEARCH_PAIRS} calibration pairs"
    yield searched()
    yield f"### Few calibration pairs, and damping: output errors of `{CHOSEN}`"
    yield tokens()


def searched() -> str:
    """A row for each combination, by its output error for held-out pairs."""
    found = {word: _result(search_path(word)) for word in COMBINATIONS}
    order = sorted(COMBINATIONS, key=lambda word: (found[word] or {"output_error": inf})["output_error"])
    names = (("output_error", 3), ("seconds", 0))
    rows = [[f"`{word}`", *(_shown(found[word], name, digits) for name, digits in names)] for word in order]
    return table(["combination", "output error", "seconds"], rows)


def tokens() -> str:
    """Output errors for held-out pairs: a row for each number of calibration pairs, a column for each damping."""
    rows = []
    for pairs in PAIRS:
        found = [_shown(_result(tokens_path(pairs, damping)), "output_error", 3) for damping in DAMPINGS]
        rows.append([str(pairs), *found])
    return table(["pairs", *(f"damping {damping:g}" for damping in DAMPINGS)], rows)


def evidence(results: Results) -> str:
    """R@1 of both directions before and after fine-tuning, and how far above MULTIFLOW; rows without a figure are left out."""
    rows = []
    for family in FAMILIES:
        cells = [("dense", SPARSITIES[0]), *((pruner, sparsity) for sparsity, pruner in product(SPARSITIES, EVIDENCE))]
        for pruner, sparsity in cells:
            untuned = [results.untuned(family, "retrieval", pruner, sparsity, name) for name in RECALLS]
            tuned = [results.figure(family, "retrieval", pruner, sparsity, name) for name in RECALLS]
            shown = [MISSING if one is None else str(one) for one in (*untuned, *tuned)]
            if set(shown) != {MISSING}:
                at = "" if pruner == "dense" else f" {100 * sparsity:.0f} %"
                rows.append([f"{family}{at} {title(pruner)}", *shown, _gain(results, family, pruner, sparsity) or MISSING])
    names = ["TR@1 before", "IR@1 before", "TR@1 tuned", "IR@1 tuned", "mean of both tuned, over MULTIFLOW"]
    return table(["family, sparsity, pruner", *names], rows)


def _gain(results: Results, family: str, pruner: str, sparsity: float) -> str | None:
    """Differences of the mean of both R@1 to MULTIFLOW's, seed by seed; None where no seed has both."""
    if pruner in ("dense", "multiflow"):
        return None
    own, base = (results.values(family, "retrieval", name, sparsity, RECALLS) for name in (pruner, "multiflow"))
    gains = Figure.of([own[seed] - base[seed] for seed in own if seed in base])
    return None if gains is None else f"{'+' if gains.mean > 0 else ''}{gains}"


def costs(results: Results) -> str:
    """Means over sparsities and seeds of what masks and values of a family cost."""
    rows = []
    for family, pruner in product(FAMILIES, EVIDENCE):
        records = [
            results.masks(family, PRUNERS[pruner], sparsity, seed) for sparsity, seed in product(SPARSITIES, results.seeds)
        ]
        found = [record["cost"] for record in records if record is not None]
        if found:
            rows.append([f"{family} {title(pruner)}", *_means(found)])
    return table(["family, pruner", "forward batches", "backward batches", "seconds", "memory, MiB"], rows)


def _means(costs: Sequence[dict[str, float]]) -> list[str]:
    def mean(*names: str) -> str:
        return f"{fmean(sum(cost[name] for name in names) for cost in costs):.0f}"

    return [mean("forward_batches"), mean("backward_batches"), mean("calibrate_s", "select_s"), mean("memory_rise_mib")]


def _result(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _shown(found: dict[str, Any] | None, name: str, digits: int) -> str:
    return MISSING if found is None else f"{found[name]:.{digits}f}"
