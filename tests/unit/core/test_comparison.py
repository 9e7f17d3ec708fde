"""compare: rows that are what compile_pruned gives, ranking, sharing, determinism, and refusals."""

from __future__ import annotations

import json
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.comparison_result import ComparedModel, MetricChoice, ranked
from mfcompile.errors import CalibrationError, InputError, MfcompileError
from mfcompile.masked_weights import masked_places
from mfcompile.passes import gradients
from mfcompile.passes.output_error import OutputErrors
from mfcompile.weight_mask import WeightMask
from tests.models import Batch, tiny_vlm, vlm_batch, vlm_statistics

CRITERIA = ["multiflow", "magnitude@uniform", "snip", "wanda:2:4"]


def batches(count: int = 9) -> list[Batch]:
    return [vlm_batch((6, 3, 5, 2, 6), seed=seed) for seed in range(1, count + 1)]


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = module(**batch)["match"].square().mean()
    return loss


def evaluate(module: nn.Module) -> dict[str, float]:
    """How near the dense outputs are (1 is dense), and a random number."""
    with torch.no_grad():
        one, other = tiny_vlm()(**batches(1)[0])["fused"], module(**batches(1)[0])["fused"]
    return {"near": float(1 / (1 + (one - other).norm())), "draw": float(torch.rand(()))}


def compared(**options: Any) -> mfcompile.Comparison:
    given: dict[str, Any] = {
        "criteria": CRITERIA, "sparsities": [0.75, 0.5], "calibration": batches(), "loss_fn": loss_fn, "evaluate": evaluate,
    }  # fmt: skip
    return mfcompile.compare(tiny_vlm(), vlm_batch(), **{**given, **options})


@cache
def example() -> mfcompile.Comparison:
    return compared()


def plain(comparison: mfcompile.Comparison) -> dict[str, Any]:
    """Its JSON without the one figure that differs from run to run."""
    document = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    for row in document["rows"]:
        assert row.pop("seconds") >= 0
    return dict(document)


def test_rows_are_what_compile_pruned_gives() -> None:
    """With the batches that calibrate: eight of nine."""
    options: dict[str, dict[str, Any]] = {
        "multiflow": {},
        "magnitude@uniform": {"criterion": "magnitude", "allocation": "uniform"},
        "snip": {"criterion": "snip", "loss_fn": loss_fn},
        "wanda:2:4": {"criterion": "wanda", "pattern": "2:4"},
        "random": {"criterion": "random"},
    }
    assert len(example().rows) == 9
    assert {row.pruner for row in example().at(0.5)} == options.keys()
    for row in example().at(0.5):
        given: dict[str, Any] = {"sparsity": row.sparsity, "calibration": batches()[:8], **options[row.pruner]}
        compiled = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), **given)
        assert row.digest == compiled.masks.digest(), row.pruner
        report = compiled.report
        assert row.regions == {item["region"]: item["sparsity"] for item in report["regions"]}
        assert row.layers == {item["name"]: item["sparsity"] for item in report["sites"]}
        assert (row.kept, row.weights) == tuple(report["totals"]["prunable"][key] for key in ("kept", "weights"))
        with torch.no_grad():
            one, other = (module(**batches()[8])["match"].double() for module in (tiny_vlm(), compiled.module))
        assert row.errors.by_output["match"] == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-5)
        assert row.metrics["near"] == pytest.approx(evaluate(compiled.module)["near"], rel=1e-6)


def test_a_pattern_that_sets_its_sparsity_stands_among_those_of_it() -> None:
    assert example().sparsities == (0.5, 0.75)
    assert {row.pruner for row in example().at(0.5)} == {*CRITERIA, "random"}
    assert {row.pruner for row in example().at(0.75)} == {"multiflow", "magnitude@uniform", "snip", "random"}
    alone = compared(
        criteria=["lamp:2:4", {"criterion": "lamp", "allocation": {"*": 0.25}}, "lamp"], sparsities=[0.9], floor=False
    )
    assert [(row.pruner, row.sparsity) for row in alone.rows] == [("lamp:2:4", 0.5), ("lamp", 0.9), ("lamp@layers", 0.25)]
    assert not any(row.is_best for row in alone.rows), "a row on its own is compared with nothing"


