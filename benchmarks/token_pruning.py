"""Fewer tokens against all of them in stock onnxruntime: FLOPs, and time with one thread.

python -m benchmarks.token_pruning [--rounds 31]

A vision transformer of 12 layers of width 384 with 197 tokens (ViT-S at 224 pixels) and random weights; the time of its
operators does not depend on their values. Each figure is the median over rounds of pruned time / dense time; in a round each
file runs once, in turns. Times are CPU time of the calling thread, which does all the work: what other processes take is not
counted, but caches and memory are shared with them. Files are written without the comparison that ``mfcompile.export_onnx``
makes; tests make it on small models. "overhead" keeps every token: what is put in, and nothing that it saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
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
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.graph import CapturedGraph
from mfcompile.passes.flops import count_flops

RESULT = Path(__file__).resolve().parent / "results" / "token_pruning.json"
LAYERS, WIDTH, TOKENS = 12, 384, 197
SCHEDULES: Mapping[str, Mapping[int, float]] = {
    "keep .7 at blocks 3, 6, 9": {3: 0.7, 6: 0.7, 9: 0.7},
    "keep .5 at block 3": {3: 0.5},
    "overhead, blocks 3, 6, 9": {3: 1.0, 6: 1.0, 9: 1.0},
}


def vision_encoder() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and a batch of one image."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=6, image_size=224,
        patch_size=16,
    )  # fmt: skip
    model: torch.nn.Module = CLIPVisionModel(config)
    return model.eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}


def flops(captured: CapturedGraph) -> int:
    """Of the program that the file is made from."""
    assert captured.exported is not None
    return count_flops(captured.exported.program).total


def session(path: Path) -> onnxruntime.InferenceSession:
    """Of stock onnxruntime, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(sessions: Mapping[str, onnxruntime.InferenceSession], feeds: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of every round, by name; the order turns round from one to the next."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(-2, rounds):  # the first rounds warm up
        names = list(sessions)[:: 1 if number % 2 else -1]
        for name in names:
            started = time.thread_time()
            sessions[name].run(None, feeds)
            if number >= 0:
                seconds[name].append(time.thread_time() - started)
    return seconds


def run(rounds: int, folder: Path) -> dict[str, Any]:
    """Export dense and pruned files, and measure them together."""
    model, inputs = vision_encoder()
    dense = mfcompile.with_token_program(mfcompile.capture(model, inputs))
    names = [site.name for site in mfcompile.find_token_sites(dense).sites]
    models = {"dense": dense}
    for label, schedule in SCHEDULES.items():
        models[label] = mfcompile.prune_tokens(dense, {names[block]: keep for block, keep in schedule.items()})
    sessions, nodes = {}, {}
    for number, (label, captured) in enumerate(models.items()):
        artifact = export_onnx(captured, folder / f"{number}.onnx", format="dense")
        sessions[label] = session(artifact.path)
        nodes[label] = [str(line) for line in captured.specialised if line.startswith("tokens of")]
    seconds = measure(sessions, {"pixel_values": inputs["pixel_values"].numpy().astype(np.float32)}, rounds)
    rows = []
    for label in SCHEDULES:
        ratios = [own / whole for own, whole in zip(seconds[label], seconds["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "schedule": label,
                "sites": nodes[label],
                "flops_ratio": flops(models[label]) / flops(dense),
                "time_ratio": middle,
                "time_ratio_quartiles": [low, high],
            }
        )
    return {
        "machine": {**machine.describe(), "onnxruntime": onnxruntime.__version__, "threads": 1},
        "model": {"layers": LAYERS, "width": WIDTH, "tokens": TOKENS, "batch": 1, "gflops": flops(dense) / 1e9},
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
    table = Table("schedule", "FLOPs", "time", "quartiles")
    for row in result["rows"]:
        low, high = row["time_ratio_quartiles"]
        table.add_row(row["schedule"], f"{row['flops_ratio']:.3f}", f"{row['time_ratio']:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
