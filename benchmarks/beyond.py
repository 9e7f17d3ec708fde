"""The search for a combination of criterion, allocation and update that beats MULTIFLOW with forward passes only.

    python -m benchmarks.beyond search     # combinations, on the XVLM-like family alone
    python -m benchmarks.beyond tokens     # how few calibration pairs and how much damping, on the same
    python -m benchmarks.beyond evidence   # the one that was chosen, beside MULTIFLOW, on both families, fine-tuned and not
    python -m benchmarks.beyond tables     # what docs/recipes.md shows, from the files of results

Nothing is chosen by what the BLIP-like family says. ``search`` judges by the outputs of the pruned model for held-out pairs,
against those of the dense one, before any fine-tuning; ``evidence`` fills missing cells of the task-agnostic benchmark.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mfcompile
from benchmarks import machine
from benchmarks.tavlp.__main__ import folders_of, run
from benchmarks.tavlp.cells import Choice
from benchmarks.tavlp.configuration import SMALL
from benchmarks.tavlp.families import family as family_of
from benchmarks.tavlp.families.contract import Batch
from benchmarks.tavlp.records import write_record
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.calibration import normalize_batch
from mfcompile.passes.mask_selection import select_masks
from mfcompile.passes.output_error import DenseOutputs
from mfcompile.passes.variants import read_variant

RESULTS = Path(__file__).resolve().parent / "results" / "beyond"

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"

FAMILY = "xvlm"
"""On which combinations are chosen."""

SEARCH_SPARSITY = 0.9
"""Where combinations differ most."""
SEARCH_PAIRS = 128
"""Calibration pairs: an eighth of the benchmark's, so that many combinations can be tried."""
HELD_OUT_SEED = 77
HELD_OUT_BATCHES = 3

COMBINATIONS = (
    "multiflow",
    "multiflow+sparsegpt",
    "multiflow+least-squares",
    "multiflow+gradual",
    "wanda@magnitude-per-region+least-squares",
    "magnitude@magnitude-per-region+least-squares",
    "lamp@score-per-region+least-squares",
    "multiflow@erk+least-squares",
    "multiflow@score-per-region+least-squares",
    "multiflow+least-squares,passes=10",
    "multiflow+gradual,steps=2",
    "wanda",
    "lamp",
    "wanda@erk+least-squares",
)
"""In the words of ``mfcompile compare``."""

CHOSEN = "multiflow+least-squares"
EVIDENCE = ("multiflow", "multiflow+sparsegpt", CHOSEN, "multiflow+gradual")
SPARSITIES = (0.75, 0.9)
"""Rows of the benchmark, and where."""

DAMPINGS = (1e-3, 0.01, 0.1, 1.0)
PAIRS = (4, 32)


@dataclass(frozen=True)
class Subject:
    """The dense model of a family, what calibrates it, and held-out pairs with what the dense model says of them."""

    captured: mfcompile.CapturedGraph
    regions: mfcompile.RegionMap
    batches: list[Batch]
    statistics: mfcompile.CalibrationStatistics
    held_out: DenseOutputs


@functools.cache
def subject(name: str, seed: int, pairs: int) -> Subject:
    """A family, calibrated with that many pairs."""
    family = family_of(name)
    captured = mfcompile.capture(family.build(), family.example_inputs())
    regions = mfcompile.infer_regions(captured)
    size = min(pairs, SMALL.calibration[1])
    batches = family.calibration_batches(seed, pairs // size, size)
    statistics = mfcompile.calibrate(captured, batches, regions=regions)
    return Subject(captured, regions, batches, statistics, DenseOutputs(captured, regions, _held_out(name, captured)))


def _held_out(name: str, captured: mfcompile.CapturedGraph) -> list[ExampleInputs]:
    batches = family_of(name).calibration_batches(HELD_OUT_SEED, HELD_OUT_BATCHES, SMALL.calibration[1])
    return [normalize_batch(captured, batch, index) for index, batch in enumerate(batches)]


def measured(given: Subject, word: str) -> dict[str, Any]:
    """What a combination makes of a model.

    Returns:
        ``output_error`` relative error of the outputs for held-out pairs, mean over outputs; ``seconds`` of processor time and
        ``memory_mib`` that masks and values took.
    """
    started = time.process_time()
    with machine.peak_memory() as memory:
        masks = select_masks(
            given.captured,
            given.regions,
            given.statistics,
            read_variant(word).options(SEARCH_SPARSITY, 0),
            batches=lambda: given.batches,
        )
    seconds = time.process_time() - started
    module = mfcompile.mask_module(mfcompile.apply_masks(given.captured, masks).module, masks)
    return {
        "output_error": round(given.held_out.errors(module).overall, 4),
        "seconds": round(seconds, 1),
        "memory_mib": round(memory["rise_mib"], 1),
    }


def search() -> None:
    """Every combination; one file each, which stays where it is of the same configuration."""
    for word in COMBINATIONS:
        _fill(search_path(word), {"word": word, "pairs": SEARCH_PAIRS})


def tokens() -> None:
    """Output errors by damping and number of calibration pairs: whether the update learns its calibration pairs by heart."""
    for pairs in PAIRS:
        for damping in DAMPINGS:
            _fill(tokens_path(pairs, damping), {"word": f"{CHOSEN},damping={damping!r}", "pairs": pairs})


def search_path(word: str) -> Path:
    """The file of a combination."""
    return RESULTS / "search" / f"{word}.json"


def tokens_path(pairs: int, damping: float) -> Path:
    """The file of a number of pairs and a damping."""
    return RESULTS / "tokens" / f"{pairs}-{damping:g}.json"


def _fill(path: Path, asked: dict[str, Any]) -> None:
    config = {**asked, "sparsity": SEARCH_SPARSITY, "family": FAMILY, "seed": 0, "held_out": HELD_OUT_BATCHES}
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["config"] == config:
        return
    found = measured(subject(FAMILY, 0, asked["pairs"]), asked["word"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, config, found)
    print(asked["word"], asked["pairs"], *(f"{name} {value:g}" for name, value in found.items()), flush=True)


def evidence(time_limit_s: float) -> None:
    """Cells of retrieval at both sparsities, of MULTIFLOW and of what was chosen; those of one seed before those of others."""
    choice = Choice(tasks=("retrieval",), pruners=("multiflow", CHOSEN), sparsities=SPARSITIES)
    run(choice, SMALL, torch.device("cpu"), time_limit_s)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beyond", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("search", "tokens", "evidence", "tables"))
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="MINUTES", help="begin no cell after that")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.command == "evidence":
        evidence(arguments.time_limit * 60)
    elif arguments.command == "tables":
        from benchmarks.beyond_tables import write_tables

        write_tables(folders_of(SMALL), SMALL, PAGE)
    elif arguments.command == "search":
        search()
    else:
        tokens()


if __name__ == "__main__":
    main()
