"""Fewer hidden channels and heads against all of them in stock onnxruntime: FLOPs, and time with one thread.

python -m benchmarks.structured_removal [--rounds 31]

The vision transformer of ``benchmarks.paired_files``, measured as is said there.
"and tokens" also keeps .7 of the tokens at blocks 3, 6 and 9. "zeros" removes nothing and
sets half of the columns of every matrix to zero: what masks bring where the operators stay dense.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch

import mfcompile
from benchmarks.paired_files import main, vision_encoder
from mfcompile.graph import CapturedGraph

RESULT = Path(__file__).resolve().parent / "results" / "structured_removal.json"
SHARES: Mapping[str, Mapping[str, float]] = {
    "half of the channels": {"kind:channels": 0.5},
    "half of the heads": {"kind:heads": 0.5},
    "half of both": {"kind:channels": 0.5, "kind:heads": 0.5},
}
KEEP = {3: 0.7, 6: 0.7, 9: 0.7}
"""Block -> share of the tokens that stay behind it, for the row with tokens."""


def models() -> tuple[dict[str, CapturedGraph], dict[str, torch.Tensor]]:
    """Label -> model, "dense" first, and the input."""
    model, inputs = vision_encoder()
    dense = mfcompile.with_token_program(mfcompile.capture(model, inputs))
    found = {"dense": dense}
    for label, shares in SHARES.items():
        found[label] = mfcompile.prune_structure(dense, shares)
    sites = [site.name for site in mfcompile.find_token_sites(dense).sites]
    found["half of both, and tokens"] = mfcompile.prune_tokens(
        found["half of both"], {sites[block]: keep for block, keep in KEEP.items()}
    )
    found["zeros"] = mfcompile.with_token_program(mfcompile.capture(with_zeros(model), inputs))
    return found, inputs


def with_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model with zeros in half of the columns of every matrix."""
    generator = torch.Generator().manual_seed(0)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.ndim == 2:
                parameter[:, torch.randperm(parameter.shape[1], generator=generator)[: parameter.shape[1] // 2]] = 0
    return changed


if __name__ == "__main__":
    main(__doc__, models, "removed", RESULT)
