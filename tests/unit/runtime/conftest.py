"""The library, built once; tests that need it are skipped with its reason where it cannot be."""

from __future__ import annotations

import pytest

from mfcompile import runtime


@pytest.fixture(scope="session")
def library() -> str:
    reason = runtime.why_unavailable()
    if reason is not None:
        pytest.skip(f"no sparse runtime here: {reason}")
    return runtime.library_path()


@pytest.fixture(params=runtime.INSTRUCTION_SETS)
def forced_library(request: pytest.FixtureRequest, library: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library, with one instruction set forced on the sessions that the test creates."""
    if runtime.instruction_set(request.param) is None:
        pytest.skip(f"this machine does not have {request.param}")
    monkeypatch.setenv("MFCOMPILE_RUNTIME_CPU", request.param)
    return library
