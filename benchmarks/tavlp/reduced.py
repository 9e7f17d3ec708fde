"""A few cells made anew, beside what the repository keeps of them: whether results repeat themselves, in minutes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.tavlp.cells import Cell, run_cell
from benchmarks.tavlp.configuration import SMALL
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.summary import Results

ROOT = Path(__file__).resolve().parents[2]
SPARSITY = 0.9
PRUNERS = ("random", "omp", "multiflow")


def reduced() -> dict[str, Any]:
    """Retrieval of the XVLM-like family at 90 %, one seed, at the small scale, on one thread as the cells that are kept.

    Returns:
        For each pruner the metrics of the new cell, and those of the cell in the repository, where there is one, with the
        largest difference of a metric. The same code, processor and versions repeat a cell to the last digit; others round
        otherwise, and figures agree to a few points.
    """
    kept = Results(Folders.of(SMALL, ROOT / "benchmarks" / "results" / "tavlp", ROOT / "out" / "tavlp"), SMALL)
    found: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            folders = Folders(Path(folder) / "results", Path(folder) / "masks")
            for pruner in PRUNERS:
                cell = Cell("xvlm", "retrieval", pruner, SPARSITY, 0)
                metrics = run_cell(cell, SMALL, folders, torch.device("cpu"))
                record = kept.cell(cell)
                found[str(cell)] = beside(metrics, None if record is None else record["metrics"])
    finally:
        torch.set_num_threads(threads)
    return found


def beside(metrics: Mapping[str, float], kept: Mapping[str, float] | None) -> dict[str, float]:
    """Metrics of a new cell, those of a kept one (``kept_``), and ``largest_difference``; the new ones alone without it."""
    if kept is None:
        return dict(metrics)
    differences = [abs(value - kept[name]) for name, value in metrics.items()]
    return {**metrics, **{f"kept_{name}": value for name, value in kept.items()}, "largest_difference": max(differences)}
