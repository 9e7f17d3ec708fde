"""The sparse runtime against dense onnxruntime, layer by layer, in one process with one thread.

python -m benchmarks.sparse_kernels [--rounds 15] [--instruction-set avx2]

Each figure is the median over rounds of dense time / sparse time; in a round both run once, in turns. Times are CPU time of
the calling thread, which does all the work: what other processes take is not counted, but caches and memory are shared with
them. Layers run with weights in the caches where they fit ("warm"), except the decoder: a stack of layers larger than the
caches, so that every weight comes from memory, as in a model that makes one token after the other. ``limit`` is what the
weights kept allow: dense work over sparse work, or dense bytes over sparse bytes in the decoder (a limit at one bandwidth: the
library keeps weights on huge pages, which are read faster, and so it can be passed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from mfcompile import runtime
from mfcompile.exporters.packing import encode
from mfcompile.exporters.sparse_linear import DOMAIN, VERSION, sparse_linear_function, sparse_linear_node

RESULT = Path(__file__).resolve().parent / "results" / "sparse_kernels.json"
SHAPES = ((768, 768), (3072, 768), (768, 3072))  # (out, in): the layers of a transformer block of width 768
SPARSITIES = (0.63, 0.75, 0.9)
PATTERNS = {"unstructured": 1, "4x1": 4, "16x1": 16}
TOKENS = (1, 2, 4, 8, 16, 32, 197)
CROSSOVER_SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
STACK_LAYERS = 24  # 226 MB of dense weights
STACK_SHAPES = ((3072, 768), (768, 3072))

Floats = NDArray[np.float32]


def random_weight(rng: np.random.Generator, shape: tuple[int, int], sparsity: float, block_rows: int) -> Floats:
    """A random weight that keeps random blocks of ``block_rows`` x 1."""
    kept = rng.random((shape[0] // block_rows, shape[1])) >= sparsity
    weight: Floats = np.where(np.repeat(kept, block_rows, axis=0), rng.standard_normal(shape), 0).astype(np.float32)
    return weight


def make_model(weights: list[Floats], is_sparse: bool, values: str = "fp32", fused: str = "", apart: str = "") -> bytes:
    """Linear layers one after the other, packed or dense, with biases of zero.

    Args:
        weights: (out, in) of each layer.
        is_sparse: as SparseLinear nodes.
        values: "fp32" or "fp16", of packed weights.
        fused: an activation inside the node of every layer but the last.
        apart: an activation behind every layer but the last, as a node: "relu" or "silu".
    """
    nodes, initializers, name = [], [], "X"
    for index, weight in enumerate(weights):
        tensors: dict[str, NDArray[Any]] = {f"bias{index}": np.zeros(weight.shape[0], np.float32)}
        is_last = index == len(weights) - 1
        result = "Y" if is_last else f"hidden{index}"
        output = result if is_last or not apart else f"sums{index}"
        if is_sparse:
            encoded = encode(weight, weight != 0, values, encoding="gap8")
            assert encoded.gaps is not None
            tensors |= {f"gaps{index}": encoded.gaps, f"values{index}": encoded.values}
            inputs = [name, f"gaps{index}", f"values{index}", f"bias{index}"]
            activation = "" if is_last else fused
            nodes.append(sparse_linear_node("gap8", inputs, output, (weight.shape[0], weight.shape[1]), activation=activation))
        else:
            tensors[f"weight{index}"] = np.ascontiguousarray(weight.T)
            nodes.append(helper.make_node("MatMul", [name, f"weight{index}"], [f"product{index}"]))
            nodes.append(helper.make_node("Add", [f"product{index}", f"bias{index}"], [output]))
        if output != result and apart == "relu":
            nodes.append(helper.make_node("Relu", [output], [result]))
        elif output != result:
            nodes.append(helper.make_node("Sigmoid", [output], [f"gate{index}"]))
            nodes.append(helper.make_node("Mul", [output, f"gate{index}"], [result]))
        initializers += [numpy_helper.from_array(array, key) for key, array in tensors.items()]
        name = result
    ends = [("X", weights[0].shape[1]), ("Y", weights[-1].shape[0])]
    x, y = (helper.make_tensor_value_info(key, TensorProto.FLOAT, ["tokens", size]) for key, size in ends)
    imports = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(DOMAIN, VERSION)] if is_sparse else [])
    functions = [sparse_linear_function("gap8", 17, activation=name) for name in {"", fused}] if is_sparse else []
    graph = helper.make_graph(nodes, "layers", [x], [y], initializers)
    model: onnx.ModelProto = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def open_session(model: bytes, library: str | None) -> onnxruntime.InferenceSession:
    """A session of one thread, with the library registered or without."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compare(
    dense: onnxruntime.InferenceSession, sparse: onnxruntime.InferenceSession, x: Floats, rounds: int
) -> dict[str, float]:
    """Ratio of dense time to sparse time in each round: median and quartiles; and the median times."""
    wanted, found = dense.run(None, {"X": x})[0], sparse.run(None, {"X": x})[0]
    error = float(np.abs(wanted - found).max() / max(1e-30, np.abs(wanted).max()))
    if not error < 1e-4:
        raise SystemExit(f"sparse and dense outputs differ by {error:g} of the largest output")
    pairs = []
    for index in range(rounds):
        seconds = {}
        for key in ("dense", "sparse") if index % 2 else ("sparse", "dense"):
            session = dense if key == "dense" else sparse
            started = time.thread_time()
            session.run(None, {"X": x})
            seconds[key] = time.thread_time() - started
        pairs.append((seconds["dense"], seconds["sparse"]))
    low, middle, high = statistics.quantiles([first / second for first, second in pairs], n=4)
    return {
        "ratio": round(middle, 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3),
        "dense_us": round(1e6 * statistics.median(first for first, _ in pairs), 1),
        "sparse_us": round(1e6 * statistics.median(second for _, second in pairs), 1), "error": error,
    }  # fmt: skip


