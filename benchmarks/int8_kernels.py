"""The sparse int8 kernels against dense int8 in stock onnxruntime, layer by layer and through a transformer, in one process.

python -m benchmarks.int8_kernels [--rounds 15] [--parts layers transformer] [--instruction-set avx2]

Each figure is the median over rounds of dense int8 time / sparse int8 time; in a round both run once, in turns. Dense int8 is
the same file without the library: onnxruntime folds the decode and runs its DynamicQuantizeMatMul on a dense int8 weight, zeros
included. Both quantize activations on every run and give the same bits. With one thread, times are CPU time of the calling
thread, which does all the work; with two they are wall time. ``limit`` is what the weights kept allow: all groups of four
inputs over those that keep anything. ``float32`` is the time of the dense float32 layer over that of the sparse int8 one.

The decoder is one token through a stack of layers larger than the caches; its limit is that of bytes: a dense weight takes one
byte, a sparse one four bytes for each group kept and a bit for each group. The transformer is four layers of the width of
ViT-B with random masks, exported with mfcompile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mfcompile
from benchmarks import machine
from mfcompile import runtime
from mfcompile.exporters.quantization import GAP4, GAP8, encode_int8, plan_int8, quantize_rows
from mfcompile.exporters.sparse_linear import DOMAIN, VERSION
from mfcompile.exporters.sparse_linear_int8 import int8_function, int8_node

PARTS = ("layers", "layers_2_threads", "decoder", "transformer")
HEADS = ("threads", "shape", "pattern", "sparsity", "tokens", "megabytes", "limit")
RESULT = Path(__file__).resolve().parent / "results" / "int8_kernels.json"
SHAPES = ((768, 768), (3072, 768), (768, 3072))  # (out, in)
SPARSITIES = (0.63, 0.75, 0.9)
PATTERNS = {"1x4": 4, "unstructured": 1}
TOKENS = (1, 8, 32, 197)
STACK_LAYERS = 24  # 57 MB of dense int8 weights
WIDTH, LAYERS = 768, 4

Floats = NDArray[np.float32]
Sessions = dict[str, onnxruntime.InferenceSession]


def random_weight(rng: np.random.Generator, shape: tuple[int, int], sparsity: float, block: int) -> Floats:
    """A random weight that keeps random blocks of 1 x ``block``."""
    kept = np.repeat(rng.random((shape[0], shape[1] // block)) >= sparsity, block, axis=1)
    weight: Floats = np.where(kept, rng.standard_normal(shape), 0).astype(np.float32)
    return weight


def make_model(weights: list[Floats], is_int8: bool) -> bytes:
    """Linear layers one after the other with biases of zero: int8 and packed, or dense in float32."""
    nodes, initializers, name, encodings = [], [], "X", set()
    for index, weight in enumerate(weights):
        tensors: dict[str, NDArray[Any]] = {f"bias{index}": np.zeros(weight.shape[0], np.float32)}
        output = "Y" if index == len(weights) - 1 else f"hidden{index}"
        if is_int8:
            plan, quantized = plan_int8(weight != 0, encodings=(GAP8, GAP4)), quantize_rows(weight)
            encoded = encode_int8(quantized.values, weight != 0, plan)
            tensors |= {f"gaps{index}": encoded.gaps, f"values{index}": encoded.values, f"scales{index}": quantized.scales}
            inputs = [name, *(f"{part}{index}" for part in ("gaps", "values", "scales", "bias"))]
            nodes.append(int8_node(plan.encoding, inputs, output, (weight.shape[0], weight.shape[1]), plan.block))
            encodings.add(plan.encoding)
        else:
            tensors[f"weight{index}"] = np.ascontiguousarray(weight.T)
            nodes.append(helper.make_node("MatMul", [name, f"weight{index}"], [f"product{index}"]))
            nodes.append(helper.make_node("Add", [f"product{index}", f"bias{index}"], [output]))
        initializers += [numpy_helper.from_array(array, key) for key, array in tensors.items()]
        name = output
    ends = [("X", weights[0].shape[1]), ("Y", weights[-1].shape[0])]
    x, y = (helper.make_tensor_value_info(key, TensorProto.FLOAT, ["tokens", size]) for key, size in ends)
    imports = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(DOMAIN, VERSION)] if is_int8 else [])
    graph = helper.make_graph(nodes, "layers", [x], [y], initializers)
    functions = [int8_function(encoding, 17) for encoding in sorted(encodings)]
    model: onnx.ModelProto = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def open_session(model: bytes | Path, library: str | None, threads: int) -> onnxruntime.InferenceSession:
    """A session with the library registered or without."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def sessions_of(weights: list[Floats], library: str, threads: int) -> Sessions:
    """Dense float32, dense int8 and sparse int8."""
    packed = make_model(weights, True)
    return {
        "float32": open_session(make_model(weights, False), None, threads),
        "dense": open_session(packed, None, threads),
        "sparse": open_session(packed, library, threads),
    }


