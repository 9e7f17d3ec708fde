"""How the library is found, built, and refused."""

from __future__ import annotations

import platform
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfcompile import runtime
from mfcompile.errors import RuntimeLibraryError
from mfcompile.runtime import building


@pytest.fixture(autouse=True)
def fresh_search() -> Iterator[None]:
    """What was found is remembered for a process; these tests look again and leave nothing behind."""
    runtime._find_library.cache_clear()
    yield
    runtime._find_library.cache_clear()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_library_is_built_once_and_outside_the_package(library: str) -> None:
    assert Path(library).is_file()
    assert not Path(library).is_relative_to(Path(runtime.__file__).parents[1])
    assert runtime.is_available()
    assert runtime.library_path() == library
    before = Path(library).stat().st_mtime_ns
    assert str(building.build_library()) == library
    assert Path(library).stat().st_mtime_ns == before


def test_a_changed_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = building._source_digest()
    for path in building.SOURCE_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(building, "SOURCE_DIR", tmp_path)
    assert building._source_digest() == first
    (tmp_path / "packed.cc").write_text("// changed")
    assert building._source_digest() != first


def test_without_a_compiler_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(building.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert not runtime.is_available()
    assert "neither c++ nor g++ nor clang++ is on the PATH" in str(runtime.why_unavailable())
    with pytest.raises(RuntimeLibraryError, match="needs a C\\+\\+ compiler"):
        runtime.library_path()


def test_a_compiler_that_is_named_and_absent_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(building.CACHE_VARIABLE, str(tmp_path))
    assert "CXX names 'no-such-compiler'" in str(runtime.why_unavailable())


def test_a_compiler_that_fails_leaves_its_first_error_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "failing", "echo 'x.cc:1: error: no such dialect' >&2; exit 1")))
    monkeypatch.setenv(building.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert "x.cc:1: error: no such dialect" in str(runtime.why_unavailable())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CXX", str(script(tmp_path / "unused", "exit 0")))
    monkeypatch.setenv(building.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert building.CACHE_VARIABLE in str(runtime.why_unavailable())


def test_a_library_that_does_not_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, str(broken))
    assert "does not load" in str(runtime.why_unavailable())


def test_a_given_library_is_used(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "elsewhere.so"
    other.write_bytes(Path(library).read_bytes())
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, str(other))
    assert runtime.library_path() == str(other)


def test_it_can_be_built_ahead_of_time(library: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mfcompile.runtime"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(library)


def test_instruction_sets(library: str) -> None:
    assert runtime.instruction_set("portable") == "portable"
    assert runtime.instruction_set("no-such-set") is None
    supported = [name for name in runtime.INSTRUCTION_SETS if runtime.instruction_set(name) == name]
    assert runtime.instruction_set() == supported[-1]
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if platform.machine() == "x86_64" and flags:
        assert ("avx2" in supported) == ("avx2" in flags and "fma" in flags)
        assert ("avx512" in supported) == all(name in flags for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
