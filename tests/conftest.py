"""Options of the test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
"""The same examples in every run, so that a change is judged by what it changed; HYPOTHESIS_PROFILE=search draws new ones."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is found into tests/golden instead of comparing")


@pytest.fixture(autouse=True, scope="module")
def statistics_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of calibration statistics that every file of tests starts empty; the user's is left alone.

    One for the whole run would make what is collected depend on which files a worker ran before.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFCOMPILE_CACHE", str(tmp_path_factory.mktemp("statistics-cache")))
        yield


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written."""
    return bool(request.config.getoption("--update-golden"))
