"""The sparse runtime in many versions of onnxruntime: every operator against NumPy, with the library and without it.

python -m benchmarks.onnxruntime_versions [--versions 1.20.1 1.24.4] [--environments DIR]

Each version gets a virtual environment of its own (made by pip on first use, kept in DIR), and one library serves all. The
models are made here; what runs there needs NumPy and onnxruntime only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from mfcompile import runtime
from mfcompile.exporters.sparse_linear import ACTIVATIONS, OP_TYPES, operator_type
from tests.sparse_models import random_weight, sparse_model

RESULT = Path(__file__).resolve().parent / "results" / "onnxruntime_versions.json"
VERSIONS = ("1.20.1", "1.22.1", "1.24.4", "1.27.0", "1.31.1")
TOKENS = (1, 5, 40)

CHILD = """
import glob, json, sys
import numpy, onnxruntime
folder, library = sys.argv[1:]
found = {"version": onnxruntime.__version__, "kernels": {}, "function": {}}
for path in sorted(glob.glob(folder + "/*.onnx")):
    arrays = numpy.load(path[:-5] + ".npz")
    for key in ("kernels", "function"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 4
        try:
            if key == "kernels":
                options.register_custom_ops_library(library)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            worst = 0.0
            for name in arrays.files:
                if name.startswith("x"):
                    y = session.run(None, {"X": arrays[name]})[0]
                    worst = max(worst, float(numpy.abs(y - arrays["y" + name[1:]]).max()))
            found[key][path.rsplit("/", 1)[1][:-5]] = worst
        except Exception as error:
            found[key][path.rsplit("/", 1)[1][:-5]] = str(error)[:300]
print(json.dumps(found))
"""


def write_models(folder: Path) -> None:
    """One model for each operator with a bias, with inputs, and the outputs of the function in this onnxruntime."""
    from tests.sparse_models import run, session_of

    rng = np.random.default_rng(0)
    for encoding in OP_TYPES:
        for activation in ACTIVATIONS:
            weight, bias = random_weight(rng, 48, 64, 0.3), rng.standard_normal(48).astype(np.float32)
            model = sparse_model(weight, bias, encoding=encoding, activation=activation)
            name = operator_type(encoding, has_bias=True, activation=activation)
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
            reference = session_of(model)
            arrays = {f"x{tokens}": rng.standard_normal((tokens, 64)).astype(np.float32) for tokens in TOKENS}
            arrays |= {f"y{key[1:]}": run(reference, x) for key, x in list(arrays.items())}
            np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)


def make_environment(folder: Path, version: str) -> Path:
    """The interpreter of a virtual environment that has this onnxruntime; made where it is not there."""
    interpreter = folder / f"onnxruntime-{version}" / "bin" / "python"
    if not interpreter.exists():
        venv.create(interpreter.parents[1], with_pip=True)
        packages = [f"onnxruntime=={version}", "numpy"]
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *packages], check=True)
    return interpreter


def main() -> None:
    """Try every version, print what holds, and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS))
    parser.add_argument("--environments", type=Path, help="where the environments are kept (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    library, rows = runtime.library_path(), []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for version in options.versions:
            row: dict[str, Any] = {"version": version}
            try:
                interpreter = make_environment(options.environments or Path(folder), version)
                done = subprocess.run(
                    [str(interpreter), "-c", CHILD, folder, library], capture_output=True, text=True, check=True
                )
                found = json.loads(done.stdout)
            except subprocess.CalledProcessError as error:
                rows.append({**row, "error": (error.stderr or str(error))[-300:]})
                continue
            for key in ("kernels", "function"):
                faults = {name: value for name, value in found[key].items() if not isinstance(value, float) or value > 1e-4}
                largest = max((value for value in found[key].values() if isinstance(value, float)), default=None)
                row[key] = {"operators": len(found[key]), "faults": faults, "largest_difference": largest}
            rows.append(row)
    result = {"machine": machine.describe(), "instruction_set": runtime.instruction_set(), "versions": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("onnxruntime", "with the library", "without", title=f"{len(OP_TYPES) * len(ACTIVATIONS)} operators")
    for row in rows:
        table.add_row(row["version"], *(row.get("error", _verdict(row.get(key))) for key in ("kernels", "function")))
    Console(width=140).print(table)
    if any("error" in row or row["kernels"]["faults"] or row["function"]["faults"] for row in rows):
        sys.exit(1)


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    return f"{found['faults']}" if found["faults"] else f"all, to {found['largest_difference']:.1e}"


if __name__ == "__main__":
    main()
