"""Options of the test suite."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

    from mfcompile.graph import ExportedModel

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
"""The same examples in every run, so that a change is judged by what it changed; HYPOTHESIS_PROFILE=search draws new ones."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is found into tests/golden instead of comparing")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: processes that share the work by files end together."""
    weights = Counter[str]()
    for item in items:
        weights[item.nodeid.partition("::")[0]] += 1000 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -weights[item.nodeid.partition("::")[0]])


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def statistics_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of calibration statistics that every file of tests starts empty; the user's is left alone.

    One for the whole run would make what is collected depend on which files a worker ran before.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFCOMPILE_CACHE", str(tmp_path_factory.mktemp("statistics-cache")))
        yield


_CONVERTED = 8
"""Programs whose conversion is kept: tests of one module come one after the other."""


@pytest.fixture(autouse=True, scope="session")
def _convert_each_program_once() -> Iterator[None]:
    """Copies of a conversion stand in for converting the same program again, which takes seconds.

    A copy shares the tensors of the program, as a conversion does: what is written is what they hold by then.
    """
    from mfcompile.exporters import conversion, onnx_model

    convert = conversion.convert_program
    known: OrderedDict[int, tuple[ExportedProgram, ir.Model]] = OrderedDict()

    def convert_once(exported: ExportedModel) -> ir.Model:
        key = id(exported.program)
        if key not in known:
            known[key] = (exported.program, convert(exported))
        known.move_to_end(key)
        while len(known) > _CONVERTED:
            known.popitem(last=False)
        return known[key][1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_model, "convert_program", convert_once)
        _list_translations_once(patch)
        yield


def _list_translations_once(patch: pytest.MonkeyPatch) -> None:
    """The exporter of torch lists its two thousand translations anew for every model; copies of one list are as good.

    Its inner names may change: then it goes on as it is.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made: dict[tuple[object, ...], ONNXRegistry] = {}
        listed = ONNXRegistry.from_torchlib

        def copied(*words: object, **named: object) -> ONNXRegistry:
            key = (*words, *named.items())
            if key not in made:
                made[key] = listed(*words, **named)
            fresh = ONNXRegistry()
            fresh.__dict__.update(made[key].__dict__)
            fresh.functions = {name: list(known) for name, known in made[key].functions.items()}
            return fresh

        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written."""
    return bool(request.config.getoption("--update-golden"))
