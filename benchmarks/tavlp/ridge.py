"""Which ridge CHITA gets: the one whose pruned model has the lowest loss on calibration data that no pruner saw."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

import mfcompile
from benchmarks.tavlp.configuration import Scale, checkpoint_hash, config_hash
from benchmarks.tavlp.families.contract import Family
from benchmarks.tavlp.pruning import Folders, captured_family, loss_of, movement
from benchmarks.tavlp.records import read_record, write_record
from mfcompile.passes.mask_selection import SelectionOptions, select_masks

RIDGES = (1e-5, 1e-3, 1e-1, 10.0)
"""From the published one to one that all but forbids weights to move."""
SPARSITY = 0.75
SEED, HELD_OUT_SEED, HELD_OUT_BATCHES = 0, 3, 16


def ridge_config(family: Family, scale: Scale) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        "version": 1,
        "family": family.name,
        "checkpoint": checkpoint_hash(family.checkpoint),
        "ridges": RIDGES,
        "sparsity": SPARSITY,
        "seed": SEED,
        "gradients": scale.pruning["chita_gradients"],
        "calibration": list(scale.calibration),
        "held_out": [HELD_OUT_SEED, HELD_OUT_BATCHES],
    }


def ridges_of(family: Family, scale: Scale, folders: Folders, *, is_made: bool = True) -> list[dict[str, float]] | None:
    """What each ridge does to a family, from its file or found out now (in a few minutes).

    Args:
        family: whose pretrained model is pruned by CHITA.
        scale: calibration and gradients.
        folders: of records.
        is_made: False for what is there.

    Returns:
        A row per ridge: ``ridge``, ``moved`` (of the kept weights, relative to their size) and ``loss`` on held-out
        calibration batches; None where there is no file and none is made.
    """
    path, config = folders.results / family.name / "chita-ridge.json", ridge_config(family, scale)
    record = read_record(path, config_hash(config))
    if record is None and is_made:
        write_record(path, config, {"rows": [_row(family, ridge, scale) for ridge in RIDGES]})
        record = read_record(path, config_hash(config))
    return None if record is None else list(record["rows"])


def _row(family: Family, ridge: float, scale: Scale) -> dict[str, float]:
    captured, regions = captured_family(family)
    options = {"gradients": scale.pruning["chita_gradients"], "ridge": ridge}
    batches = family.calibration_batches(SEED, *scale.calibration)
    masks = select_masks(
        captured,
        regions,
        None,
        SelectionOptions(SPARSITY, "chita", options, seed=SEED),
        batches=lambda: iter(batches),
        loss_fn=loss_of(family, {"losses": 0}),
    )
    module, held_out = mfcompile.mask_module(family.build(), masks).eval(), loss_of(family, {"losses": 0})
    with torch.no_grad():
        losses = [
            float(held_out(module, batch))
            for batch in family.calibration_batches(HELD_OUT_SEED, HELD_OUT_BATCHES, scale.calibration[1])
        ]
    return {"ridge": ridge, "moved": movement(masks, captured)["kept_weights_moved"], "loss": fmean(losses)}
