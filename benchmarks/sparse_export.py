"""What the packed export decides by measurement: joint projections, streamed weights, and where to keep packed tensors.

python -m benchmarks.sparse_export [--rounds 15]

``joint``: q, k and v (768 x 768 each) over one X as three SparseLinear nodes against one of 2304 x 768 and a Split, with the
runtime and in stock onnxruntime; above 1 the one node is faster. ``streamed``: a stack of layers larger than the caches, so
that weights come from memory, dense against sparse, by tokens and sparsity; above 1 sparse is faster. Both are ratios of CPU
time of one thread, paired, with quartiles. ``memory``: resident memory of a process with a session of 57 M weights, above what
it was before, and its peak, dense, packed and packed with plain nodes (inline), inside of the .onnx file and in external data.
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
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks import machine
from benchmarks.sparse_kernels import Floats, compare, make_model, open_session, random_weight, show
from mfcompile import runtime
from mfcompile.exporters.onnx_files import plan_files, write_files
from mfcompile.exporters.packing import encode
from mfcompile.exporters.sparse_linear import DOMAIN, VERSION, sparse_linear_function, sparse_linear_node
from mfcompile.exporters.weight_placement import MaskedWeight, PlacementOptions, place_weights
from mfcompile.masks import MaskSet, PackedMask

RESULT = Path(__file__).resolve().parent / "results" / "sparse_export.json"
SPARSITIES = (0.63, 0.75, 0.9)
STREAMED_SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.63)
MEMORY_SPARSITIES = (0.63, 0.9)
STREAMED_LAYERS = 16  # 151 MB of dense weights
MEMORY_LAYERS = 24


def make_projections(weights: list[Floats], *, is_joint: bool) -> bytes:
    """Three layers over one X: a node each, or one node and a Split."""
    nodes, initializers = [], []
    groups = [("all", np.concatenate(weights))] if is_joint else list(zip("QKV", weights, strict=True))
    for name, weight in groups:
        encoded = encode(weight, weight != 0, "fp32", encoding="gap8")
        assert encoded.gaps is not None
        tensors = {f"{name}.gaps": encoded.gaps, f"{name}.values": encoded.values,
                   f"{name}.bias": np.zeros(len(weight), np.float32)}  # fmt: skip
        initializers += [numpy_helper.from_array(array, key) for key, array in tensors.items()]
        nodes.append(sparse_linear_node("gap8", ["X", *tensors], name, (weight.shape[0], weight.shape[1])))
    if is_joint:
        nodes.append(helper.make_node("Split", ["all"], list("QKV"), axis=-1, num_outputs=3))
    rows, columns = weights[0].shape
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", rows]) for name in "QKV"]
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["tokens", columns])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph(nodes, "projections", [x], outputs, initializers)
    model = helper.make_model(graph, functions=[sparse_linear_function("gap8", 18)], opset_imports=imports, ir_version=8)
    return bytes(model.SerializeToString())


def measure_joint(library: str, rounds: int) -> list[dict[str, Any]]:
    """Time of three nodes divided by that of one."""
    rng, rows = np.random.default_rng(0), []
    for sparsity in SPARSITIES:
        weights = [random_weight(rng, (768, 768), sparsity, 1) for _ in range(3)]
        for given in (library, None):
            sessions = [open_session(make_projections(weights, is_joint=is_joint), given) for is_joint in (False, True)]
            for tokens in (1, 8, 32, 197, 577):
                x = {"X": rng.standard_normal((tokens, 768)).astype(np.float32)}
                ratios = _ratios(sessions, x, rounds, repeats=max(1, 128 // tokens))
                where = "stock onnxruntime" if given is None else "runtime"
                rows.append({"where": where, "sparsity": sparsity, "tokens": tokens, **ratios})
    return rows


def _ratios(
    sessions: list[onnxruntime.InferenceSession], feeds: dict[str, Any], rounds: int, *, repeats: int
) -> dict[str, float]:
    """CPU time of the first over that of the second, of ``repeats`` runs in a round: median and quartiles."""
    found = []
    for index in range(-2, rounds):
        seconds = [0.0, 0.0]
        for which in (0, 1) if index % 2 else (1, 0):
            started = time.thread_time()
            for _ in range(repeats):
                sessions[which].run(None, feeds)
            seconds[which] = time.thread_time() - started
        if index >= 0:
            found.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(found, n=4)
    return {"ratio": round(middle, 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3)}


def make_stack(rng: np.random.Generator, sparsity: float, count: int) -> list[Floats]:
    """Layers one after the other, 3072 x 768 and back, none equal to another (onnxruntime stores equal weights once)."""
    pair = [random_weight(rng, shape, sparsity, 1) / np.float32(8) for shape in ((3072, 768), (768, 3072))]
    return [np.roll(weight, index, axis=1) for index in range(count // 2) for weight in pair]


def measure_streamed(library: str, rounds: int) -> list[dict[str, Any]]:
    """Few tokens through a stack of layers that is larger than the caches."""
    rng, rows = np.random.default_rng(1), []
    for sparsity in STREAMED_SPARSITIES:
        weights = make_stack(rng, sparsity, STREAMED_LAYERS)
        sessions = open_session(make_model(weights, False), None), open_session(make_model(weights, True), library)
        for tokens in (1, 4, 8, 16, 32):
            x = rng.standard_normal((tokens, 768)).astype(np.float32)
            rows.append({"sparsity": sparsity, "tokens": tokens, **compare(*sessions, x, rounds)})
    return rows


CHILD = """
import sys, numpy, onnxruntime
def resident(what):
    return int(next(line for line in open('/proc/self/status') if line.startswith(what)).split()[1]) / 1024
