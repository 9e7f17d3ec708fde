"""``python -m benchmarks.comp_evidence``; see the package."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.comp_evidence.arms import ARMS, FLOPS, SEEDS, TUNINGS
from benchmarks.comp_evidence.cells import RESULTS, cells, dense_score, read, run
from benchmarks.comp_evidence.subject import Subject

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    """Run cells, or write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comp_evidence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="make the cells that are not there")
    running.add_argument("--arm", nargs="*", choices=ARMS, default=[])
    running.add_argument("--flops", nargs="*", type=float, choices=FLOPS, default=[])
    running.add_argument("--seed", nargs="*", type=int, choices=SEEDS, default=[])
    running.add_argument("--tuned", nargs="*", choices=TUNINGS, default=[])
    running.add_argument("--time-limit", type=float, metavar="MIN", help="begin no cell after this many minutes")
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--results", type=Path, default=RESULTS)
    writing = commands.add_parser("tables", help="write docs/comp_tables.md and its picture")
    writing.add_argument("--results", type=Path, default=RESULTS)
    writing.add_argument("--docs", type=Path, default=DOCS)
    arguments = parser.parse_args()
    if arguments.command == "tables":
        from benchmarks.comp_evidence.page import write_page

        print(write_page(arguments.results, arguments.docs))
        return
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    started, subject = time.monotonic(), Subject()
    dense_score(arguments.results, subject)
    for cell in cells(arguments.arm, arguments.flops, arguments.seed, arguments.tuned):
        if arguments.time_limit is not None and time.monotonic() - started > 60 * arguments.time_limit:
            print("time is up", file=sys.stderr)
            return
        if read(cell, arguments.results) is None:
            found = run(cell, subject, arguments.results)
            told = found.get("cannot_reach") or f"r1 {found['metrics']['r1']:.1f} at {found['achieved']:.3f}"
            print(f"{cell}: {told} ({found['cpu_s']} CPU s)", flush=True)


if __name__ == "__main__":
    main()