def measure_layers(library: str, rounds: int) -> list[dict[str, Any]]:
    """Every shape, pattern, sparsity and token count, with warm weights."""
    rng, rows = np.random.default_rng(0), []
    for shape in SHAPES:
        for pattern, block_rows in PATTERNS.items():
            for sparsity in SPARSITIES:
                weight = random_weight(rng, shape, sparsity, block_rows)
                sessions = open_session(make_model([weight], False), None), open_session(make_model([weight], True), library)
                for tokens in TOKENS:
                    x = rng.standard_normal((tokens, shape[1])).astype(np.float32)
                    found = compare(*sessions, x, rounds * max(1, 64 // tokens))
                    rows.append({"shape": shape, "pattern": pattern, "sparsity": sparsity, "tokens": tokens,
                                 "limit": round(weight.size / np.count_nonzero(weight), 2), **found})  # fmt: skip
    return rows


def make_stack(rng: np.random.Generator, sparsity: float, block_rows: int) -> list[Floats]:
    """Layers of a decoder. They are moved, so that no two are equal: onnxruntime stores equal weights once."""
    pair = [random_weight(rng, shape, sparsity, block_rows) / np.float32(8) for shape in STACK_SHAPES]
    return [np.roll(weight, index, axis=1) for index in range(STACK_LAYERS // 2) for weight in pair]


def measure_decoder(library: str, rounds: int) -> list[dict[str, Any]]:
    """One token through a stack of layers that is larger than the caches."""
    rng, rows = np.random.default_rng(1), []
    for pattern, block_rows in PATTERNS.items():
        for sparsity in SPARSITIES:
            weights = [weight.astype(np.float16).astype(np.float32) for weight in make_stack(rng, sparsity, block_rows)]
            dense = open_session(make_model(weights, False), None)
            density = float(np.mean([np.count_nonzero(weight) / weight.size for weight in weights]))
            for values, width in (("fp32", 4), ("fp16", 2)):
                index = {1: min(1 / density / 8, 1), 4: 1 / 4, 16: 1 / 16}[block_rows]  # bytes: a bit for each, or a column
                sparse = open_session(make_model(weights, True, values), library)
                found = compare(dense, sparse, rng.standard_normal((1, 768)).astype(np.float32), rounds)
                limit = round(4 / (density * (width + index)), 2)
                rows.append({"pattern": pattern, "sparsity": sparsity, "values": values, "limit": limit, **found})
    return rows


def measure_activations(library: str, rounds: int) -> list[dict[str, Any]]:
    """What an activation inside the first of two layers (3072 and 768 wide) gains over a node of its own."""
    rng, rows = np.random.default_rng(4), []
    for sparsity in SPARSITIES:
        weights = [random_weight(rng, shape, sparsity, 1) / np.float32(8) for shape in STACK_SHAPES]
        for activation in ("relu", "silu"):
            apart = open_session(make_model(weights, True, apart=activation), library)
            fused = open_session(make_model(weights, True, fused=activation), library)
            for tokens in (1, 197):
                x = rng.standard_normal((tokens, 768)).astype(np.float32)
                found = compare(apart, fused, x, rounds * max(1, 64 // tokens))
                figures = {key: found[key] for key in ("ratio", "ratio_low", "ratio_high")}
                times = {"apart_us": found["dense_us"], "fused_us": found["sparse_us"]}
                rows.append({"sparsity": sparsity, "activation": activation, "tokens": tokens, **figures, **times})
    return rows


MEMORY_CHILD = """
import sys, time
import numpy, onnxruntime
def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) / 1024
path, library = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if library:
    options.register_custom_ops_library(library)
before, started = resident(), time.process_time()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
seconds, created = time.process_time() - started, resident() - before
for tokens in (197, 1):
    session.run(None, {"X": numpy.zeros((tokens, 768), numpy.float32)})
print(created, resident() - before, seconds)
"""


def measure_memory(library: str) -> list[dict[str, Any]]:
    """Memory of the decoder's stack, anonymous pages only, in a process of its own; weights inside the file and beside it."""
    rng, rows = np.random.default_rng(5), []
    for sparsity in SPARSITIES:
        weights = make_stack(rng, sparsity, 1)
        for kind, values, given in (("dense", "fp32", ""), ("kernels", "fp32", library), ("kernels", "fp16", library)):
            model = onnx.load_from_string(make_model(weights, kind != "dense", values))
            for is_external in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.onnx"
                    onnx.save(model, path, save_as_external_data=is_external, location="weights", size_threshold=4096)
                    size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
                    command = [sys.executable, "-c", MEMORY_CHILD, str(path), given]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                created, used, seconds = map(float, done.stdout.split())
                rows.append({"sparsity": sparsity, "kind": kind, "values": values, "external_data": is_external,
                             "file_mib": round(size, 1), "created_mib": round(created, 1), "run_mib": round(used, 1),
                             "created_over_file": round(created / size, 3), "create_cpu_s": round(seconds, 3)})  # fmt: skip
    return rows


def measure_crossover(library: str, rounds: int) -> list[dict[str, Any]]:
    """From which sparsity a layer of 768 x 768 gains."""
    rng, rows = np.random.default_rng(2), []
    for sparsity in CROSSOVER_SPARSITIES:
        weight = random_weight(rng, (768, 768), sparsity, 1)
        sessions = open_session(make_model([weight], False), None), open_session(make_model([weight], True), library)
        for tokens in (1, 2, 4, 8, 16, 64, 197):
            x = rng.standard_normal((tokens, 768)).astype(np.float32)
            rows.append({"sparsity": sparsity, "tokens": tokens, **compare(*sessions, x, rounds * max(1, 64 // tokens))})
    return rows


def measure_creation(library: str) -> list[dict[str, Any]]:
    """CPU time to create a session of 16 layers of 768 x 768: dense, with kernels, and by the function; least of five."""
    rng, rows = np.random.default_rng(3), []
    for sparsity in SPARSITIES:
        weights = [random_weight(rng, (768, 768), sparsity, 1) for _ in range(16)]
        models = {"dense": make_model(weights, False), "sparse": make_model(weights, True)}
        x = np.zeros((197, 768), np.float32)
        row: dict[str, Any] = {
            "sparsity": sparsity,
            "file_mb": {key: round(len(model) / 1e6, 2) for key, model in models.items()},
        }
        for key, model, given in (("dense", "dense", None), ("kernels", "sparse", library), ("function", "sparse", None)):
            created, first = [], []
            for _ in range(5):
                started = time.process_time()
                session = open_session(models[model], given)
                created.append(time.process_time() - started)
                session.run(None, {"X": x})
                first_run = time.process_time()
                session.run(None, {"X": x})
                first.append(first_run - started - created[-1] - (time.process_time() - first_run))
            row[key] = {"create_ms": round(1e3 * min(created), 1), "first_run_extra_ms": round(1e3 * min(first), 1)}
        rows.append(row)
    return rows


def show(title: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Print rows as a table."""
    table = Table(*keys, title=title)
    for row in rows:
        table.add_row(*(str(row[key]) for key in keys))
    Console(width=140).print(table)


def main() -> None:
    """Measure everything, print it, and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--instruction-set", choices=runtime.INSTRUCTION_SETS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.instruction_set:
        os.environ["MFCOMPILE_RUNTIME_CPU"] = options.instruction_set
    library = runtime.library_path()
    result: dict[str, Any] = {
        "machine": {**machine.describe(), "onnxruntime": onnxruntime.__version__, "load_average": os.getloadavg()},
        "instruction_set": runtime.instruction_set(options.instruction_set), "rounds": options.rounds,
        "layers": measure_layers(library, options.rounds), "decoder": measure_decoder(library, options.rounds),
        "crossover": measure_crossover(library, options.rounds), "creation": measure_creation(library),
        "activations": measure_activations(library, options.rounds), "memory": measure_memory(library),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    figures = ("ratio", "ratio_low", "ratio_high", "dense_us", "sparse_us")
    show("layers, warm weights", result["layers"], ("shape", "pattern", "sparsity", "tokens", "limit", *figures))
    show("one token, weights from memory", result["decoder"], ("pattern", "sparsity", "values", "limit", *figures))
    show("crossover, 768 x 768", result["crossover"], ("sparsity", "tokens", *figures))
    fused = ("sparsity", "activation", "tokens", *figures[:3], "apart_us", "fused_us")
    show("an activation inside the layer over one behind it", result["activations"], fused)
    show("memory of 24 layers", result["memory"], tuple(result["memory"][0]))
    show("creating a session, 16 layers 768 x 768", result["creation"], ("sparsity", "file_mb", "dense", "kernels", "function"))


if __name__ == "__main__":
    main()
