"""Arrows of imports: core <- {frontends, passes, exporters, runtime} <- compile <- cli, and what a plain import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("frontends", "passes", "exporters", "runtime")
TOP = {"mfcompile.compile", "mfcompile.exporting", "mfcompile.steps", "mfcompile.onnx_ladder", "mfcompile.cli"}
TOP |= {"mfcompile.loading", "mfcompile.tokens", "mfcompile.structure", "mfcompile.comp", "mfcompile.benchmark"}
ABOVE_CORE = {
    "compile.py", "comparison.py", "comparison_result.py", "exporting.py", "steps.py", "onnx_ladder.py", "onnx_entry.py",
    "tokens.py", "structure.py", "__init__.py", "__main__.py", "loading.py", "token_request.py",
}  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_neither_each_other_nor_what_stands_above(stage: str) -> None:
    forbidden = {f"mfcompile.{other}" for other in STAGES if other != stage} | TOP
    for path in (ROOT / stage).rglob("*.py"):
        broken = [name for name in imported(path) if any(is_below(name, package) for package in forbidden)]
        assert not broken, f"{path.relative_to(ROOT)} imports {broken}"


def test_core_imports_no_stage() -> None:
    for path in (ROOT / "mfcompile").glob("*.py"):
        if path.name in ABOVE_CORE:
            continue
        broken = [
            name
            for name in imported(path)
            if any(is_below(name, package) for package in {f"mfcompile.{s}" for s in STAGES} | TOP)
        ]
        assert not broken, f"{path.name} imports {broken}"


def test_compile_does_not_import_the_command_line() -> None:
    assert not [name for name in imported(ROOT / "mfcompile" / "compile.py") if is_below(name, "mfcompile.cli")]


LOADING = """
import tempfile, onnx, mfcompile
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", [x], [y])
with tempfile.TemporaryDirectory() as folder:
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), folder + "/model.onnx")
    mfcompile.load_session(folder + "/model.onnx", runtime=False)
"""
"""A session of a plain file."""


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mfcompile", ("transformers", "onnx", "onnxruntime", "onnxscript", "matplotlib")),
        (
            "from mfcompile.loading import load_session, _Opener; _Opener(1, 'auto', None, None)._options()",
            ("torch", "transformers"),
        ),
        ("import mfcompile.cli", ("torch", "transformers", "onnxruntime", "matplotlib")),
    ],
)
def test_imports_are_lean(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