def test_the_metric_ranks_and_its_better_way_is_found() -> None:
    found = example()
    assert found.metric is not None
    assert (found.metric.name, found.metric.is_higher_better) == ("near", True)
    assert found.dense["near"] == 1
    for sparsity in found.sparsities:
        rows = found.at(sparsity)
        assert [row.metrics["near"] for row in rows] == sorted((row.metrics["near"] for row in rows), reverse=True)
        assert [row.is_best for row in rows] == [True] + [False] * (len(rows) - 1)
    loss = compared(criteria=["lamp"], sparsities=[0.5], evaluate=lambda module: {"far": 1 - evaluate(module)["near"]})
    assert loss.metric is not None
    assert (loss.metric.name, loss.metric.is_higher_better) == ("far", False)
    turned = compared(criteria=["lamp"], sparsities=[0.5], metric="near:min")
    assert [row.pruner for row in turned.rows] == ["random", "lamp"]
    drawn = compared(criteria=["lamp"], sparsities=[0.5], metric="draw")
    assert len({row.metrics["draw"] for row in drawn.rows} | {drawn.dense["draw"]}) == 1, "all meet the same random numbers"


def test_without_a_metric_the_output_error_ranks() -> None:
    found = compared(evaluate=None, sparsities=[0.5])
    assert (found.metric, found.dense) == (None, {})
    errors = [row.errors.overall for row in found.rows]
    assert errors == sorted(errors)
    assert found.rows[0].is_best


def test_ranking_puts_what_is_no_number_last_and_marks_ties() -> None:
    def row(name: str, value: float, error: float) -> ComparedModel:
        return ComparedModel(name, 0.5, 4, 2, {}, {"a": 0.5}, OutputErrors({}, error), {"m": value}, "", 0.0)

    rows = [row("nan", np.nan, 0.1), row("worse", 1.0, 0.1), row("tie", 2.0, 0.3), row("best", 2.0, 0.2)]
    found = list(ranked(rows, MetricChoice("m", True, "")))
    assert [(item.pruner, item.is_best) for item in found] == [("best", True), ("tie", True), ("worse", False), ("nan", False)]
    assert [item.pruner for item in ranked(rows, MetricChoice("m", False, ""))] == ["worse", "best", "tie", "nan"]


def test_one_pass_of_gradients_and_one_hash_serve_all_sparsities(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, hashes = [], []
    original = gradients.accumulate_gradients

    def accumulate(*args: Any, **options: Any) -> gradients.Gradients:
        passes.append(1)
        return original(*args, **options)

    monkeypatch.setattr(gradients, "accumulate_gradients", accumulate)

    def hashed(module: nn.Module) -> str:
        hashes.append(1)
        return "same"

    monkeypatch.setattr("mfcompile.passes.pruning_run.fingerprint", hashed)
    found = compared(criteria=["snip", "snip@uniform"], sparsities=[0.5, 0.6], floor=False, evaluate=None)
    assert (len(found.rows), len(passes), len(hashes)) == (4, 1, 1)


def test_one_masked_module_at_a_time() -> None:
    masks: list[weakref.ref[WeightMask]] = []
    alive = []

    def count(module: nn.Module) -> float:
        alive.append(sum(item() is not None for item in masks))
        masks.extend(weakref.ref(mask) for _, _, _, mask in masked_places(module))
        return 0.0

    compared(criteria=["lamp", "l2"], sparsities=[0.5], evaluate=count)
    assert masks
    assert alive == [0] * 4


def test_the_same_request_gives_the_same() -> None:
    options: dict[str, Any] = {"criteria": ["multiflow", "snip"], "sparsities": [0.5]}
    first = plain(compared(**options))
    torch.manual_seed(77)
    assert plain(compared(**options, calibration=lambda: iter(batches()))) == first
    digests = [{row["pruner"]: row["digest"] for row in item["rows"]} for item in (first, plain(compared(**options, seed=1)))]
    assert digests[0]["random"] != digests[1]["random"]
    assert digests[0]["multiflow"] == digests[1]["multiflow"]


def test_the_model_is_left_alone() -> None:
    model = tiny_vlm().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mfcompile.compare(model, vlm_batch(), criteria=["snip"], sparsities=[0.5], calibration=batches(), loss_fn=loss_fn)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_json_holds_everything(tmp_path: Path) -> None:
    document = plain(example())
    assert list(document) == ["format", "format_version", "versions", "source", "model", "seed", "data", "metric", "outputs",
                              "dense", "pruners", "rows", "agreement", "middle", "diagnostics"]  # fmt: skip
    assert set(document["rows"][0]) == {
        "pruner", "sparsity", "achieved", "weights", "kept", "is_best", "metrics", "output_error", "outputs", "regions",
        "least_pruned", "most_pruned", "emptied_layers", "layers", "digest", "diagnostics",
    }  # fmt: skip
    assert document["data"] == {
        "calibration": {"source": "calibration batches", "batches": 8}, "samples": 40, "is_held_out": True,
        "compared_on": "1 held-out calibration batch", "compared_batches": 1, "compared_samples": 5,
    }  # fmt: skip
    assert {"mfcompile", "torch"} <= set(document["versions"])
    assert [item["label"] for item in document["pruners"]] == [*CRITERIA, "random"]
    for row in document["rows"]:
        assert row["least_pruned"]["sparsity"] == min(row["layers"].values())
        assert row["most_pruned"]["sparsity"] == row["layers"][row["most_pruned"]["layer"]] == max(row["layers"].values())
    for item in document["agreement"]:
        size = len(item["pruners"])
        assert np.shape(item["kappa"]) == np.shape(item["shared_by_chance"]) == (size, size)
    place = example().save(tmp_path / "out")
    assert {path.name for path in place.iterdir()} == {"compare.json", "compare.png", "compare.svg"}
    assert json.loads((place / "compare.json").read_text())["rows"][0]["pruner"] == document["rows"][0]["pruner"]
    with pytest.raises(InputError, match="not empty"):
        example().save(tmp_path / "out")


def test_agreement_is_between_the_masks() -> None:
    found = dict(example().agreements)[0.5]
    compiled = {name: mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), criterion=name, sparsity=0.5, calibration=batches()[:8])
                for name in ("multiflow", "random")}  # fmt: skip
    one, other = (np.concatenate([mask.numpy().ravel() for mask in item.masks.values()]) for item in compiled.values())
    pair = found.pairs[found.labels.index("multiflow")][found.labels.index("random")]
    assert pair.shared == np.sum(one & other)


