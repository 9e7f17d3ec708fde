"""Try token pruning on every model of the list, each in its own process, and write the result and the table of docs/tokens.md.

python -m benchmarks.token_families.run [PATTERN ...] [--jobs 1] [--timeout 300] [--missing]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.token_families.page import write_table

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "token_families.json"
PAGE = ROOT / "docs" / "tokens.md"


def main() -> None:
    """Try what was asked for, keep the other results, write both files."""
    from benchmarks.token_families.models import keys

    arguments = _parser().parse_args()
    kept = _kept()
    wanted = [key for key in keys() if any(fnmatch.fnmatch(key, item) for item in arguments.patterns or ["*"])]
    wanted = [key for key in wanted if not (arguments.missing and key in kept)]
    console = Console()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(_in_process, key, arguments.timeout) for key in wanted]
        for future in as_completed(futures):
            record = future.result()
            kept = {**_kept(), record["key"]: record}  # another run may have written meanwhile
            rows = [kept[key] for key in keys() if key in kept]
            RESULT.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")
            console.print(record["key"], record["failed"] or "ok", record["reason"] or "", highlight=False, soft_wrap=True)
    write_table(PAGE, [kept[key] for key in keys() if key in kept])


def _kept() -> dict[str, dict[str, Any]]:
    """Results of earlier runs."""
    return {row["key"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.exists() else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="names of models, with * and ?; all without one")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one model may take")
    parser.add_argument("--missing", action="store_true", help="only models that have no result yet")
    return parser


def _in_process(key: str, timeout: float) -> dict[str, Any]:
    """The record of one model; a crash or an endless loop is that model's failure alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.token_families.check", "transformers", "onnxruntime", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(key, sender), daemon=True)
    started = time.monotonic()
    process.start()
    sender.close()
    empty: dict[str, Any] = {"key": key, "sites": {}, "refused": {}, "failed": "run"}
    try:
        if not receiver.poll(timeout):
            return {**empty, "reason": f"took more than {timeout:.0f} seconds", "seconds": round(time.monotonic() - started, 1)}
        found: dict[str, Any] = receiver.recv()
        return found
    except EOFError:
        process.join()
        return {**empty, "reason": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()


def _child(key: str, sender: Any) -> None:
    import torch

    from benchmarks.token_families.check import check

    torch.set_num_threads(1)
    sender.send(check(key))


if __name__ == "__main__":
    main()
