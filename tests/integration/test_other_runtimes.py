"""Packed files in the runtimes that are installed; ``python -m benchmarks.compatibility`` installs others and runs them all."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compatibility


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("models")
    return folder, compatibility.write_models(folder)


def in_this_python(models: Path, runtime: str) -> dict[str, Any]:
    code = textwrap.dedent(compatibility.PYTHON_CHILD)
    return compatibility.read_answer([sys.executable, "-c", code, str(models), json.dumps(list(compatibility.FORMS)), runtime])


def test_every_encoding_and_both_kinds_of_nodes_take_part(models: tuple[Path, dict[str, list[str]]]) -> None:
    described = models[1]
    assert {"gap8", "gap4", "mask"} <= set(described["packed"])
    assert any(name.startswith("SparseLinear") for name in described["packed"])
    assert not any(name.startswith("SparseLinear") for name in described["inline"])


def test_onnxruntime_computes_what_it_computes_of_the_dense_file(models: tuple[Path, dict[str, list[str]]]) -> None:
    assert in_this_python(models[0], "onnxruntime")["forms"] == dict.fromkeys(compatibility.FORMS, 0.0)


def test_node(models: tuple[Path, dict[str, list[str]]], tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    known = subprocess.run([node, "-e", "require.resolve('onnxruntime-node')"], capture_output=True, check=False)
    if known.returncode:
        pytest.skip("onnxruntime-node is not in NODE_PATH; python -m benchmarks.compatibility installs it and runs this")
    script = tmp_path / "child.js"
    script.write_text(textwrap.dedent(compatibility.NODE_CHILD))
    forms = compatibility.read_answer([node, str(script), str(models[0]), json.dumps(list(compatibility.FORMS))])["forms"]
    assert forms.keys() == compatibility.FORMS.keys()
    assert all(value == 0 for value in forms.values()), forms


def test_openvino_reads_plain_nodes(models: tuple[Path, dict[str, list[str]]]) -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed; python -m benchmarks.compatibility installs it and runs this")
    forms = in_this_python(models[0], "openvino")["forms"]
    for name in ("inline", "inline fp16"):
        assert forms[name] < 1e-5
