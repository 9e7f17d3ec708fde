"""The plan of ``mfcompile prune --dry-run``: what would be pruned, and how large the file would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mfcompile.cli import tables
from mfcompile.cli.console import Terminal
from mfcompile.cli.loading import capture_source, load_recipe, merged
from mfcompile.cli.method_options import choices_table, find_modes, joint_request_of
from mfcompile.cli.pruning_options import Sparsity, check_request, sets_sparsity
from mfcompile.cli.token_options import cuts_table, request_of
from mfcompile.recipe import Recipe

if TYPE_CHECKING:
    from mfcompile.exporters.packing import EncodingPlan
    from mfcompile.frontends.sources import ModelSource
    from mfcompile.graph import CapturedGraph
    from mfcompile.passes.criteria.base import Pruner
    from mfcompile.region import RegionMap

SHARED_BY_ALL = ("magnitude-global", "score-global", "erk")
"""Allocations of which a region does not know its share before scores are known."""


def show(recipe: Recipe, wanted: Sequence[Sparsity], terminal: Terminal) -> None:
    """Capture the model and print the plan; nothing is calibrated, nothing is written.

    Args:
        recipe: what is asked for.
        wanted: all sparsities that are asked for; none for the recipe's.
        terminal: where it is printed.
    """
    with terminal.progress() as progress:
        source = load_recipe(recipe, progress)
        chosen = check_request(recipe, wanted, source)
        captured, regions = capture_source(source, vars(recipe), progress, request_of(recipe))
        request = joint_request_of(recipe)
        modes = [] if request is None else find_modes(captured, request, merged(source, vars(recipe))["modalities"])
    if modes:
        terminal.out.print(choices_table(modes))
        terminal.say("note: what of it goes is found by a search that runs the model; what follows is the whole model\n")
    asked = wanted or (recipe.sparsity,)
    asked = (0.0,) if request is not None and request.criterion is None else asked
    views = [describe(captured, regions, recipe.override({"sparsity": one})) for one in asked]
    view, out = views[0], terminal.out
    out.print(tables.inputs_table(view))
    if view["tokens"]:
        out.print(cuts_table(view["tokens"]))
    for one in views:
        out.print(tables.plan_table(one))
    name = _allocation(recipe, chosen)
    if name in SHARED_BY_ALL and not isinstance(recipe.sparsity, Mapping):
        terminal.say(f"note: {name} shares out one budget among all layers: only the total is certain, not what a region loses")
    skipped = tables.skipped_table(view)
    if skipped is not None:
        out.print(skipped)
    for line in tables.note_lines(view["diagnostics"]):
        terminal.say(line)
    terminal.say(f"Calibration: {_data(recipe, source, chosen)}.")
    files = "In ONNX, in parts:" if recipe.split else "In model.onnx:"
    sizes = ", ".join(tables.size(one["predicted_bytes"]) for one in views)
    predicted = f" {files} about {sizes} ({recipe.format}, {recipe.values})."
    terminal.say(
        f"Parameters: {view['parameters']:,}, {tables.size(view['dense_bytes'])} dense." + (predicted if recipe.onnx else "")
    )
    if recipe.onnx:
        peaks = ", ".join(tables.size(one["load_peak_bytes"]) for one in views)
        ratios = ", ".join(f"{one['load_time_ratio']:.1f}x" for one in views)
        terminal.say(
            f"Load, predicted: stock onnxruntime takes about {peaks} of memory to create a session, and {ratios} of the dense "
            f"file's time; mfcompile.load_session takes about the dense file's memory."
        )
    terminal.say("This was a dry run: nothing was written.")


def _allocation(recipe: Recipe, chosen: Pruner) -> str | None:
    """Name of the allocation that is in force; None where the pattern, or a sparsity per layer, leaves nothing to allocate."""
    return None if sets_sparsity(vars(recipe)) else str(recipe.allocation or chosen.allocation)


def _data(recipe: Recipe, source: ModelSource, chosen: Pruner) -> str:
    """What the model will be run on."""
    from mfcompile.passes.criteria.base import Need

    runs = Need.GRADIENTS in chosen.needs or recipe.update is not None or joint_request_of(recipe) is not None
    if not chosen.needs and not runs:
        return f"none, the criterion {chosen.name} needs none"
    if recipe.statistics is not None and not runs:
        return f"none, with the statistics of {recipe.statistics}"
    given = "calibration_batches" if source.calibration else "the example inputs (no calibration data is defined)"
    return f"with {recipe.calibration or given}"


def describe(captured: CapturedGraph, regions: RegionMap, recipe: Recipe) -> dict[str, Any]:
    """The plan as JSON."""
    from mfcompile.passes.mask_selection import allocation_by_site
    from mfcompile.passes.pruning_run import sparsity_of
    from mfcompile.passes.sparsity_patterns import parse_pattern
    from mfcompile.report import describe_plan

    allocation = allocation_by_site(recipe.allocation, captured, regions)
    sparsity = sparsity_of(recipe.sparsity, parse_pattern(recipe.pattern), regions, allocation)
    rows: list[dict[str, Any]] = []
    for region, sites in regions.by_region().items():
        weights = sum(site.weight_count for site in sites)
        own = sparsity[region] if isinstance(sparsity, Mapping) else sparsity
        removed = int(own * weights)  # what an allocation by region takes
        if isinstance(allocation, Mapping):
            removed = sum(int(allocation[site.name] * site.weight_count) for site in sites)
            own = removed / weights
        rows.append(
            {
                "region": region,
                "sites": len(sites),
                "weights": weights,
                "kept": weights - removed,
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
        **load_prediction(dense, prunable, kept, recipe),
    }


def stored_bytes(weights: int, kept: int, recipe: Recipe) -> float:
    """About how many bytes pruned weights take in the ONNX file, if they are kept at random."""
    return _expected(weights, kept, recipe).stored_bytes


def load_prediction(dense_bytes: int, weights: int, kept: int, recipe: Recipe) -> dict[str, float]:
    """About what stock onnxruntime takes to create a session, if weights are kept at random.

    Args:
        dense_bytes: of the whole model.
        weights: how many may be pruned.
        kept: how many of them are kept.
        recipe: how they are stored.
    """
    from mfcompile.exporters.load_cost import predict_load

    plan = _expected(weights, kept, recipe)
    file = dense_bytes - 4 * weights + plan.stored_bytes
    cost = predict_load(0, file, (plan,), dense_bytes)
    return {"load_peak_bytes": cost.peak_bytes, "load_time_ratio": cost.time_ratio}


def _expected(weights: int, kept: int, recipe: Recipe) -> EncodingPlan:
    """All pruned weights as one, encoded as most of them will be."""
    import numpy as np

    from mfcompile.exporters.packing import choose_encoding, estimate_encodings
    from mfcompile.exporters.sparse_initializers import ENCODING, SparsePlan
    from mfcompile.exporters.weight_placement import checked_budget

    dtype = np.dtype(np.float32)
    if recipe.format == ENCODING:
        return SparsePlan(ENCODING, kept, dtype, dtype, (weights,), kept)
    if recipe.values == "int8":
        plans = estimate_encodings(weights, kept, np.int8, "fp32", allowed=("gap8", "gap4"))
    else:
        plans = estimate_encodings(weights, kept, dtype, recipe.values)
    most = checked_budget(recipe.load_budget) * dtype.itemsize * weights
    fitting = [plan for plan in plans if plan.stored_bytes + plan.folded_bytes <= most]
    return choose_encoding(fitting or plans[:1]) if recipe.format == "packed" else plans[0]
