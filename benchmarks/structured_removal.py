"""Fewer hidden channels and heads against all of them in stock onnxruntime: FLOPs, and time with one thread.

python -m benchmarks.structured_removal [--rounds 31]

The vision transformer of ``benchmarks.token_pruning`` (12 layers of width 384, 6 heads, 197 tokens, random weights), measured
as there: each figure is the median over rounds of pruned time / dense time, CPU time of the calling thread, files in turns.
"and tokens" also keeps .7 of the tokens at blocks 3, 6 and 9. "zeros" removes nothing and
sets half of the columns of every matrix to zero: what masks bring where the operators stay dense.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

import mfcompile
from benchmarks import machine
from benchmarks.token_pruning import LAYERS, TOKENS, WIDTH, flops, measure, session, vision_encoder
from mfcompile.exporters.onnx_model import export_onnx
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


def run(rounds: int, folder: Path) -> dict[str, Any]:
    """Export all files, and measure them together."""
    found, inputs = models()
    sessions, sizes = {}, {}
    for number, (label, captured) in enumerate(found.items()):
        artifact = export_onnx(captured, folder / f"{number}.onnx", format="dense")
        sessions[label], sizes[label] = session(artifact.path), artifact.size_bytes
    seconds = measure(sessions, {"pixel_values": inputs["pixel_values"].numpy().astype(np.float32)}, rounds)
    rows = []
    for label in [item for item in found if item != "dense"]:
        ratios = [own / whole for own, whole in zip(seconds[label], seconds["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "removed": label,
                "flops_ratio": flops(found[label]) / flops(found["dense"]),
                "size_ratio": sizes[label] / sizes["dense"],
                "time_ratio": middle,
                "time_ratio_quartiles": [low, high],
            }
        )
    return {
        "machine": {**machine.describe(), "onnxruntime": onnxruntime.__version__, "threads": 1},
        "model": {"layers": LAYERS, "width": WIDTH, "tokens": TOKENS, "batch": 1, "gflops": flops(found["dense"]) / 1e9},
        "rounds": rounds,
        "dense_s": statistics.median(seconds["dense"]),
        "rows": rows,
    }


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.rounds, Path(folder))
    table = Table("removed", "FLOPs", "bytes", "time", "quartiles")
    for row in result["rows"]:
        low, high = row["time_ratio_quartiles"]
        figures = [f"{row[key]:.3f}" for key in ("flops_ratio", "size_ratio", "time_ratio")]
        table.add_row(row["removed"], *figures, f"{low:.3f} to {high:.3f}")
    Console().print(table)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
