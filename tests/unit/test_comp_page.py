"""docs/comp.md holds: its table of invariants names all of them, and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comp.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## The invariants and their tests\n")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", SECTION, flags=re.MULTILINE)


def names_in(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_invariant_has_a_row() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 22))


def test_every_test_that_the_table_names_exists() -> None:
    for number, _, named in ROWS:
        found = re.findall(r"`([\w/]+\.py)::(\w+)`", named)
        assert found, number
        assert len(found) == named.count("::"), number  # nothing is named that is not looked up
        for path, test in found:
            assert test in names_in(ROOT / "tests" / path), f"{number}: {path}::{test}"
