"""The evidence on joint pruning: its quick space is that of the library, its tables say what the cells say."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mfcompile
from benchmarks.comp_evidence.arms import ARMS
from benchmarks.comp_evidence.cells import SCORE, Cell, cells, read
from benchmarks.comp_evidence.page import FIRST, LAST, differences, means, pairs, reading, write_page
from benchmarks.comp_evidence.results import Mean, Results, interpolated
from benchmarks.comp_evidence.space import SharedSpace, TokenGraphs
from benchmarks.comp_evidence.subject import LENGTH, batch_of
from mfcompile.comp.modes import TokenMode, UnitMode, token_modes, unit_modes
from mfcompile.comp.space import ModelSpace
from mfcompile.graph import CapturedGraph
from mfcompile.passes.flops import count_flops
from mfcompile.passes.mode_search import SearchOptions, search_modes
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.structure import find_units
from tests.token_models import Encoder, fixed, patches, seeded

IMAGE = {"image": patches()}


@pytest.fixture(scope="module")
def dense() -> CapturedGraph:
    return fixed(seeded(Encoder), IMAGE)


def by_magnitude(captured: CapturedGraph, units: Sequence[StructuralUnit]) -> dict[str, Tensor]:
    """Elements keep their scores whatever else is gone."""
    found = {}
    for unit in units:
        weight = captured.parameter(unit.output_weight).detach().abs().sum(0)
        found[unit.name] = torch.stack([weight[list(unit.columns(element))].mean() for element in range(unit.count)])
    return found


def modes_of(dense: CapturedGraph) -> list[UnitMode | TokenMode]:
    return [*unit_modes(find_units(dense).units, {}), *token_modes(mfcompile.find_token_sites(dense).sites, {}, (0.0,))]


def output(module: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(**IMAGE)
    return found


def test_shared_graphs_compute_and_count_what_the_librarys_do(dense: CapturedGraph) -> None:
    """Heads, channels and tokens gone together, the heads where tokens are chosen too."""
    wanted = output(dense.module)
    given: Any = (modes_of(dense), by_magnitude, lambda module: float((output(module) - wanted).square().mean()))
    quick, slow = SharedSpace(TokenGraphs(dense), 1, *given), ModelSpace(dense, *given)
    channels = {"blocks.0": (0, 3, 4), "blocks.1": (2, 7)}
    token_mode = next(name for name, mode in quick.by_name.items() if isinstance(mode, TokenMode))
    for heads, gone in ((1, {}), (0, {token_mode: 4}), (1, {token_mode: 4})):
        removed = {**channels, "blocks.0.attention": (1,)} if heads else channels
        one, other = quick._state(removed, gone), slow._state(removed, gone)
        torch.testing.assert_close(output(one.module), output(other.captured.module), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(output(one.captured.module), output(other.captured.module), rtol=1e-4, atol=1e-6)
        assert other.captured.exported is not None
        counted = count_flops(other.captured.exported.program).total
        # a head that is gone where tokens are chosen stays in the products of the score, a twentieth of this tiny model
        assert one.total == (pytest.approx(counted, rel=0.04) if heads and gone else counted)


def test_both_spaces_search_alike(dense: CapturedGraph) -> None:
    wanted = output(dense.module)
    given: Any = (modes_of(dense), by_magnitude, lambda module: float((output(module) - wanted).square().mean()))
    options = SearchOptions(strategy="fixed", step=0.2)
    quick = search_modes(SharedSpace(TokenGraphs(dense), 1, *given), 0.6, options)
    slow = search_modes(ModelSpace(dense, *given), 0.6, options)
    assert [stage.mode for stage in quick.stages] == [stage.mode for stage in slow.stages]
    assert quick.stages[0].changes == slow.stages[0].changes
    assert quick.state.flops.total / slow.state.total == pytest.approx(1, abs=0.02)


def write(folder: Path, arm: str, seed: int, r1: float | None, achieved: float = 0.5, flops: float = 0.5) -> None:
    cell = Cell(arm, flops, seed)
    found: dict[str, Any] = {"metrics": {"r1": r1}, "achieved": achieved} if r1 is not None else {"cannot_reach": "no"}
    cell.path(folder).parent.mkdir(parents=True, exist_ok=True)
    cell.path(folder).write_text(json.dumps({"config": cell.config(), "cpu_s": 7.0, **found}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three seeds: probing is 10 points over parameters alone, and as good as Wanda within what seeds scatter."""
    for seed, base in enumerate((60.0, 64.0, 71.0)):
        write(tmp_path, "probe", seed, base + seed / 10)
        write(tmp_path, "parameters", seed, base - 10)
        write(tmp_path, "wanda-cit", seed, base + (2, -3, 1)[seed])
    write(tmp_path, "comp", 0, 50.0)
    write(tmp_path, "fixed", 0, 55.0)
    write(tmp_path, "vision-tokens", 0, None)
    (tmp_path / "dense.json").write_text(
        json.dumps({"config": {"score": {"scenes": SCORE.scenes, "candidates": SCORE.candidates}}, "metrics": {"r1": 90.0}})
    )
    return tmp_path


