"""Fewer tokens against all of them in stock onnxruntime: FLOPs, and time with one thread.

python -m benchmarks.token_pruning [--rounds 31]

The vision transformer of ``benchmarks.paired_files``, measured as is said there.
"overhead" keeps every token: what is put in, and nothing that it saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

import mfcompile
from benchmarks.paired_files import main, vision_encoder
from mfcompile.graph import CapturedGraph

RESULT = Path(__file__).resolve().parent / "results" / "token_pruning.json"
SCHEDULES: Mapping[str, Mapping[int, float]] = {
    "keep .7 at blocks 3, 6, 9": {3: 0.7, 6: 0.7, 9: 0.7},
    "keep .5 at block 3": {3: 0.5},
    "overhead, blocks 3, 6, 9": {3: 1.0, 6: 1.0, 9: 1.0},
}


def models() -> tuple[dict[str, CapturedGraph], dict[str, torch.Tensor]]:
    """Label -> model, "dense" first, and the input."""
    model, inputs = vision_encoder()
    dense = mfcompile.with_token_program(mfcompile.capture(model, inputs))
    names = [site.name for site in mfcompile.find_token_sites(dense).sites]
    cut = {
        label: mfcompile.prune_tokens(dense, {names[block]: keep for block, keep in schedule.items()})
        for label, schedule in SCHEDULES.items()
    }
    return {"dense": dense, **cut}, inputs


if __name__ == "__main__":
    main(__doc__, models, "schedule", RESULT)
