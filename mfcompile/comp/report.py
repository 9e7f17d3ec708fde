"""What is told of joint pruning: plain values for report.json, and a picture of the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.comp.modes import TokenMode, UnitMode
from mfcompile.report_plot import FAINT, FURTHER_COLOURS, INK, NAMED_COLOURS, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

    from mfcompile.comp.result import JointlyPruned

LABEL = "CoMP-style, one-shot: not the paper's training recipe"
"""What results are called. The paper prunes inside fine-tuning, and trains afterwards."""

TRAINED_LABEL = "CoMP-style, inside fine-tuning: the paper's recipe as far as it is known"
"""What results of ``train_jointly`` are called."""


def report_of(pruned: JointlyPruned) -> dict[str, Any]:
    """What was asked, done and measured, as plain values."""
    dense, left = pruned.flops
    parameters = tuple(_parameter_count(graph.module) for graph in (pruned.dense, pruned.captured))
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(pruned.options).items()}
    return {
        "label": LABEL if pruned.training is None else TRAINED_LABEL,
        "training": None if pruned.training is None else dict(pruned.training),
        "refit": None if pruned.refit is None else dict(pruned.refit),
        "target": pruned.target,
        "options": {**options, "caps": dict(pruned.options.caps)},
        "flops": {"dense": dense, "left": left, "share": left / dense},
        "parameters": {"dense": parameters[0], "left": parameters[1], "share": parameters[1] / parameters[0]},
        "loss": pruned.stages[-1].loss if pruned.stages else 0.0,
        "seconds_share": pruned.stages[-1].spent if pruned.stages and pruned.options.cost == "latency" else None,
        "modes": [_mode_row(mode, pruned) for mode in pruned.modes],
        "capped": list(pruned.capped),
        "skipped": [{"subject": item.subject, "reason": item.reason} for item in pruned.skipped],
        "stages": [stage.as_dict() for stage in pruned.stages],
        "digest": pruned.structure.digest(),
    }


def _mode_row(mode: UnitMode | TokenMode, pruned: JointlyPruned) -> dict[str, Any]:
    """What of a mode went."""
    stages = sum(stage.mode == mode.name for stage in pruned.stages)
    row: dict[str, Any] = {"mode": mode.name, "stages": stages, "flops_saved": _saved(mode.name, pruned)}
    if isinstance(mode, UnitMode):
        removed = pruned.structure.removed
        row["units"] = [
            {"name": unit.name, "kind": unit.kind, "elements": unit.count, "removed": len(removed.get(unit.name, ()))}
            for unit in mode.units
        ]
    else:
        row["sites"] = [
            {
                "name": site.name,
                "tokens": site.tokens,
                "protected": site.protected,
                "kept": pruned.structure.kept.get(site.name, 1.0),
            }
            for site in mode.sites
        ]
    return row


def _saved(mode: str, pruned: JointlyPruned) -> float:
    """Share of the dense FLOPs that the stages of a mode saved."""
    before = [1.0, *(stage.flops for stage in pruned.stages)]
    return sum(start - stage.flops for start, stage in zip(before, pruned.stages, strict=False) if stage.mode == mode)


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def plot_stages(report: Mapping[str, Any], directory: Path | str, *, stem: str = "stages") -> tuple[Path, Path]:
    """Draw a search as ``<stem>.png`` and ``<stem>.svg``: FLOPs that are left and those that each mode saved, and the loss.

    The files carry no date: the same report gives the same bytes.

    Args:
        report: what ``JointlyPruned.report`` gave, or the "structure" part of report.json.
        directory: where the two files go.
        stem: their name without the ending.
    """
    return save_picture(lambda: _draw(report), Path(directory) / stem)


def mode_colours(modes: Sequence[str]) -> dict[str, str]:
    """A colour per mode: that of the region for parameters, others for tokens."""
    spare = list(FURTHER_COLOURS)
    found = {}
    for mode in modes:
        kind, _, region = mode.partition(":")
        own = NAMED_COLOURS.get(region) if kind == "parameters" else None
        found[mode] = own or (spare.pop(0) if spare else FAINT)
    return found


def _draw(report: Mapping[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = report["stages"]
    figure = Figure(figsize=(min(max(7.0, 3.0 + 0.3 * len(stages)), 14.0), 5.6))
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2), "hspace": 0.12})
    _draw_saved(above, report)
    _draw_loss(below, report)
    left = above.get_position().x0
    figure.text(left, 0.965, "FLOPs left after every stage", fontsize=13, fontweight="bold")
    figure.text(
        left, 0.93, f"{report['options']['strategy']}, cost per {report['options']['cost']}. {report['label']}", color=INK
    )
    figure.subplots_adjust(top=0.82)
    return figure


def _draw_saved(axes: Axes, report: Mapping[str, Any]) -> None:
    """Stacked bars: what is left below, what each mode saved so far above it."""
    stages = report["stages"]
    modes = [row["mode"] for row in report["modes"]]
    colours = mode_colours(modes)
    saved = dict.fromkeys(modes, 0.0)
    before = 1.0
    heights: dict[str, list[float]] = {mode: [] for mode in modes}
    for stage in stages:
        saved[stage["mode"]] += before - stage["flops"]
        before = stage["flops"]
        for mode in modes:
            heights[mode].append(100 * saved[mode])
    places = list(range(1, len(stages) + 1))
    bottom = [100 * stage["flops"] for stage in stages]
    axes.bar(places, bottom, color=FAINT, alpha=0.3, width=0.8, label="left")
    for mode in modes:
        if any(heights[mode]):
            axes.bar(places, heights[mode], bottom=bottom, color=colours[mode], width=0.8, label=mode)
            bottom = [base + height for base, height in zip(bottom, heights[mode], strict=True)]
    axes.axhline(100 * report["target"], color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label="target")
    axes.set_ylim(0, 100)
    axes.set_ylabel("FLOPs (%)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=4, frameon=False, borderaxespad=0, fontsize=8)
    _plain(axes)


def _draw_loss(axes: Axes, report: Mapping[str, Any]) -> None:
    stages = report["stages"]
    colours = mode_colours([row["mode"] for row in report["modes"]])
    places = list(range(1, len(stages) + 1))
    axes.plot(places, [stage["loss"] for stage in stages], color=INK, linewidth=1.1, zorder=1)
    axes.scatter(places, [stage["loss"] for stage in stages], c=[colours[stage["mode"]] for stage in stages], s=22, zorder=2)
    axes.set_ylabel("loss against dense")
    axes.set_xlabel("stage, coloured by the mode that was taken")
    axes.set_xticks(places if len(places) <= 30 else places[:: 1 + len(places) // 30])
    axes.grid(True, axis="y", color=FAINT, alpha=0.25, linewidth=0.7)
    _plain(axes)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