def test_the_reading_says_what_the_cells_say(folder: Path) -> None:
    results = Results(folder)
    said = reading(results)
    assert "joint, probing is better than parameters of all regions (+10.1 ± 0.1 (3))" in said
    assert re.search(r"no different, within the errors, from joint, Wanda \+ attention received \(\+0\.1 ± 1\.5 \(3\)\)", said)
    assert "too few seeds to tell from joint, fixed order (-5.0 (1))" in said
    for seed in range(3):
        write(folder, "probe", seed, 20.0 + seed)
    assert "joint, probing is worse than parameters of all regions" in reading(Results(folder))


def test_tables_tell_what_was_not_run_from_what_cannot_be(folder: Path) -> None:
    rows = {row.split("|")[1].strip(): [part.strip() for part in row.split("|")[2:-1]] for row in means_of(folder)}
    assert rows["joint, probing"] == ["missing", "65.1 ± 5.7 (3)", "missing"]
    assert rows["vision tokens alone"] == ["missing", "cannot reach", "missing"]
    assert rows["dense"] == ["90.0"] * 3
    assert "| +10.1 ± 0.1 (3) |" in differences(Results(folder), "one-shot")


def means_of(folder: Path) -> list[str]:
    return means(Results(folder), "one-shot").splitlines()[2:]


def test_a_landing_that_is_off_is_interpolated(folder: Path) -> None:
    write(folder, "greedy", 0, 40.0, achieved=0.46)
    assert Results(folder).value(Cell("greedy", 0.5, 0)) == pytest.approx(40 + 50 * 0.04 / 0.54)  # towards the dense model
    write(folder, "greedy", 0, 40.0, achieved=0.504)
    assert Results(folder).value(Cell("greedy", 0.5, 0)) == 40.0
    assert interpolated({0.5: 1.0, 1.0: 3.0}, 0.4) is None


def test_a_cell_of_another_configuration_does_not_count(folder: Path) -> None:
    cell = Cell("probe", 0.5, 0)
    assert read(cell, folder) is not None
    record = json.loads(cell.path(folder).read_text())
    record["config"]["arm"]["scorer"] = "magnitude"
    cell.path(folder).write_text(json.dumps(record))
    assert read(cell, folder) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((1, 2), "open"), ((2, 3, 3), "more"), ((-2, -3, -3), "less"), ((1, 2, 3), "noise"), ((-1, 2, 0), "noise")],
)
def test_verdicts(values: tuple[float, ...], verdict: str) -> None:
    found = Mean.of(values)
    assert found is not None
    assert found.verdict == verdict


def test_the_page_is_written_between_its_comments(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    docs = tmp_path_factory.mktemp("docs")
    (docs / "comp.md").write_text(f"before\n{FIRST}\nold\n{LAST}\nafter\n")
    assert write_page(folder, docs).read_text().count("## ") >= 5
    page = (docs / "comp.md").read_text()
    assert page == f"before\n{FIRST}\n{reading(Results(folder))}\n{LAST}\nafter\n"
    assert (docs / "images" / "comp_accuracy.png").stat().st_size > 1000


def test_every_arm_is_run_and_every_claim_has_arms() -> None:
    assert {cell.arm for cell in cells()} == set(ARMS)
    assert {one for _, one, _ in pairs("one-shot")} | {other for _, _, other in pairs("one-shot")} == set(ARMS)


def test_the_committed_page_is_of_the_committed_cells() -> None:
    docs = Path(__file__).resolve().parents[3] / "docs"
    folder = docs.parent / "benchmarks" / "results" / "comp"
    page = (docs / "comp.md").read_text(encoding="utf-8")
    assert FIRST + "\n" + reading(Results(folder)) + "\n" + LAST in page
    assert reading(Results(folder)) in (docs / "comp_tables.md").read_text(encoding="utf-8")


def test_a_sentence_that_is_too_long_leaves_its_batch() -> None:
    """All sentences are padded to one length, and a batch is full all the same."""
    captions = ["a dog on the left", "a dog, a cat, " * 20, "a cat on the right", "a cat"]
    scenes = SimpleNamespace(captions=captions, pixel_values=np.arange(4.0)[:, None])
    found = batch_of(scenes, 2)
    assert found["pixel_values"].flatten().tolist() == [0.0, 2.0]
    assert found["input_ids"].shape == (2, LENGTH)
