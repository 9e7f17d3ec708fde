"""The plan of ``mfcompile prune --dry-run``: what would be pruned, and how large the file would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mfcompile.cli import tables
from mfcompile.cli.console import Terminal
from mfcompile.cli.loading import capture_source, load_recipe
from mfcompile.recipe import Recipe

if TYPE_CHECKING:
    from mfcompile.graph import CapturedGraph
    from mfcompile.region import RegionMap

VALUE_BYTES = {"fp32": 4, "fp16": 2}
GAP_BYTES = 1
"""Bytes by which packed storage says where a kept weight is."""


def show(recipe: Recipe, terminal: Terminal) -> None:
    """Capture the model and print the plan; nothing is calibrated, nothing is written."""
    with terminal.progress() as progress:
        source = load_recipe(recipe, progress)
        captured, regions = capture_source(source, vars(recipe), progress)
    view = describe(captured, regions, recipe)
    out = terminal.out
    out.print(tables.inputs_table(view))
    out.print(tables.plan_table(view))
    skipped = tables.skipped_table(view)
    if skipped is not None:
        out.print(skipped)
    for item in view["diagnostics"]:
        terminal.say(f"note: {item['subject']}: {item['reason']}")
    given = "calibration_batches" if source.calibration else "the example inputs (no calibration data is defined)"
    data = str(recipe.calibration) if recipe.calibration else given
    terminal.say(f"Calibration: with {data}.")
    files = "In ONNX, in parts:" if recipe.split else "In model.onnx:"
    predicted = f" {files} about {tables.size(view['predicted_bytes'])} ({recipe.format}, {recipe.values})."
    terminal.say(
        f"Parameters: {view['parameters']:,}, {tables.size(view['dense_bytes'])} dense." + (predicted if recipe.onnx else "")
    )
    terminal.say("This was a dry run: nothing was written.")


def describe(captured: CapturedGraph, regions: RegionMap, recipe: Recipe) -> dict[str, Any]:
    """The plan as JSON."""
    from mfcompile.passes.pruning_run import sparsity_of
    from mfcompile.passes.sparsity_patterns import parse_pattern
    from mfcompile.report import describe_plan

    sparsity = sparsity_of(recipe.sparsity, parse_pattern(recipe.pattern), regions)
    rows: list[dict[str, Any]] = []
    for region, sites in regions.by_region().items():
        weights = sum(site.weight_count for site in sites)
        own = sparsity[region] if isinstance(sparsity, Mapping) else sparsity
        rows.append(
            {
                "region": region,
                "sites": len(sites),
                "weights": weights,
                "kept": weights - int(own * weights),  # what an allocation by region gives it
                "sparsity_requested": own,
            }
        )
    parameters = list(captured.module.parameters())
    dense = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    prunable, kept = (sum(row[key] for row in rows) for key in ("weights", "kept"))
    return {
        **describe_plan(captured, regions),
        "sparsity": 1 - kept / prunable if prunable else 0.0,
        "plan": rows,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dense_bytes": dense,
        "predicted_bytes": dense - 4 * prunable + stored_bytes(prunable, kept, recipe),
    }


def stored_bytes(weights: int, kept: int, recipe: Recipe) -> float:
    """About how many bytes pruned weights take in the ONNX file: whichever of packed and dense is smaller."""
    dense = weights * VALUE_BYTES[recipe.values]
    if recipe.format == "dense":
        return dense
    return min(dense, kept * (VALUE_BYTES[recipe.values] + GAP_BYTES))
