"""A few cells made anew, beside what the repository keeps of them: whether results repeat themselves, in minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.tavlp.cells import Cell, run_cell
from benchmarks.tavlp.configuration import SMALL
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.summary import Results

ROOT = Path(__file__).resolve().parents[2]
SPARSITY = 0.75
PRUNERS = ("dense", "random", "omp", "multiflow")


def reduced() -> dict[str, Any]:
    """Retrieval of the XVLM-like family at 75 %, one seed, at the small scale; about ten minutes on two cores.

    Returns:
        For each pruner the metrics of the new cell, and ``kept_`` those of the cell in the repository, where there is one.
        Fine-tuning on another processor or another number of threads rounds otherwise: figures agree to a few points, the
        order of pruners should be the same.
    """
    kept = Results(Folders(ROOT / "benchmarks" / "results" / "tavlp" / SMALL.name, ROOT / "out" / "tavlp" / SMALL.name), SMALL)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = Folders(Path(folder) / "results", Path(folder) / "masks")
        for pruner in PRUNERS:
            cell = Cell("xvlm", "retrieval", pruner, 0.0 if pruner == "dense" else SPARSITY, 0)
            metrics = run_cell(cell, SMALL, folders, torch.device("cpu"))
            record = kept.cell(cell)
            before = {} if record is None else {f"kept_{name}": value for name, value in record["metrics"].items()}
            found[f"{cell.family} {cell.task} {pruner} {cell.sparsity:g}"] = {**metrics, **before}
    return found
