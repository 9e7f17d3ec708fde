"""The update ``gradual``: what it chooses, step by step by hand, and what it leaves as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError
from mfcompile.passes.gradual import Gradual, GradualOptions
from mfcompile.passes.least_squares import LeastSquares, LeastSquaresOptions
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.reconstruction import Reconstruction
from mfcompile.passes.sparsity_patterns import parse_pattern
from mfcompile.passes.weight_update import SiteUpdate, updated
from mfcompile.recipe import Recipe, ReproductionError
from tests.models import tiny_vlm, vlm_batch
from tests.unit.passes.test_experts import Mixture, image
from tests.unit.passes.test_least_squares import by_numpy
from tests.unit.passes.test_reconstruction import WIDTH, correlated, error_of, layer
from tests.unit.passes.test_sparsegpt import pixels, two_layers, vlm_batches, vlm_masks, vlm_run

DAMPING = 0.01


def chosen_of(weight: Tensor, kept: Tensor, inputs: Tensor, pattern: str = "unstructured", steps: int = 4) -> Reconstruction:
    return Gradual(inputs.mT @ inputs, parse_pattern(pattern), DAMPING, steps).reconstruct(weight, kept)


def step_by_step(inputs: Tensor, weight: Tensor, removed: int, steps: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """The module's formula with sorted lists and ``lstsq``, the whole layer in one ranking."""
    norms = np.linalg.norm(inputs.numpy(), axis=0)
    values, kept = weight.double().numpy(), np.ones(weight.shape, bool)
    for step in range(1, steps + 1):
        count = removed if step == steps else int(removed * (1 - (1 - step / steps) ** 3))
        score = np.where(kept, np.abs(values) * norms, -1.0)
        kept = np.ones(weight.numel(), bool)
        kept[np.argsort(score.reshape(-1), kind="stable")[:count]] = False
        kept = kept.reshape(weight.shape)
        values = by_numpy(inputs, weight, torch.from_numpy(kept), DAMPING)
    return kept, values


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_what_stays_and_its_values_are_those_of_the_formula(share: float, steps: int) -> None:
    inputs, (weight, kept) = correlated(), layer(share)
    result = chosen_of(weight, kept, inputs, steps=steps)
    mask, values = step_by_step(inputs, weight, int((~kept).sum()), steps)
    assert result.kept is not None
    assert (result.kept.numpy() == mask).all()
    np.testing.assert_allclose(result.weight.numpy(), values, rtol=1e-5, atol=1e-6)
    assert result.error == pytest.approx(error_of(inputs, weight, result.weight), rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_more_steps_come_closer_than_the_best_values_of_the_given_mask(share: float) -> None:
    inputs, (weight, kept) = correlated(), layer(share)
    fixed = LeastSquares(inputs.mT @ inputs).reconstruct(weight, kept)
    result = chosen_of(weight, kept, inputs)
    assert result.error < 0.8 * fixed.error
    assert result.masked_error == fixed.masked_error
    assert result.kept is not None
    assert int(result.kept.sum()) == int(kept.sum())
    assert not result.weight[~result.kept].any()


def test_rows_that_lose_the_same_number_do_so_still() -> None:
    inputs, (weight, _) = correlated(), layer()
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    kept.scatter_(1, weight.abs().topk(10, dim=1).indices, True)
    kept[0, int(kept[0].nonzero()[0])] = False  # as where a number does not divide
    result = chosen_of(weight, kept, inputs)
    assert result.kept is not None
    assert result.kept.sum(1).tolist() == [9] + 11 * [10]
    assert not torch.equal(result.kept, kept)


@pytest.mark.parametrize("pattern", ["4x1", "1x4", "2:4"])
def test_patterns_stay(pattern: str) -> None:
    inputs, (weight, _) = correlated(), layer(outputs=14)
    shape = parse_pattern(pattern)
    if pattern == "2:4":
        kept = ~shape.smallest(weight.abs())  # type: ignore[attr-defined]
    else:
        units = shape.unit_scores(weight.abs())
        kept = ~shape.pruned_weights(units < units.flatten().median(), (14, WIDTH))
    result = chosen_of(weight, kept, inputs, pattern)
    assert result.kept is not None
    assert int(result.kept.sum()) == int(kept.sum())
    if pattern == "2:4":
        assert (result.kept.reshape(14, -1, 4).sum(2) == 2).all()
    else:
        assert bool(result.kept[12:].all()) is (pattern == "4x1")  # rows after the last block
        gone = shape.unit_scores((~result.kept).float())
        assert set(gone.flatten().tolist()) == {0.0, 4.0}


def test_a_layer_that_loses_nothing_or_all_stays() -> None:
    inputs, (weight, kept) = correlated(), layer()
    whole = chosen_of(weight, torch.ones_like(kept), inputs)
    assert torch.equal(whole.weight, weight)
    assert whole.kept is None
    nothing = chosen_of(weight, torch.zeros_like(kept), inputs)
    assert not nothing.weight.any()
    assert nothing.kept is None


def test_the_given_mask_stays_where_no_other_is_better() -> None:
    """Only the weights that the mask keeps see an input that moves."""
    inputs, (weight, _) = correlated(), layer()
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    kept[:, ::2] = True
    inputs[:, 1::2] = 0.0
    result = chosen_of(weight, kept, inputs)
    assert result.kept is None
    assert torch.equal(result.weight, torch.where(kept, weight, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs, (weight, kept) = correlated(), layer(0.3)
    result = chosen_of(weight.to(dtype), kept, inputs)
    assert result.weight.dtype == dtype
    assert result.error == pytest.approx(error_of(inputs, weight.to(dtype), result.weight), rel=1e-5)
    assert result.error < 0.5 * result.masked_error


def update_of(model: nn.Module, example: Any, **regions: Any) -> tuple[mfcompile.MaskSet, mfcompile.MaskSet, list[SiteUpdate]]:
    """Masks by magnitude, and what the update makes of them."""
    captured = mfcompile.capture(model.eval(), example)
    found = mfcompile.infer_regions(captured, **regions)
    masks = mfcompile.select_masks(captured, found, sparsity=0.5, criterion="magnitude", allocation="uniform")
    run = PruningRun(captured, found, 0.5, batches=lambda: [example])
    return masks, *updated(run, masks, GradualOptions())


class TestModels:
    def test_every_layer_keeps_as_many_others_and_comes_closer(self) -> None:
        before = vlm_masks()
        after, updates = updated(vlm_run(), before, GradualOptions(passes=1))
        fixed = {item.name: item.error for item in updated(vlm_run(), before, LeastSquaresOptions(passes=1))[1]}
        assert {name: mask.kept_count for name, mask in after.packed.items()} == {
            name: mask.kept_count for name, mask in before.packed.items()
        }
        assert after.mask_digest() != before.mask_digest()
        assert all(item.error <= fixed[item.name] * (1 + 1e-9) for item in updates)
        assert math.prod(item.error / fixed[item.name] for item in updates) < 0.5
        for name, values in after.new_values.items():
            assert values.shape == (after.packed[name].kept_count,)

    def test_values_are_those_of_the_weights_that_stay(self) -> None:
        asked: dict[str, Any] = {"calibration": vlm_batches(), "sparsity": 0.5, "update": "gradual"}
        compiled = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), **asked)
        mfcompile.verify_masks(compiled.module)
        for name, mask in compiled.masks.items():
            weight = compiled.module.get_submodule(name.rpartition(".")[0]).weight
            assert isinstance(weight, Tensor)
            assert torch.equal(weight[mask], compiled.masks.new_values[name])
            assert not weight[~mask].any()

    def test_experts_of_one_weight_choose_each_for_itself(self) -> None:
        masks, found, updates = update_of(Mixture("looked up"), image(length=24), modalities={"image": "vision"})
        assert len(updates) > len(masks)
        for name in found:
            assert found[name].shape == masks[name].shape
            by_expert = slice(1, None) if found[name].ndim == 3 else slice(0, None)
            sums = [mask.sum(tuple(range(mask.ndim))[by_expert]) for mask in (found[name], masks[name])]
            assert torch.equal(*sums)
            assert not torch.equal(found[name], masks[name])

    def test_a_tied_weight_is_chosen_once(self) -> None:
        model = two_layers()
        model.blocks[1] = model.blocks[0]
        masks, found, updates = update_of(model, pixels())
        assert len(updates) == len(found) == 2
        assert found.kept_count == masks.kept_count

    def test_what_it_refuses(self) -> None:
        with pytest.raises(InputError, match="gradual: steps is a positive integer, got 0"):
            GradualOptions(steps=0)


def test_a_recipe_whose_masks_differ_says_that_solutions_round(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path / "model.py", update="gradual", digest="d" * 64, fingerprint="f", versions={"torch": "2"})
    with pytest.raises(ReproductionError, match="chooses by values that it solved for, which round otherwise on another"):
        recipe.check_reproduced("e" * 64, "f", {"torch": "2"})
