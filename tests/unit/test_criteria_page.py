"""docs/criteria.md holds: its example runs, by object, by entry point and in model.py, and its tables name all there is."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mfcompile
from mfcompile.passes.allocation import ALLOCATIONS
from mfcompile.passes.criteria import registry
from mfcompile.passes.sparsity_patterns import BLOCK_PATTERNS, UNSTRUCTURED
from mfcompile.recipe import UPDATES
from tests.models import tiny_vlm, vlm_batch, vlm_captured, vlm_regions, vlm_statistics

PAGE = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
OWN = SECTIONS["A criterion of one's own"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", OWN, flags=re.MULTILINE | re.DOTALL)


def first_column(section: str) -> set[str]:
    """What the first cell of every row of the tables of a section quotes."""
    rows = re.findall(r"^\| (.*?) \|", SECTIONS[section], flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(.*?)`", row)}


def test_the_tables_name_all_there_is() -> None:
    own = set(registry._OWN)
    assert first_column("Criteria: what a weight is worth") == own
    assert first_column("Allocations: who loses how much") == set(ALLOCATIONS)
    assert first_column("Patterns: in what shape weights go") >= {UNSTRUCTURED, *BLOCK_PATTERNS, "2:4"}
    assert all(f"`--update {name}`" in SECTIONS["Updates"] for name in UPDATES)


def test_needs_and_allocations_are_those_of_the_classes() -> None:
    rows = re.findall(
        r"^\| `(.*?)` \|.*\| (\w+) \| `(.*?)` \|[^|]*\|$", SECTIONS["Criteria: what a weight is worth"], flags=re.M
    )
    assert len(rows) == len(registry._OWN)
    for name, needs, allocation in rows:
        found = registry.pruner(name)
        assert ({str(need) for need in found.needs} or {"nothing"}) == {needs}, name
        assert found.allocation == allocation, name


@pytest.fixture
def written() -> Iterator[dict[str, Any]]:
    """What the page's example defines."""
    sys.modules["the_page"] = type(sys)("the_page")  # dataclasses look up the module of a class
    scope: dict[str, Any] = {"__name__": "the_page"}
    exec(compile(blocks("python")[0], "docs/criteria.md", "exec"), scope)
    yield scope
    del sys.modules["the_page"]


def relative_scores(weight: NDArray[np.float64], norm: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    scores = np.zeros(weight.shape)
    for i, j in np.ndindex(*weight.shape):
        size = abs(weight[i, j])
        scores[i, j] = (size / np.abs(weight[i]).sum() + size / np.abs(weight[:, j]).sum()) * norm[j] ** power
    return scores


def test_the_example_does_what_it_says(written: dict[str, Any]) -> None:
    scope = written | {
        "mfcompile": mfcompile,
        "model": tiny_vlm(),
        "example_inputs": vlm_batch(),
        "batches": [vlm_batch((6, 3, 5, 2, 6), seed=seed) for seed in (1, 2, 3)],
    }
    exec(blocks("python")[1], scope)
    masks = scope["compiled"].masks
    assert masks.weight_count - masks.kept_count == int(0.63 * masks.weight_count)
    for site in vlm_regions().pruned_sites:
        weight = vlm_captured().parameter(site.fqn).detach().double().numpy()
        scores = relative_scores(weight, vlm_statistics().sites[site.name].input_norm().numpy(), 1.0)
        kept = masks[site.fqn].numpy()
        assert abs((~kept).sum() - 0.63 * kept.size) < 2, "the same fraction of every layer"
        assert scores[~kept].max() <= scores[kept].min() * (1 + 1e-6)


def test_the_example_is_short() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) <= 20


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name under which a package registers the page's class, as if it were installed."""
    points = tomllib.loads(blocks("toml")[0])["project"]["entry-points"][registry.ENTRY_POINT_GROUP]
    ((name, value),) = points.items()
    module, _, _ = value.partition(":")
    package, _, leaf = module.partition(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / f"{leaf}.py").write_text(blocks("python")[0])
    info = tmp_path / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry._registered.cache_clear()
    yield name
    registry._registered.cache_clear()
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == package]:
        del sys.modules[loaded]


def test_an_entry_point_makes_it_known_by_name(installed: str, written: dict[str, Any]) -> None:
    assert registry.names()[-1] == installed

    def select(criterion: Any, options: dict[str, Any] | None = None) -> mfcompile.MaskSet:
        return mfcompile.select_masks(
            vlm_captured(), vlm_regions(), vlm_statistics(), criterion=criterion, criterion_options=options
        )

    assert select(installed) == select(written["Relative"]())
    assert select(installed, {"power": 1.0}) == select(written["Relative"](power=1.0)) != select(installed)
    with pytest.raises(mfcompile.InputError, match=r"the criterion 'relative' has no option 'pwer'; it has power"):
        select(installed, {"pwer": 1.0})
    with pytest.raises(mfcompile.InputError, match=r"criterion='relativ' is unknown; did you mean relative\?"):
        select("relativ")


def test_names_go_without_it() -> None:
    assert registry.names() == tuple(registry._OWN)
