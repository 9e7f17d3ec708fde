"""Run from a neutral directory against an installed wheel: every subpackage imports, and a model is pruned and exported."""

from __future__ import annotations

import importlib
import pkgutil
import tempfile
from pathlib import Path

import torch
from torch import nn

import mfcompile


def main() -> None:
    """Import everything, prune a small model, write it."""
    assert not (Path.cwd() / "mfcompile").exists(), "run this away from the checkout"
    names = [item.name for item in pkgutil.walk_packages(mfcompile.__path__, "mfcompile.")]
    for subpackage in ("cli", "exporters", "frontends", "passes", "runtime"):
        assert f"mfcompile.{subpackage}" in names, f"mfcompile.{subpackage} is missing from the wheel"
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), nn.TransformerEncoder(block, 2))
    compiled = mfcompile.compile_pruned(model.eval(), torch.randn(2, 3, 8, 8), sparsity=0.5)
    with tempfile.TemporaryDirectory() as folder:
        artifact = compiled.export_onnx(Path(folder) / "model.onnx")
        assert compiled.verify(artifact).passed
    print(f"{len(names)} modules imported, a model pruned to {compiled.masks.kept_count} weights and exported")  # noqa: T201


if __name__ == "__main__":
    main()
