"""Cells of the task-agnostic benchmark: one of each task runs, and a run goes on where it stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mfcompile
from benchmarks.over_seeds import Figure
from benchmarks.tavlp import cells as runner
from benchmarks.tavlp import pruning
from benchmarks.tavlp.cells import Cell, Choice, cells, run_cell
from benchmarks.tavlp.configuration import SCALES, config_hash
from benchmarks.tavlp.families import FAMILIES, family
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.pruning import masks_of
from benchmarks.tavlp.summary import Results
from mfcompile.passes import mask_selection
from tests.unit.benchmarks.tavlp_runs import TINY, folders, other_recipe

CPU = torch.device("cpu")


def record_of(cell: Cell, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cell.path(folders(path).results).read_text())
    return found


@pytest.mark.parametrize(("task", "headline"), [("retrieval", "tr1"), ("captioning", "bleu4"), ("vqa", "accuracy")])
def test_a_cell_of_every_task_is_pruned_tuned_and_tested(task: str, headline: str, tmp_path: Path) -> None:
    cell = Cell("xvlm", task, "omp", 0.75, 0)
    metrics = run_cell(cell, TINY, folders(tmp_path), CPU)
    record = record_of(cell, tmp_path)
    assert record["metrics"] == metrics
    assert 0 <= metrics[headline] <= 100
    assert math.isclose(record["sparsity"], 0.75, abs_tol=1e-6)
    assert set(record["region_sparsity"]) == {"vision", "text", "fusion"}
    assert (record["metrics_before"] is None) == (task != "retrieval")
    assert record["config_hash"] == config_hash(cell.config(TINY))
    assert record["config"]["masks"]["criterion"] == "magnitude"
    assert len(record["losses"]) == 1
    assert record["versions"]["torch"] == torch.__version__


def test_a_cell_that_is_there_is_read_and_a_stale_one_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("xvlm", "vqa", "dense", 0.0, 0)
    metrics = run_cell(cell, TINY, folders(tmp_path), CPU)

    def refuse(*_: Any) -> None:
        raise AssertionError("this cell is there")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "fine_tune", refuse)
        assert run_cell(cell, TINY, folders(tmp_path), CPU) == metrics
        with pytest.raises(AssertionError, match="this cell is there"):
            run_cell(cell, other_recipe(TINY, "vqa", learning_rate=2e-3), folders(tmp_path), CPU)
    changed = other_recipe(TINY, "vqa", learning_rate=2e-3)
    run_cell(cell, changed, folders(tmp_path), CPU)
    assert record_of(cell, tmp_path)["config"]["recipe"]["learning_rate"] == 2e-3


def test_an_interrupted_run_leaves_whole_cells_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Cell("xvlm", "vqa", "omp", 0.9, seed) for seed in (0, 1))
    run_cell(first, TINY, folders(tmp_path), CPU)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "fine_tune", interrupted)
        run_cell(first, TINY, folders(tmp_path), CPU)  # is there, and not touched
        with pytest.raises(KeyboardInterrupt):
            run_cell(second, TINY, folders(tmp_path), CPU)
    there = first.path(folders(tmp_path).results)
    assert [path.name for path in there.parent.iterdir()] == [there.name]
    run_cell(second, TINY, folders(tmp_path), CPU)
    assert record_of(second, tmp_path)["config"]["seed"] == 1


def test_figures_before_fine_tuning_are_made_once_for_all_seeds_of_a_pruner_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Cell("xvlm", "retrieval", "omp", 0.9, seed) for seed in (0, 1))
    metrics = runner.run_untuned(first, TINY, folders(tmp_path), CPU)

    def refuse(*_: Any) -> None:
        raise AssertionError("these figures are there")

    monkeypatch.setattr(runner, "masks_of", refuse)
    assert runner.run_untuned(second, TINY, folders(tmp_path), CPU) == metrics
    found = Results(folders(tmp_path), TINY).untuned("xvlm", "retrieval", "omp", 0.9, "tr1")
    assert found == Figure(metrics["tr1"], None, 1)


def test_masks_are_made_once_for_all_tasks_and_without_a_seed_for_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    select = mask_selection.select_masks

    def counted(captured: Any, regions: Any, statistics: Any, options: Any, **others: Any) -> mfcompile.MaskSet:
        made.append(options.criterion)
        return select(captured, regions, statistics, options, **others)

    monkeypatch.setattr(pruning, "select_masks", counted)

    def masks(pruner: str, seed: int) -> mfcompile.MaskSet:
        return masks_of(family("xvlm"), PRUNERS[pruner], 0.63, seed, TINY, folders(tmp_path))

    assert masks("omp", 0) == masks("omp", 1)
    assert masks("random", 0) == masks("random", 0)
    assert masks("random", 0) != masks("random", 1)
    assert made == ["magnitude", "random", "random"]


def test_a_scale_that_differs_in_fine_tuning_alone_shares_masks_and_figures_before_it(tmp_path: Path) -> None:
    longer = replace(other_recipe(TINY, "retrieval", steps=4), name="longer", pruned_as=TINY.name)
    own, other = (pruning.Folders.of(scale, tmp_path / "results", tmp_path / "masks") for scale in (TINY, longer))
    cell = Cell("xvlm", "retrieval", "omp", 0.9, 0)
    assert masks_of(family("xvlm"), PRUNERS["omp"], 0.9, 0, TINY, own) == masks_of(
        family("xvlm"), PRUNERS["omp"], 0.9, 0, longer, other
    )
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.json"))) == 1
    assert runner.untuned_path(cell, own) == runner.untuned_path(cell, other)
    assert runner.untuned_config(cell, TINY) == runner.untuned_config(cell, longer)
    assert cell.path(own.results) != cell.path(other.results)


def test_a_scale_that_shares_masks_prunes_alike() -> None:
    for scale in SCALES.values():
        if scale.pruned_as is not None:
            other = SCALES[scale.pruned_as]
            assert (scale.calibration, scale.pruning) == (other.calibration, other.pruning)
            assert {task: recipe.test_size for task, recipe in scale.recipes.items()} == {
                task: recipe.test_size for task, recipe in other.recipes.items()
            }


@pytest.mark.slow
def test_every_pruner_makes_masks_of_the_sparsity_that_was_asked_for(tmp_path: Path) -> None:
    for row in PRUNERS.values():
        if row.criterion is not None:
            masks = masks_of(family("xvlm"), row, 0.75, 0, TINY, folders(tmp_path))
            assert masks.kept_count == masks.weight_count - int(0.75 * masks.weight_count), row.name
            record = json.loads((folders(tmp_path).results / "xvlm" / "masks" / f"{_stem(row.name)}.json").read_text())
            assert (record["cost"]["backward_batches"] > 0) == (row.name in ("snip", "itersnip", "chita", "chita++")), row.name


def _stem(pruner: str) -> str:
    return f"{pruner}-0.75-{0 if PRUNERS[pruner].is_seeded else 'any'}"


def test_cells_come_in_the_order_that_makes_tables_useful() -> None:
    order = list(cells(Choice(families=("xvlm",)), FAMILIES))
    assert len(order) == len(set(order)) == 3 * 3 * (1 + 3 * (len(PRUNERS) - 1))
    assert order[0] == Cell("xvlm", "retrieval", "dense", 0.0, 0)
    assert {cell.pruner for cell in order[:8]} == set(runner.FIRST_ROWS)
    assert {(cell.seed, cell.task, cell.sparsity) for cell in order[1:11]} == {(0, "retrieval", 0.9)}
    assert {cell.task for cell in order[:50]} == {"retrieval"}
    assert {cell.pruner for cell in order[-81:]} == set(runner.LAST_ROWS)
    assert list(cells(Choice(("xvlm",), ("vqa",), ("lamp",), (0.9,), (2,)), FAMILIES)) == [Cell("xvlm", "vqa", "lamp", 0.9, 2)]


def test_the_record_says_how_far_an_update_moved_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select = mask_selection.select_masks

    def doubled(captured: Any, *arguments: Any, **options: Any) -> mfcompile.MaskSet:
        masks = select(captured, *arguments, **options)
        return replace(masks, new_values={name: 2 * captured.parameter(name).detach()[masks[name]] for name in masks})

    monkeypatch.setattr(pruning, "select_masks", doubled)
    for pruner in ("omp", "lamp"):
        masks_of(family("xvlm"), PRUNERS[pruner], 0.9, 0, TINY, folders(tmp_path))
        monkeypatch.setattr(pruning, "select_masks", select)
    records = [Results(folders(tmp_path), TINY).masks("xvlm", PRUNERS[pruner], 0.9, 0) or {} for pruner in ("omp", "lamp")]
    assert math.isclose(records[0]["kept_weights_moved"], 1.0, rel_tol=1e-6)
    assert "kept_weights_moved" not in records[1]
