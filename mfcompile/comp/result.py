"""The result of joint pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mfcompile.comp.modes import TokenMode, UnitMode
from mfcompile.comp.options import CompOptions
from mfcompile.comp.structure import Structure
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.mode_search import Stage


@dataclass(frozen=True)
class JointlyPruned:
    """A model without some of its units and tokens, and how it came to that.

    Attributes:
        captured: the graph of a smaller trainable module; it can be calibrated, masked and exported like any other.
        dense: the graph that it was made from.
        structure: what was taken.
        stages: the trace: mode, FLOPs, cost and R table of every stage.
        modes: what could go.
        capped: modes of which nothing more could go.
        skipped: units and sites that belong to no mode, and why.
        options: what the search was asked for.
        target: FLOPs asked for, as a share of the dense model's.
        flops: (dense, left) for inputs of the sizes of the example.
        training: what training took part ("stage_steps", "recovery_steps") and the "loss" after it; None in one shot.
        refit: the "loss" after output weights were refitted, and for each the "error" of its output as a share of that of
            removal alone, None where it stayed, with the reason in "left"; None without a refit.
    """

    captured: CapturedGraph
    dense: CapturedGraph
    structure: Structure
    stages: tuple[Stage, ...]
    modes: tuple[UnitMode | TokenMode, ...]
    capped: tuple[str, ...]
    skipped: tuple[Diagnostic, ...]
    options: CompOptions
    target: float
    flops: tuple[int, int]
    training: Mapping[str, Any] | None = None
    refit: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        sizes = {unit.name: unit.count for mode in self.modes if isinstance(mode, UnitMode) for unit in mode.units}
        taken = {name: len(elements) for name, elements in self.structure.removed.items() if elements}
        lines = [
            f"JointlyPruned({type(self.dense.module).__name__}, {self.flops[1] / self.flops[0]:.3f} of the FLOPs, "
            f"{len(self.stages)} stages)"
        ]
        lines += [f"  {name}: {count} of {sizes[name]} taken out" for name, count in taken.items()]
        lines += [f"  {site}: {share:.2f} of the tokens stay" for site, share in self.structure.kept.items()]
        lines += [f"  note: {item}" for item in self.skipped]
        return "\n".join(lines)

    @property
    def module(self) -> nn.Module:
        """The smaller module."""
        return self.captured.module

    def report(self) -> dict[str, Any]:
        """What was done and measured, as plain values for report.json."""
        from mfcompile.comp.report import report_of

        return report_of(self)

    def plot(self, directory: Path | str, *, stem: str = "stages") -> tuple[Path, Path]:
        """Draw the trace as ``<stem>.png`` and ``<stem>.svg``: FLOPs that are left after every stage, and the loss."""
        from mfcompile.comp.report import plot_stages

        return plot_stages(self.report(), directory, stem=stem)
