"""Check every row of the zoo, each in its own process, and write docs/zoo.md and benchmarks/results/zoo.json.

python -m benchmarks.zoo.run [PATTERN ...] [--jobs 2] [--timeout 300] [--missing] [--failed]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.zoo import page
from benchmarks.zoo.row import STAGES, Row
from benchmarks.zoo.table import all_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"


def main() -> None:
    """Check the rows that were asked for, keep the others' results, write both files."""
    arguments = _parser().parse_args()
    rows = all_rows()
    kept = _previous(rows, arguments.results)
    chosen = [row for key, row in rows.items() if _is_wanted(key, kept.get(key), arguments)]
    if not chosen:
        sys.exit(f"no row matches {' '.join(arguments.patterns) or 'what was asked for'}; keys are class names, * matches")
    console = Console()
    for number, record in enumerate(_run(chosen, arguments.jobs, arguments.timeout), 1):
        kept[record["key"]] = record
        outcome = f"[red]{record['failed']}[/] ({record['limit']}): {record['reason']}" if record["failed"] else "[green]ok[/]"
        console.print(f"{number}/{len(chosen)} {record['key']} {record['seconds']} s {outcome}", highlight=False)
        _save(rows, kept, arguments.results)
    if arguments.results == RESULTS:
        PAGE.write_text(page.render(rows, kept))
    console.print(page.summary(rows, kept))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="keys of rows, with * and ?; all rows without one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one row may take")
    parser.add_argument("--missing", action="store_true", help="only rows that have no result yet")
    parser.add_argument("--failed", action="store_true", help="only rows that failed last time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file for the results (then no page is written)")
    return parser


def _is_wanted(key: str, record: dict[str, Any] | None, arguments: argparse.Namespace) -> bool:
    if arguments.patterns and not any(fnmatch.fnmatch(key, pattern) for pattern in arguments.patterns):
        return False
    if arguments.missing and record is not None:
        return False
    return not arguments.failed or (record is not None and record["failed"] is not None)


def _previous(rows: dict[str, Row], path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {record["key"]: record for record in json.loads(path.read_text())["rows"] if record["key"] in rows}


def _save(rows: dict[str, Row], kept: dict[str, dict[str, Any]], path: Path) -> None:
    ordered = [kept[key] for key in rows if key in kept]
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(exist_ok=True)
    temporary.write_text(json.dumps({"machine": machine.describe(), "rows": ordered}, indent=1) + "\n")
    temporary.replace(path)


def _run(rows: list[Row], jobs: int, timeout: float) -> Any:
    """Records as they come, each from a process of its own: a crash or an endless loop is one row's failure."""
    context = multiprocessing.get_context("forkserver")
    # What all rows import is imported once; each row runs in a fork of that process. The library of ONNX functions alone,
    # which torch.onnx compiles from source when it is imported, takes seconds.
    context.set_forkserver_preload(
        [
            "benchmarks.zoo.check",
            "transformers",
            "onnxruntime",
            "networkx",
            "torch._dynamo",
            "onnxscript.function_libs.torch_lib.ops",
        ]
    )
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_in_process, context, row, timeout) for row in rows]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


_LAUNCH = threading.Lock()  # starting forks from several threads at once is not safe


def _in_process(context: Any, row: Row, timeout: float) -> dict[str, Any]:
    receiver, sender = context.Pipe(duplex=False)
    with _LAUNCH:
        process = context.Process(target=_child, args=(row, sender), daemon=True)
        process.start()
    sender.close()
    started = time.monotonic()
    record: dict[str, Any] = {"key": row.key, "kind": row.kind, "family": None, "passed": []}
    try:
        while "seconds" not in record:  # the last record has them
            if not receiver.poll(max(0.0, started + timeout - time.monotonic())):
                return _cut_short(record, f"took more than {timeout:.0f} seconds", started)
            record = receiver.recv()
        return record
    except EOFError:
        process.join()
        return _cut_short(record, f"the process ended with exit code {process.exitcode}", started)
    finally:
        process.kill()


def _cut_short(record: dict[str, Any], reason: str, started: float) -> dict[str, Any]:
    """The record of a row whose process did not come to its end: the stage that was running is the one that failed."""
    failed = STAGES[len(record["passed"])]
    limit = "transformers" if failed in ("build", "run") else "mfcompile"
    return {**record, "failed": failed, "reason": reason, "limit": limit, "seconds": round(time.monotonic() - started, 1)}


def _child(row: Row, sender: Any) -> None:
    # Imported here: the parent, which only collects, needs neither torch nor transformers.
    import torch

    from benchmarks.zoo.check import check

    torch.set_num_threads(1)
    sender.send(check(row, passed=sender.send))


if __name__ == "__main__":
    main()