def test_statistics_of_an_earlier_run_are_used_and_nothing_counts_as_held_out() -> None:
    found = compared(statistics=vlm_statistics(), criteria=["multiflow"], sparsities=[0.5], evaluate=None)
    masks = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), sparsity=0.5, statistics=vlm_statistics()).masks
    assert next(row for row in found.rows if row.pruner == "multiflow").digest == masks.digest()
    assert found.data["is_held_out"] is False


def test_criteria_without_needs_are_not_calibrated() -> None:
    stages = set()
    found = compared(criteria=["lamp"], sparsities=[0.5], progress=lambda stage, done, total: stages.add(stage))
    assert stages == {"capture", "running the dense model", "pruning to 50 %"}
    assert found.as_dict()["data"]["calibration"] is None


def test_sparsity_by_region() -> None:
    asked = {"vision": 0.25, "text": 0.5, "fusion": 0.75}
    found = compared(criteria=["multiflow"], sparsities=asked, evaluate=None)
    assert all(row.regions == pytest.approx(asked, abs=0.01) for row in found.rows)
    assert found.as_dict()["rows"][0]["sparsity"] == asked


def test_without_calibration_the_example_stands_in_for_a_loss_too() -> None:
    found = compared(calibration=None, criteria=["snip", "multiflow"], sparsities=[0.5])
    assert (found.data["compared_on"], found.data["compared_samples"]) == ("example inputs", len(vlm_batch()["input_ids"]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": None}, CalibrationError, r"snip: the criterion 'snip' needs gradients.*loss_fn"),
        ({"sparsities": []}, InputError, "sparsities is empty"),
        ({"sparsities": [0.5, 0.5]}, InputError, "0.5 is there twice"),
        ({"sparsities": [63]}, InputError, "did you mean 0.63"),
        ({"seed": 1.0}, InputError, "seed must be an integer"),
        ({"metric": "near", "evaluate": None}, InputError, "there is no evaluate"),
        ({"evaluate": lambda module: "good"}, InputError, "must return a number"),
        ({"evaluate": lambda module: module.missing}, InputError, "evaluate failed on the dense model"),
        ({"criteria": ["lamp:16x1"]}, InputError, "lamp:16x1: "),
        ({"sparsities": [{"vision": 0.5}]}, InputError, "has none"),
    ],
)
def test_mistakes_are_one_message(options: dict[str, Any], error: type[MfcompileError], message: str) -> None:
    with pytest.raises(error, match=message):
        compared(**options)


def test_an_unknown_metric_is_found_before_anything_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfcompile.comparison.select_masks", lambda *given, **options: pytest.fail("a mask was chosen"))
    with pytest.raises(InputError, match="choose one of near, draw"):
        compared(metric="nearest", criteria=["lamp"])


def test_a_missing_loss_is_found_before_the_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfcompile.comparison.capture", lambda *given: pytest.fail("the model was captured"))
    with pytest.raises(CalibrationError, match="needs gradients"):
        compared(loss_fn=None)
