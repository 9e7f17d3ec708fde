"""Which runtimes read packed files: other versions of onnxruntime, onnxruntime in Node.js, OpenVINO.

python -m benchmarks.compatibility [--keep DIR] [--only NAME ...]

Exports one small model (a convolution, an embedding and linear layers, stored as gap8, gap4 and mask) in every form, and runs
it in environments of their own, which pip and npm make. Outputs are compared with the dense export in the onnxruntime that is
installed here. Figures go to ``results/compatibility.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULT = Path(__file__).resolve().parent / "results" / "compatibility.json"
ONNXRUNTIMES = ("1.20.1", "1.22.1", "1.24.4", "1.27.0")
FORMS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed fp16": {"values": "fp16"},
    "inline": {"inline": True},
    "inline fp16": {"values": "fp16", "inline": True},
}
DENSITIES = {"patches.weight": 0.37, "embedding.weight": 0.1, "first.weight": 0.1, "second.weight": 0.37, "third.weight": 0.5}

PYTHON_CHILD = """
    import json, sys
    import numpy as np
    folder, forms = sys.argv[1], json.loads(sys.argv[2])
    given, found = dict(np.load(f"{folder}/inputs.npz")), {}
    runtime = sys.argv[3]
    for name in forms:
        try:
            path = f"{folder}/{name}.onnx"
            if runtime == "openvino":
                import openvino
                version = openvino.__version__.split("-")[0]
                model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
                output = model(given)[model.output(0)]
            else:
                import onnxruntime
                version = onnxruntime.__version__
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                output = session.run(None, given)[0]
            expected = np.load(f"{folder}/{name}.npy")
            found[name] = float(np.abs(output - expected).max() / np.abs(expected).max())
        except Exception as error:
            found[name] = " ".join(str(error).split())[:300]
    print(json.dumps({"version": version, "forms": found}))
"""
NODE_CHILD = """
    const ort = require('onnxruntime-node');
    const fs = require('fs');
    const [folder, forms] = [process.argv[2], JSON.parse(process.argv[3])];
    (async () => {
      const given = JSON.parse(fs.readFileSync(`${folder}/inputs.json`));
      const feeds = {
        pixels: new ort.Tensor('float32', Float32Array.from(given.pixels.data), given.pixels.shape),
        ids: new ort.Tensor('int64', BigInt64Array.from(given.ids.data.map(BigInt)), given.ids.shape),
      };
      const found = {};
      for (const name of forms) {
        try {
          const session = await ort.InferenceSession.create(`${folder}/${name}.onnx`, {logSeverityLevel: 4});
          const output = (await session.run(feeds))[session.outputNames[0]].data;
          const expected = JSON.parse(fs.readFileSync(`${folder}/${name}.json`));
          let [worst, largest] = [0, 0];
          expected.forEach((value, index) => {
            worst = Math.max(worst, Math.abs(value - output[index]));
            largest = Math.max(largest, Math.abs(value));
          });
          found[name] = worst / largest;
        } catch (error) { found[name] = String(error).split('\\n')[0].slice(0, 200); }
      }
      console.log(JSON.stringify({version: require('onnxruntime-node/package.json').version, forms: found}));
    })();
"""


class Layers(nn.Module):
    """A convolution, an embedding and three linear layers, one of them with a weight that is multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.embedding = nn.Embedding(48, 64)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.third = nn.Linear(64, 40)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """(batch, 3, 16, 16) and (batch, length) to (batch, 16 + length, 40)."""
        tokens = torch.cat([self.patches(pixels).flatten(2).transpose(1, 2), self.embedding(ids)], dim=1)
        hidden: Tensor = self.third(tokens + self.second(torch.relu(self.first(tokens))))
        return hidden


