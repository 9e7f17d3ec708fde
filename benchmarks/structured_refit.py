"""What a refit of output weights is worth: held-out retrieval of both trained examples after removal, with it and without.

python -m benchmarks.structured_refit [--models emoji_xvlm emoji_blip] [--shares 0.3 0.5] [--joint] [--again]

A share of the channels and heads of every unit goes, by the scores of "wanda"; nothing is trained. Scores, and the least
squares, are of 1,024 calibration pairs, which neither training nor the test drew. ``r1`` is R@1 in per cent, the mean of both
directions by embeddings and by matching, among 300 held-out scenes (chance 0.3). ``--joint`` adds what is left of a search
(``mfcompile.prune_jointly`` at half the FLOPs, which takes tokens too), with the same search refitted and as it is. Cells that
are there are not measured again without ``--again``; the file is written after every cell.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mfcompile
from benchmarks.comp_evidence.subject import Score, batch_of
from mfcompile.comp.candidates import candidates_of
from mfcompile.comp.loss import OutputLoss, calibration_inputs
from mfcompile.comp.refit import refit_outputs
from mfcompile.frontends.program_module import program_module
from mfcompile.graph import CapturedGraph
from mfcompile.structure import find_units

RESULT = Path(__file__).resolve().parent / "results" / "structured_refit.json"
MODELS, SHARES = ("emoji_xvlm", "emoji_blip"), (0.3, 0.5)
BATCHES, BATCH = 32, 32
JOINT = "joint, half of the FLOPs"

Cells = dict[str, dict[str, Any]]


def calibration() -> list[dict[str, Tensor]]:
    """1,024 pairs, sentences padded to one length."""
    scenes = importlib.import_module("emoji_xvlm.scenes")
    return [batch_of(scenes.calibration_batch(index, BATCH)) for index in range(BATCHES)]


class Subject:
    """One of the examples, with what all of its cells share.

    Args:
        name: of its folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: nn.Module = importlib.import_module(f"{name}.model").build_model()
        self.batches = calibration()
        self.captured = mfcompile.capture(self.model, self.batches[0])
        regions = mfcompile.infer_regions(self.captured, targets=["*"])
        self.statistics = mfcompile.calibrate(self.captured, self.batches, regions=regions)

    def smaller(self, share: float, refit: bool) -> CapturedGraph:
        """Without a share of every unit."""
        given: dict[str, Any] = {"refit": True, "calibration": self.batches} if refit else {}
        return mfcompile.prune_structure(self.captured, share, statistics=self.statistics, **given)

    def joint(self) -> dict[bool, CapturedGraph]:
        """What a search leaves, as it is and refitted."""
        options = mfcompile.CompOptions()
        found = mfcompile.prune_jointly(self.captured, flops=0.5, calibration=self.batches, options=options)
        every = calibration_inputs(self.model, self.batches)
        dense = candidates_of(self.captured, options).dense
        assert dense.exported is not None  # it is what is cut
        measure = OutputLoss(program_module(dense.exported.program), every[:2])
        return {False: found.captured, True: refit_outputs(replace(found), every, measure, None, None).captured}


def measured(module: nn.Module, started: float) -> dict[str, float]:
    """The cell of a module that was begun at a time of the process."""
    spent = time.process_time() - started
    found = Score().of(module)
    return {**{name: round(value, 2) for name, value in found.items()}, "seconds": round(spent, 1)}


def run(subject: Subject, shares: list[float], is_joint: bool, cells: Cells, output: Path, again: bool) -> None:
    """Measure the cells of a model that are not there."""

    def keep(label: str, found: Mapping[str, Any]) -> None:
        cells[label] = dict(found)
        output.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")

    if again or f"{subject.name}, dense" not in cells:
        keep(f"{subject.name}, dense", measured(program_of(subject.captured), time.process_time()))
    for share in shares:
        for refit in (False, True):
            label = f"{subject.name}, {share:g}, {'refit' if refit else 'removal'}"
            if again or label not in cells:
                started = time.process_time()
                keep(label, measured(subject.smaller(share, refit).module, started))
    if is_joint and (again or f"{subject.name}, {JOINT}, refit" not in cells):
        started = time.process_time()
        for refit, captured in subject.joint().items():
            keep(f"{subject.name}, {JOINT}, {'refit' if refit else 'removal'}", measured(captured.module, started))


def program_of(captured: CapturedGraph) -> nn.Module:
    """The dense model, run as the smaller ones are."""
    return mfcompile.remove_units(captured, {find_units(captured).units[0].name: ()}).module


def page_table(cells: Mapping[str, Mapping[str, float]]) -> str:
    """The table of docs/structure.md."""
    lines = ["| model | removed of every unit | R@1 of the whole model | removal | with refit |", "|---|---|---|---|---|"]
    for label, cell in cells.items():
        name, _, rest = label.partition(", ")
        what, _, how = rest.rpartition(", ")
        if how == "removal" and f"{name}, {what}, refit" in cells:
            share = f"{float(what):.0%}".replace("%", " %") if what != JOINT else what
            found = (cells[f"{name}, dense"], cell, cells[f"{name}, {what}, refit"])
            figures = " | ".join(f"{item['r1']:.1f}" for item in found)
            lines.append(f"| {name} | {share} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--joint", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells: Cells = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in arguments.models:
        run(Subject(name), arguments.shares, arguments.joint, cells, arguments.output, arguments.again)
    table = Table("cell", *next(iter(cells.values())))
    for label, cell in cells.items():
        table.add_row(label, *map(str, cell.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
