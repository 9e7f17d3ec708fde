"""Measure everything that the README and the docs state, print it, and keep it as JSON beside this file.

python benchmarks/run.py [--only pruning] [--only capture] [--only sparse]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks import capture_cost, machine, pruning_cost, sparse_models, weight_update
from benchmarks.result_tables import as_table

RESULTS = Path(__file__).resolve().parent / "results"


def pruning() -> dict[str, Any]:
    """Cost of calibration and of selection."""
    return {
        "calibration": pruning_cost.calibration_cost(),
        "selection": pruning_cost.selection_cost(),
        "selection_scaling": pruning_cost.selection_scaling(),
    }


def tavlp() -> dict[str, Any]:
    """A few cells of the task-agnostic benchmark; its data and metrics are imported only when it runs."""
    from benchmarks.tavlp.reduced import reduced

    return reduced()


BENCHMARKS = {
    "pruning": pruning,
    "capture": capture_cost.capture_cost,
    "update": weight_update.weight_update,
    "sparse": sparse_models.sparse_models,
    "tavlp": tavlp,
}


def main() -> None:
    """Run the benchmarks and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(BENCHMARKS), action="append")
    chosen = parser.parse_args().only or sorted(BENCHMARKS)
    console = Console()
    RESULTS.mkdir(exist_ok=True)
    for name in chosen:
        result = {"machine": machine.describe(), **BENCHMARKS[name]()}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        for part, figures in result.items():
            console.print(as_table(f"{name}: {part}", figures))


if __name__ == "__main__":
    main()
