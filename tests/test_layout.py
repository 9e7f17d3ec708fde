"""The layout is a promise: root folders are subpackages, and the build knows all of them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("frontends", "passes", "exporters", "runtime")


def build_settings() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings: dict[str, object] = tomllib.load(file)["tool"]["setuptools"]
    return settings


@pytest.mark.parametrize("folder", MAPPED)
def test_root_folder_is_linked_into_the_package(folder: str) -> None:
    link = ROOT / "mfcompile" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert (ROOT / folder / "__init__.py").is_file()


def test_every_package_folder_is_listed_for_the_build() -> None:
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "mfcompile").rglob("__init__.py")
        if "__pycache__" not in init.parts
    }
    found |= {
        f"mfcompile.{'.'.join(init.parent.relative_to(ROOT).parts)}"
        for name in MAPPED
        for init in (ROOT / name).rglob("__init__.py")
    }
    settings = build_settings()
    assert set(settings["packages"]) == found  # type: ignore[call-overload]
    assert set(settings["package-dir"]) == found  # type: ignore[call-overload]


def test_no_folder_is_a_drawer_for_everything() -> None:
    names = {path.name for name in ("mfcompile", *MAPPED) for path in (ROOT / name).rglob("*")}
    assert not names & {"utils", "helpers", "common", "utils.py", "helpers.py", "common.py"}


def test_source_files_stay_small() -> None:
    sources = [path for name in ("mfcompile", *MAPPED) for path in (ROOT / name).rglob("*.py") if not path.parent.is_symlink()]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