def compare(sessions: Sessions, feeds: dict[str, NDArray[Any]], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Median and quartiles of dense int8 time over sparse int8 time, and the rest."""
    outputs = {key: session.run(None, feeds)[0] for key, session in sessions.items()}
    seconds: dict[str, list[float]] = {key: [] for key in sessions}
    for index in range(rounds):
        for key in sessions if index % 2 else reversed(sessions):
            started = clock()
            sessions[key].run(None, feeds)
            seconds[key].append(clock() - started)
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds["dense"], seconds["sparse"], strict=True)], n=4)
    size = float(np.abs(outputs["float32"]).max())
    return {
        "ratio": round(middle, 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3),
        "float32": round(statistics.median(a / b for a, b in zip(seconds["float32"], seconds["sparse"], strict=True)), 3),
        **{f"{key}_us": round(1e6 * statistics.median(values), 1) for key, values in seconds.items()},
        "worlds": float(np.abs(outputs["dense"] - outputs["sparse"]).max()) / size,
        "error": round(float(np.abs(outputs["dense"] - outputs["float32"]).max()) / size, 5),
    }  # fmt: skip


def group_density(weight: Floats) -> float:
    """Groups of four inputs that keep anything, of all."""
    return float(weight.reshape(weight.shape[0], -1, 4).any(axis=2).mean())


def measure_layers(library: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Every shape, pattern, sparsity and token count, with warm weights."""
    rng, rows = np.random.default_rng(0), []
    clock = time.thread_time if threads == 1 else time.perf_counter
    for shape in SHAPES:
        for pattern, block in PATTERNS.items():
            for sparsity in SPARSITIES:
                weight = random_weight(rng, shape, sparsity, block)
                sessions = sessions_of([weight], library, threads)
                for tokens in TOKENS:
                    x = rng.standard_normal((tokens, shape[1])).astype(np.float32)
                    found = compare(sessions, {"X": x}, rounds * max(1, min(16, 64 // tokens)), clock)
                    rows.append({"threads": threads, "shape": shape, "pattern": pattern, "sparsity": sparsity,
                                 "tokens": tokens, "limit": round(1 / group_density(weight), 2), **found})  # fmt: skip
    return rows


def measure_decoder(library: str, rounds: int) -> list[dict[str, Any]]:
    """One token through a stack of layers that is larger than the caches."""
    rng, rows = np.random.default_rng(1), []
    for pattern, block in PATTERNS.items():
        for sparsity in SPARSITIES:
            pair = [random_weight(rng, shape, sparsity, block) / np.float32(8) for shape in ((3072, 768), (768, 3072))]
            # Moved, so that no two layers are equal: onnxruntime stores equal weights once.
            weights = [np.roll(weight, index * 4, axis=1) for index in range(STACK_LAYERS // 2) for weight in pair]
            density = statistics.mean(map(group_density, pair))
            x = rng.standard_normal((1, 768)).astype(np.float32)
            found = compare(sessions_of(weights, library, 1), {"X": x}, rounds, time.thread_time)
            rows.append({"pattern": pattern, "sparsity": sparsity, "limit": round(1 / (density + 1 / 32), 2), **found})
    return rows


class Block(nn.Module):
    """A transformer layer of ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.mixing = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        y = self.first(x)
        heads = [part(y).reshape(*y.shape[:2], 12, 64).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(y.shape)
        x = x + self.mixing(mixed)
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return result


class Transformer(nn.Module):
    """Layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return pixel_values


def measure_transformer(library: str, rounds: int) -> list[dict[str, Any]]:
    """End to end, 197 tokens: the dense int8 file, the float32 one, and the packed int8 one with the library."""
    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.randn(1, 197, WIDTH)
    rows = []
    for pattern, sparsity in (("1x4", 0.75), ("1x4", 0.63), ("1x4", 0.9)):
        compiled = mfcompile.compile_pruned(model, {"pixel_values": x}, sparsity=sparsity, pattern=pattern, criterion="random")
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for name, (format, values) in {"float32": ("dense", "fp32"), "dense": ("dense", "int8"),
                                           "sparse": ("packed", "int8")}.items():  # fmt: skip
                files[name] = compiled.export_onnx(Path(folder) / f"{name}.onnx", format, values)
            for threads in (1, 2):
                sessions = {
                    name: open_session(item.path, library if name == "sparse" else None, threads)
                    for name, item in files.items()
                }
                clock = time.thread_time if threads == 1 else time.perf_counter
                rows.append({
                    "threads": threads, "pattern": pattern, "sparsity": sparsity,
                    "megabytes": {name: round(item.size_bytes / 1e6, 1) for name, item in files.items()},
                    **compare(sessions, {"pixel_values": x.numpy()}, rounds, clock),
                })  # fmt: skip
    return rows


def show(title: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Print rows as a table."""
    table = Table(*keys, title=title)
    for row in rows:
        table.add_row(*(str(row[key]) for key in keys))
    Console(width=150).print(table)


def main() -> None:
    """Measure everything, print it, and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--instruction-set", choices=runtime.INSTRUCTION_SETS)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; the rest stays as it is in the file"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.instruction_set:
        os.environ["MFCOMPILE_RUNTIME_CPU"] = options.instruction_set
    library, rounds = runtime.library_path(), options.rounds
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "layers": lambda: measure_layers(library, rounds, 1),
        "layers_2_threads": lambda: measure_layers(library, rounds, 2),
        "decoder": lambda: measure_decoder(library, rounds),
        "transformer": lambda: measure_transformer(library, rounds),
    }
    result: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    result["machine"] = {**machine.describe(), "onnxruntime": onnxruntime.__version__}
    for part in options.parts:
        kernels = runtime.instruction_set(options.instruction_set)
        load, rows = os.getloadavg(), measure[part]()
        result[part] = {"instruction_set": kernels, "rounds": rounds, "load_average": load, "rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        figures = ("ratio", "ratio_low", "ratio_high", "float32", "dense_us", "sparse_us", "error")
        show(part, rows, tuple(key for key in HEADS if key in rows[0]) + figures)


if __name__ == "__main__":
    main()
