"""What int8 costs in accuracy: retrieval of the example model in fp32 and int8, dense and pruned, and how far outputs move.

python -m benchmarks.int8_accuracy [--scenes 100]

Files run in onnxruntime, int8 ones in stock onnxruntime and with the sparse kernels. ``error`` is the largest difference
to the fp32 file of the same masks over all held-out scenes, of the largest magnitude of that output, for the output where it is
largest; ``worlds`` the same between stock onnxruntime and the kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import mfcompile
from mfcompile import runtime

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RESULT = Path(__file__).resolve().parent / "results" / "int8_accuracy.json"
VARIANTS: tuple[tuple[float, str], ...] = (
    (0.0, "unstructured"), (0.63, "1x4"), (0.75, "1x4"), (0.63, "unstructured"), (0.75, "unstructured"),
)  # fmt: skip

Outputs = Mapping[str, NDArray[Any]]


def forward_of(path: Path, library: str | None) -> Callable[..., Outputs]:
    """A callable over arrays for a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]

    def forward(pixel_values: NDArray[Any], input_ids: NDArray[Any], attention_mask: NDArray[Any]) -> Outputs:
        feeds = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        return dict(zip(names, session.run(None, feeds), strict=True))

    return forward


def distance(first: Outputs, second: Outputs) -> float:
    """Largest difference of an output, as a share of its largest magnitude."""
    return max(float(np.abs(first[name] - second[name]).max() / np.abs(first[name]).max()) for name in first)


def main() -> None:
    """Prune, write, score, print, and keep as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    from emoji_xvlm import model as example
    from emoji_xvlm.evaluate import evaluate_callable, held_out_set

    library = runtime.library_path()
    inputs = held_out_set(options.scenes)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for sparsity, pattern in VARIANTS:
            compiled = mfcompile.compile_pruned(
                example.build_model(), example.example_inputs, sparsity=sparsity, pattern=pattern,
                calibration=example.calibration_batches(),
            )  # fmt: skip
            outputs: dict[str, Outputs] = {}
            for values in ("fp32", "int8"):
                artifact = compiled.export_onnx(Path(folder) / f"{values}.onnx", "packed", values)
                for name in ("stock", "kernels") if values == "int8" else ("stock",):
                    forward = forward_of(artifact.path, library if name == "kernels" else None)
                    outputs[f"{values} {name}"] = forward(*inputs)
                    rows.append({
                        "sparsity": sparsity, "pattern": pattern, "values": values, "runtime": name,
                        "megabytes": round(artifact.size_bytes / 1e6, 2),
                        "r1": round(evaluate_callable(forward, scenes=options.scenes)["r1"], 2),
                    })  # fmt: skip
            error = distance(outputs["fp32 stock"], outputs["int8 stock"])
            worlds = distance(outputs["int8 stock"], outputs["int8 kernels"])
            for row in rows[-2:]:
                row |= {"error": round(error, 5), "worlds": worlds}
            options.output.write_text(json.dumps({"scenes": options.scenes, "rows": rows}, indent=1) + "\n")
    columns = ("sparsity", "pattern", "values", "runtime", "megabytes", "r1", "error", "worlds")
    table = Table(*columns, title=f"retrieval over {options.scenes} scenes, R@1 in per cent")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