path, library = sys.argv[1:3]
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 1
if library:
    options.register_custom_ops_library(library)
x = {"X": numpy.zeros((197, 768), numpy.float32)}
before = resident("VmRSS")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, x)
print(resident("VmRSS") - before, resident("VmHWM") - before)
"""


def _place(weights: list[Floats], kind: str) -> ir.Model:
    """The layers as the exporter writes them."""
    model = ir.from_proto(onnx.load_from_string(make_model(weights, is_sparse=False)))
    graph = model.graph
    kept = {f"weight{index}": torch.from_numpy(weight.T != 0) for index, weight in enumerate(weights)}
    masks = MaskSet({fqn: PackedMask.pack(mask) for fqn, mask in kept.items()})
    found = []
    for fqn in kept:
        tensor = graph.initializers[fqn].const_value
        assert tensor is not None  # initializers of the main graph have values
        found.append(MaskedWeight(fqn, graph.initializers[fqn], tensor, masks))
    place_weights(model, found, PlacementOptions("dense" if kind == "dense" else "packed", "fp32", inline=kind == "inline"))
    return model


def measure_memory(library: str) -> list[dict[str, Any]]:
    """Resident memory of a session after three runs, and its peak, in MiB, each in a process of its own."""
    rows = []
    for sparsity in MEMORY_SPARSITIES:
        weights = make_stack(np.random.default_rng(2), sparsity, MEMORY_LAYERS)
        for kind in ("dense", "packed", "inline"):
            for is_external in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.onnx"
                    layout = plan_files(_place(weights, kind), "model.onnx.data" if is_external else None)
                    write_files(layout, path, path.with_name("model.onnx.data") if is_external else None)
                    for where, given in (("stock onnxruntime", ""), *([("runtime", library)] if kind == "packed" else [])):
                        command = [sys.executable, "-c", CHILD, str(path), given]
                        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                        rows.append({
                            "sparsity": sparsity, "file": kind, "where": where, "external_data": is_external,
                            "file_mib": round(layout.size_bytes / 2**20), "resident_mib": round(float(printed[0])),
                            "peak_mib": round(float(printed[1])),
                        })  # fmt: skip
    return rows


def main() -> None:
    """Measure everything, print it, and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    library = runtime.library_path()
    result: dict[str, Any] = {
        "machine": {**machine.describe(), "onnxruntime": onnxruntime.__version__, "load_average": os.getloadavg()},
        "instruction_set": runtime.instruction_set(), "rounds": options.rounds, "memory": measure_memory(library),
        "joint": measure_joint(library, options.rounds), "streamed": measure_streamed(library, options.rounds),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    figures = ("ratio", "ratio_low", "ratio_high")
    show("three nodes / one node and a Split", result["joint"], ("where", "sparsity", "tokens", *figures))
    show("dense / sparse, weights from memory", result["streamed"], ("sparsity", "tokens", *figures))
    memory = ("sparsity", "file", "where", "external_data", "file_mib", "resident_mib", "peak_mib")
    show("memory of a session", result["memory"], memory)


if __name__ == "__main__":
    main()
