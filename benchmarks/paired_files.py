"""Files of one vision transformer against the dense one in stock onnxruntime: FLOPs, bytes, and time with one thread.

12 layers of width 384 with 197 tokens (ViT-S at 224 pixels) and random weights; the time of its operators does not depend on
their values. Each figure is the median over rounds of pruned time / dense time; in a round each file runs once, in turns. Times
are CPU time of the calling thread, which does all the work: what other processes take is not counted, but caches and memory are
shared with them. Files are written without the comparison that ``mfcompile.export_onnx`` makes; tests make it on small models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.graph import CapturedGraph
from mfcompile.passes.flops import count_flops

LAYERS, WIDTH, TOKENS = 12, 384, 197
Models = Mapping[str, CapturedGraph]
Inputs = Mapping[str, torch.Tensor]


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


def compare(
    models: Mapping[str, CapturedGraph], inputs: Mapping[str, torch.Tensor], rounds: int, folder: Path
) -> dict[str, Any]:
    """Export all models and measure the files together.

    Args:
        models: label -> model, with "dense" among them.
        inputs: of all of them.
        rounds: turns of every file.
        folder: where the files go.

    Returns:
        Machine, model, and of every label but "dense" a row of ``label``, ``flops_ratio``, ``size_ratio``, ``time_ratio`` and
        ``time_ratio_quartiles``.
    """
    sessions, sizes = {}, {}
    for number, (label, captured) in enumerate(models.items()):
        artifact = export_onnx(captured, folder / f"{number}.onnx", format="dense")
        sessions[label], sizes[label] = session(artifact.path), artifact.size_bytes
    seconds = measure(sessions, {"pixel_values": inputs["pixel_values"].numpy().astype(np.float32)}, rounds)
    rows = []
    for label in [item for item in models if item != "dense"]:
        ratios = [own / whole for own, whole in zip(seconds[label], seconds["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "label": label,
                "flops_ratio": flops(models[label]) / flops(models["dense"]),
                "size_ratio": sizes[label] / sizes["dense"],
                "time_ratio": middle,
                "time_ratio_quartiles": [low, high],
            }
        )
    whole = flops(models["dense"])
    return {
        "machine": {**machine.describe(), "onnxruntime": onnxruntime.__version__, "threads": 1},
        "model": {"layers": LAYERS, "width": WIDTH, "tokens": TOKENS, "batch": 1, "gflops": whole / 1e9},
        "rounds": rounds,
        "dense_s": statistics.median(seconds["dense"]),
        "rows": rows,
    }


def main(
    doc: str | None,
    models: Callable[[], tuple[Mapping[str, CapturedGraph], Mapping[str, torch.Tensor]]],
    heading: str,
    result: Path,
) -> None:
    """The command line of such a benchmark: measure, print a table, and write the figures.

    Args:
        doc: what ``--help`` says.
        models: gives the models, "dense" among them, and their inputs.
        heading: of the labels.
        result: where the figures go, unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=result)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(*models(), arguments.rounds, Path(folder))
    table = Table(heading, "FLOPs", "bytes", "time", "quartiles")
    for row in found["rows"]:
        low, high = row["time_ratio_quartiles"]
        figures = [f"{row[key]:.3f}" for key in ("flops_ratio", "size_ratio", "time_ratio")]
        table.add_row(row["label"], *figures, f"{low:.3f} to {high:.3f}")
    Console().print(table)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
