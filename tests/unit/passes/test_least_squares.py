"""The weight update ``least-squares``, against NumPy's ``lstsq`` row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError
from mfcompile.passes.least_squares import LeastSquares, LeastSquaresOptions
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.reconstruction import Reconstructor
from mfcompile.passes.weight_update import SiteUpdate, updated
from tests.models import tiny_vlm, vlm_batch
from tests.unit.passes.test_observers import linear_inputs
from tests.unit.passes.test_reconstruction import WIDTH, correlated, error_of, layer
from tests.unit.passes.test_sparsegpt import pixels, two_layers, vlm_batches, vlm_masks, vlm_run

# A float64 result cast to float32.
RTOL = 1e-6


def by_numpy(inputs: Tensor, dense: Tensor, kept: Tensor, damping: float) -> NDArray[np.float64]:
    """Every row by itself: the damping is ``features`` more tokens, each of one input, whose outputs are to stay as well."""
    x, rows, masks = inputs.double().numpy(), dense.double().numpy(), kept.numpy()
    ridge = damping * float((x**2).sum(0).mean())
    tokens = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])])
    found = np.zeros_like(rows)
    for row, mask, values in zip(rows, masks, found, strict=True):
        if mask.any():
            values[mask] = np.linalg.lstsq(tokens[:, mask], tokens @ row, rcond=None)[0]
    return found


def solved(inputs: Tensor, dense: Tensor, kept: Tensor, damping: float = 0.01) -> Tensor:
    return LeastSquares(inputs.mT @ inputs, damping).reconstruct(dense, kept).weight


@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.01, 0.3])
@pytest.mark.parametrize(("outputs", "features", "share"), [(12, WIDTH, 0.5), (1, 130, 0.2), (40, 6, 0.4), (7, WIDTH, 0.05)])
def test_the_values_are_those_of_lstsq(outputs: int, features: int, share: float, damping: float) -> None:
    inputs, (weight, kept) = correlated(features=features), layer(share, outputs, features)
    found = solved(inputs, weight, kept, damping)
    changed = (found != torch.where(kept, weight, 0.0)).any(1)
    assert changed.sum() >= kept.any(1).sum() - 2
    expected = by_numpy(inputs, weight, kept, damping)
    np.testing.assert_allclose(found[changed].numpy(), expected[changed.numpy()], rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("share", [0.75, 0.37, 0.1])
def test_no_other_values_come_closer(share: float) -> None:
    inputs, (weight, kept) = correlated(), layer(share)
    gram = inputs.mT @ inputs
    result = LeastSquares(gram, 0.0).reconstruct(weight, kept)
    assert result.error == pytest.approx(error_of(inputs, weight, result.weight), rel=1e-6)
    assert result.error < 0.9 * Reconstructor(gram).reconstruct(weight, kept).error < result.masked_error
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        other = result.weight.double() + 1e-3 * torch.randn(weight.shape, generator=generator) * kept
        assert error_of(inputs, weight, other) > result.error


def test_rows_that_keep_nothing_one_or_all() -> None:
    inputs, (weight, kept) = correlated(), layer()
    kept = kept.clone()
    kept[3], kept[4], kept[5] = False, False, True
    kept[4, 17] = True
    kept[:5, [0, 11]] = False
    found = solved(inputs, weight, kept)
    assert not found[~kept].any()
    assert torch.equal(found[5], weight[5])
    expected = by_numpy(inputs, weight, kept, 0.01)
    np.testing.assert_allclose(found.numpy(), expected, rtol=RTOL, atol=RTOL)
    assert not solved(inputs, weight, torch.zeros_like(kept)).any()
    assert torch.equal(solved(inputs, weight, torch.ones_like(kept)), weight)


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_an_input_that_never_moves_leaves_its_weights(damping: float) -> None:
    inputs, (weight, kept) = correlated(), layer()
    inputs[:, 5] = 0.0
    result = LeastSquares(inputs.mT @ inputs, damping).reconstruct(weight, kept)
    assert torch.equal(result.weight[:, 5], torch.where(kept, weight, 0.0)[:, 5])
    assert result.rows >= 11
    alive = [index for index in range(WIDTH) if index != 5]
    expected = by_numpy(inputs[:, alive], weight[:, alive], kept[:, alive], damping * (WIDTH - 1) / WIDTH)
    np.testing.assert_allclose(result.weight[:, alive].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_fewer_tokens_than_kept_weights() -> None:
    """Nothing tells some directions: they stay as they were trained, and new tokens do not suffer."""
    inputs, (weight, kept) = correlated(tokens=5), layer()
    result = LeastSquares(inputs.mT @ inputs).reconstruct(weight, kept)
    assert result.error < 0.02 * result.masked_error
    row = int(kept.sum(1).argmax())
    moved = (result.weight - torch.where(kept, weight, 0.0))[row].double()
    span = inputs[:, kept[row]]
    inside = moved[kept[row]] @ (torch.linalg.pinv(span) @ span)
    torch.testing.assert_close(inside, moved[kept[row]], rtol=1e-4, atol=1e-6)
    singular = LeastSquares(inputs.mT @ inputs, 0.0).reconstruct(weight, kept)
    assert singular.weight.isfinite().all()
    assert singular.error < 1e-3 * singular.masked_error


def test_a_matrix_that_is_no_gram_matrix_leaves_the_rows() -> None:
    weight, kept = layer(features=3)
    result = LeastSquares(torch.full((3, 3), -1.0) - torch.eye(3)).reconstruct(weight, kept)
    assert torch.equal(result.weight, torch.where(kept, weight, 0.0))
    assert result.rows == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_what_is_stored_and_what_is_judged(dtype: torch.dtype) -> None:
    inputs, (weight, kept) = correlated(), layer()
    weight = weight.to(dtype)
    result = LeastSquares((inputs.mT @ inputs).float()).reconstruct(weight, kept)
    assert result.weight.dtype == dtype
    assert result.error == pytest.approx(error_of(inputs, weight, result.weight), rel=1e-5)
    assert result.error < 0.5 * result.masked_error


def test_rows_are_solved_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, (weight, kept) = correlated(), layer(0.3, outputs=40)
    whole = solved(inputs, weight, kept)
    for elements in (1, 700, 5000):
        monkeypatch.setattr("mfcompile.passes.least_squares._SYSTEM_ELEMENTS", elements)
        torch.testing.assert_close(solved(inputs, weight, kept), whole, rtol=RTOL, atol=RTOL)


def update_of(model: nn.Module, sparsity: float = 0.5) -> tuple[mfcompile.CapturedGraph, mfcompile.MaskSet, list[SiteUpdate]]:
    """A model pruned by magnitude, every depth in a pass of its own."""
    captured = mfcompile.capture(model.eval(), pixels())
    regions = mfcompile.infer_regions(captured)
    masks = mfcompile.select_masks(captured, regions, sparsity=sparsity, criterion="magnitude", allocation="uniform")
    run = PruningRun(captured, regions, sparsity, batches=lambda: [pixels()])
    return captured, *updated(run, masks, LeastSquaresOptions(passes=None))


def value_of(captured: mfcompile.CapturedGraph, masks: mfcompile.MaskSet, name: str) -> Tensor:
    return torch.where(masks[name], masks.updated_weight(name, captured.parameter(name)), 0.0)


class TestModels:
    def test_layer_after_layer_each_with_the_inputs_that_the_pruned_model_gives_it(self) -> None:
        captured, masks, updates = update_of(two_layers())
        model = two_layers()
        dense = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        assert [item.name for item in updates] == list(masks)
        for name in masks:
            inputs = linear_inputs(model, {"image": pixels()})[name][0].flatten(0, -2)
            expected = torch.from_numpy(by_numpy(inputs, dense[name], masks[name], 0.01)).float()
            with torch.no_grad():
                model.get_parameter(name).copy_(value_of(captured, masks, name))
            torch.testing.assert_close(value_of(captured, masks, name), expected, rtol=1e-3, atol=1e-4)

    def test_a_tied_weight_is_solved_once_for_all_its_calls(self) -> None:
        model = two_layers()
        model.blocks[1] = model.blocks[0]
        captured, masks, updates = update_of(model)
        assert len(updates) == len(masks) == 2
        name = "blocks.0.up.weight"
        inputs = torch.cat([item.flatten(0, -2) for item in linear_inputs(model, {"image": pixels()})[name]])
        dense = captured.parameter(name).detach()
        expected = torch.from_numpy(by_numpy(inputs, dense, masks[name], 0.01)).float()
        torch.testing.assert_close(value_of(captured, masks, name), expected, rtol=1e-3, atol=1e-4)

    def test_masks_stay_and_every_layer_comes_closer(self) -> None:
        before = vlm_masks()
        after, updates = updated(vlm_run(), before, LeastSquaresOptions())
        assert after.mask_digest() == before.mask_digest()
        assert sorted(item.name for item in updates) == sorted(site.name for site in vlm_run().regions.pruned_sites)
        assert all(item.error < item.masked_error for item in updates)
        assert set(after.new_values) == set(after.packed)

    def test_by_name_and_with_options(self) -> None:
        asked: dict[str, Any] = {"update": "least-squares", "calibration": vlm_batches(), "sparsity": 0.5}
        found = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), **asked)
        plain = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), **{**asked, "update": None})
        damped = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), **asked, update_options={"damping": 1e6})
        name = next(iter(found.masks))
        assert found.masks.mask_digest() == plain.masks.mask_digest()
        own = plain.module.get_submodule(name.rpartition(".")[0]).weight
        for compiled, is_near in ((found, False), (damped, True)):
            weight = compiled.module.get_submodule(name.rpartition(".")[0]).weight
            assert bool(torch.allclose(weight, own, rtol=0, atol=1e-4)) is is_near  # type: ignore[arg-type]
        assert found.report["options"]["update"] == "least-squares"

    def test_what_it_refuses(self) -> None:
        with pytest.raises(
            InputError, match="least-squares has no option 'block_columns'; its options are damping, memory_mib"
        ):
            LeastSquaresOptions.from_mapping({"block_columns": 64})
        with pytest.raises(InputError, match="least-squares: damping is a number of at least 0, got -1"):
            LeastSquaresOptions(damping=-1)
        captured = replace(vlm_run().captured, frontend="onnx")
        with pytest.raises(InputError, match="update='least-squares' rewrites the layers of a PyTorch module"):
            updated(vlm_run(captured=captured), vlm_masks(), LeastSquaresOptions())
