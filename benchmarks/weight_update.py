"""What the weight update is worth on the trained example: retrieval without fine-tuning, and the output error of its layers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import mfcompile
from mfcompile.masks import MaskSet
from mfcompile.passes.masking import mask_module
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.sparsegpt import SparseGptOptions
from mfcompile.passes.weight_update import updated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

SCENES = 500


def weight_update(
    sparsities: tuple[float, ...] = (0.63, 0.75, 0.9), batch_count: int = 8, passes: tuple[int | None, ...] = (4,)
) -> dict[str, Any]:
    """Masks of two criteria at three sparsities, as they are and after the update.

    Retrieval is by embeddings: R@1 in per cent, the mean of both directions, among 500 held-out scenes (chance 0.2).
    ``error_ratio`` is the median over layers of the squared error of the output, after the update over before.

    Args:
        sparsities: fractions removed.
        batch_count: calibration batches of 32 scenes.
        passes: how often they are run in an update; each gives a row.
    """
    from emoji_xvlm import model as example
    from emoji_xvlm.evaluate import evaluate

    model = example.build_model()
    batches = list(example.calibration_batches())[:batch_count]
    captured = mfcompile.capture(model, example.example_inputs)
    regions = mfcompile.infer_regions(captured)
    started = time.perf_counter()
    statistics = mfcompile.calibrate(captured, batches, regions=regions)
    calibration_s = time.perf_counter() - started

    def recall(masks: MaskSet) -> float:
        metrics = evaluate(mask_module(mfcompile.apply_masks(captured, masks).module, masks), SCENES, candidates=0)
        return float(metrics["r1"])

    dense = mfcompile.select_masks(captured, regions, statistics, sparsity=0.0)
    results: dict[str, Any] = {
        "data": {"calibration_batches": batch_count, "batch": example.CALIBRATION_BATCH_SIZE, "calibration_s": calibration_s},
        "dense": {"r1": recall(dense)},
    }
    for sparsity in sparsities:
        for criterion in ("multiflow", "magnitude"):
            masks = mfcompile.select_masks(captured, regions, statistics, sparsity=sparsity, criterion=criterion)
            results[f"{criterion} {sparsity:g}"] = {"r1": recall(masks)}
            run = PruningRun(captured, regions, sparsity, statistics=statistics, batches=lambda: batches)
            for count in passes:
                started = time.perf_counter()
                new, updates = updated(run, masks, SparseGptOptions(passes=count))
                update_s = time.perf_counter() - started
                results[f"{criterion} {sparsity:g}, sparsegpt in {count or 'as many as depths'} passes"] = {
                    "r1": recall(new),
                    "error_ratio": median(item.error / item.masked_error for item in updates if item.masked_error),
                    "update_s": update_s,
                }
    return results