def write_models(folder: Path) -> dict[str, list[str]]:
    """Every form with inputs and expected outputs; form -> encodings and operators in the file."""
    import onnx
    import onnxruntime

    import mfcompile
    from mfcompile.exporters.onnx_model import export_onnx
    from mfcompile.frontends.capture import with_export
    from mfcompile.masks import PackedMask

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = {"pixels": torch.randn(2, 3, 16, 16), "ids": torch.randint(0, 48, (2, 24))}
    captured = with_export(mfcompile.capture(Layers().eval(), inputs))
    drawn = {
        name: torch.rand(captured.module.get_parameter(name).shape, generator=generator) < density
        for name, density in DENSITIES.items()
    }
    masked = replace(captured, masks=mfcompile.MaskSet({name: PackedMask.pack(mask) for name, mask in drawn.items()}))
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    np.savez(folder / "inputs.npz", **feeds)  # type: ignore[arg-type]
    listed = {name: {"data": array.reshape(-1).tolist(), "shape": list(array.shape)} for name, array in feeds.items()}
    (folder / "inputs.json").write_text(json.dumps(listed))
    described = {}
    for name, options in FORMS.items():
        artifact = export_onnx(masked, folder / f"{name}.onnx", **options)
        values = options.get("values", "fp32")
        dense = export_onnx(masked, folder / "dense.onnx", format="dense", values=str(values))
        session = onnxruntime.InferenceSession(str(dense.path), providers=["CPUExecutionProvider"])
        expected = session.run(None, feeds)[0]
        np.save(folder / f"{name}.npy", expected)
        (folder / f"{name}.json").write_text(json.dumps(expected.reshape(-1).tolist()))
        operators = {node.op_type for node in onnx.load(artifact.path).graph.node if node.domain}
        described[name] = sorted({item.encoding for item in artifact.encodings} | operators)
    return described


def in_python(folder: Path, models: Path, requirement: str, runtime: str) -> dict[str, Any]:
    """What a Python runtime makes of the files, in an environment of its own."""
    place = folder / requirement.replace("==", "-")
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement, "numpy"], check=True)
    command = [str(python), "-c", textwrap.dedent(PYTHON_CHILD), str(models), json.dumps(list(FORMS)), runtime]
    return read_answer(command)


def in_node(folder: Path, models: Path) -> dict[str, Any]:
    """What onnxruntime-node makes of the files."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        return {"skipped": "npm and node are not installed"}
    place = folder / "node"
    place.mkdir(exist_ok=True)
    if not (place / "node_modules").exists():  # without its script, which fetches libraries for graphics processors
        (place / "package.json").write_text("{}")
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "onnxruntime-node"]
        subprocess.run(command, check=True, cwd=place, capture_output=True)
    script = place / "child.js"
    script.write_text(textwrap.dedent(NODE_CHILD))
    return read_answer(["node", str(script), str(models), json.dumps(list(FORMS))])


def read_answer(command: list[str]) -> dict[str, Any]:
    """What a child process found, or how it failed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1][:200]}
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def show(result: dict[str, Any]) -> None:
    """Print, for every runtime and form, the largest difference from the dense outputs relative to the largest of these."""
    print(f"{'runtime':28}" + "".join(f"{name:>14}" for name in FORMS))
    for name, row in result["runtimes"].items():
        cells = [row.get("forms", {}).get(form, row.get("skipped", row.get("failed"))) for form in FORMS]
        texts = [f"{cell:.1e}" if isinstance(cell, (int, float)) else "refused" for cell in cells]
        version = row.get("version", "").split("-")[0]
        print(f"{name.removesuffix(version).strip()} {version}".ljust(28), *(f"{text:>13}" for text in texts))
        for cell in dict.fromkeys(cell for cell in cells if isinstance(cell, str)):
            print(f"    {cell}")


def main() -> None:
    """Make the files and the environments, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder for the environments, to be used again (default: a temporary one)")
    parser.add_argument("--show", action="store_true", help="print the figures of the last run")
    args = parser.parse_args()
    if not args.show:
        with tempfile.TemporaryDirectory() as scratch:
            models = Path(scratch) / "models"
            models.mkdir()
            folder = args.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            result: dict[str, Any] = {"forms": write_models(models), "runtimes": {}}
            for version in ONNXRUNTIMES:
                requirement = f"onnxruntime=={version}"
                result["runtimes"][f"onnxruntime {version}"] = in_python(folder, models, requirement, "onnxruntime")
            result["runtimes"]["onnxruntime here"] = read_answer(
                [sys.executable, "-c", textwrap.dedent(PYTHON_CHILD), str(models), json.dumps(list(FORMS)), "onnxruntime"]
            )
            result["runtimes"]["onnxruntime-node"] = in_node(folder, models)
            result["runtimes"]["openvino"] = in_python(folder, models, "openvino", "openvino")
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    show(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
