"""Command line of the task-agnostic benchmark."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.tavlp.cells import Cell, Choice, cells, run_cell, run_untuned, untuned_config, untuned_path
from benchmarks.tavlp.configuration import SCALES, Scale, config_hash
from benchmarks.tavlp.families import FAMILIES, VARIANTS, family
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.records import read_record
from benchmarks.tavlp.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "tavlp"
MASKS = ROOT / "out" / "tavlp"


def folders_of(scale: Scale) -> Folders:
    """Where the results of a scale lie."""
    return Folders.of(scale, RESULTS, MASKS)


def run(
    choice: Choice, scale: Scale, device: torch.device, time_limit_s: float = float("inf"), *, is_tuned: bool = True
) -> list[Cell]:
    """Make the wanted cells that are missing or stale; print a line for each.

    Args:
        choice: which cells.
        scale: their size.
        device: where models are fine-tuned.
        time_limit_s: no cell is begun after that many seconds.
        is_tuned: False for the figures before fine-tuning alone, of tasks that have any.

    Returns:
        Cells that are still missing.
    """
    folders = folders_of(scale)
    wanted = [cell for cell in cells(choice, FAMILIES) if is_tuned or TASKS[cell.task].has_zero_shot]
    left = [cell for cell in wanted if not _is_done(cell, scale, folders, is_tuned)]
    print(f"{len(left)} cells to do", flush=True)
    started = time.monotonic()
    while left and time.monotonic() - started < time_limit_s:
        cell = left.pop(0)
        if _is_done(cell, scale, folders, is_tuned):  # by another process, or with another seed
            continue
        begun = time.monotonic()
        metrics = (run_cell if is_tuned else run_untuned)(cell, scale, folders, device)
        shown = " ".join(f"{name} {metrics[name]:.1f}" for name in TASKS[cell.task].metrics)
        print(f"{cell}: {shown} ({time.monotonic() - begun:.0f} s, {len(left)} left)", flush=True)
    return left


def _is_done(cell: Cell, scale: Scale, folders: Folders, is_tuned: bool) -> bool:
    if not is_tuned:
        return read_record(untuned_path(cell, folders), config_hash(untuned_config(cell, scale))) is not None
    return read_record(cell.path(folders.results), config_hash(cell.config(scale))) is not None


def main() -> None:
    """Parse and run."""
    arguments = _parser().parse_args()
    scale = SCALES[arguments.scale]
    if arguments.command == "differences":
        from benchmarks.tavlp.differences import differences, differences_of

        for name in FAMILIES:
            differences_of(family(name), scale, folders_of(scale))
        print(differences(scale, folders_of(scale)))
        return
    if arguments.command == "ridge":
        from benchmarks.tavlp.ridge import ridges_of

        torch.set_num_threads(1)
        for name in FAMILIES:
            for row in ridges_of(family(name), scale, folders_of(scale)) or []:
                print(f"{name}: ridge {row['ridge']:g}: kept weights moved by {row['moved']:.3g}, loss {row['loss']:.3f}")
        return
    if arguments.command == "tables":
        from benchmarks.tavlp.page import write_page

        write_page(folders_of(scale), scale, ROOT / "docs")
        return
    choice = Choice(
        tuple(arguments.family),
        tuple(arguments.task),
        tuple(arguments.pruner),
        tuple(arguments.sparsity),
        tuple(arguments.seed),
    )
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    left = run(choice, scale, device, arguments.time_limit * 60, is_tuned=not arguments.untuned)
    if left:
        print(f"{len(left)} cells are left, the next is {left[0]}")
        sys.exit(3)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tavlp", description="The task-agnostic pruning benchmark.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="fill missing and stale cells; exit code 3 where the time limit leaves some")
    runs.add_argument("--family", action="append", default=[], choices=sorted(FAMILIES | VARIANTS))
    runs.add_argument("--task", action="append", default=[], choices=sorted(TASKS))
    runs.add_argument("--pruner", action="append", default=[], choices=sorted(PRUNERS))
    runs.add_argument("--sparsity", action="append", default=[], type=float)
    runs.add_argument("--seed", action="append", default=[], type=int)
    runs.add_argument("--time-limit", type=float, default=float("inf"), metavar="MINUTES", help="begin no cell after that")
    runs.add_argument("--device", default="cpu", help="where models are fine-tuned; masks are made on the CPU")
    runs.add_argument("--threads", type=int, default=torch.get_num_threads())
    runs.add_argument("--untuned", action="store_true", help="only the figures of pruned models before fine-tuning")
    tables = commands.add_parser("tables", help="write docs/benchmark_tables.md and its figures from the results")
    differences = commands.add_parser("differences", help="which weights pruners share, what layers keep")
    ridge = commands.add_parser("ridge", help="what CHITA's ridge does, on calibration data that no pruner saw")
    for command in (runs, tables, differences, ridge):
        command.add_argument("--scale", choices=sorted(SCALES), default="small")
    return parser


if __name__ == "__main__":
    main()
