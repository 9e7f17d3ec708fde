"""SNIP, ITERSNIP, CHITA and TAMT against the recorded masks and new values, from the recorded gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

import mfcompile
from mfcompile.passes import chita_solver
from mfcompile.passes.criteria.chita import Chita, FlatWeights
from mfcompile.passes.criteria.itersnip import iterate
from mfcompile.passes.criteria.snip import Snip
from mfcompile.passes.criteria.tamt import initial_scores
from mfcompile.passes.pruning_run import PruningRun
from tests.oracle import chita_reference, recorded

LAYERS = recorded.layers()
SIZES = [layer.size for layer in LAYERS]
SAMPLES = 7  # 4 of the general batch, 3 images of the region batch
CHITA_BLOCKS = {"chita": 10_000, "chita_block1000": 1000}
CHITA_KEYS = [(key, sparsity) for key in CHITA_BLOCKS for sparsity in recorded.SPARSITIES]


@cache
def gradients() -> Mapping[str, NDArray[Any]]:
    found: Mapping[str, NDArray[Any]] = load_file(recorded.DATA / "gradients.safetensors")
    return found


@cache
def captured() -> mfcompile.CapturedGraph:
    return mfcompile.capture(recorded.model(), recorded.general_batches()[0])


@cache
def regions() -> mfcompile.RegionMap:
    return mfcompile.infer_regions(captured())


def run(sparsity: str, rounding: str = "exact") -> PruningRun:
    return PruningRun(captured(), regions(), float(sparsity), rounding=rounding)


def by_layer(flat: NDArray[np.float32]) -> dict[str, Tensor]:
    parts = np.split(flat, np.cumsum(SIZES)[:-1])
    return {layer.name: torch.from_numpy(part.reshape(layer.shape)) for layer, part in zip(LAYERS, parts, strict=True)}


def flat(masks: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.concatenate([masks[layer.name].reshape(-1) for layer in LAYERS])


def dense() -> NDArray[np.float32]:
    return np.concatenate([weight.reshape(-1) for weight in recorded.weights().values()])


def as_arrays(masks: Mapping[str, Tensor]) -> recorded.Masks:
    return {name: mask.numpy() for name, mask in masks.items()}


# --- SNIP and ITERSNIP ---


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_snip_gives_the_recorded_masks(sparsity: str, rounding: str) -> None:
    mean = by_layer(gradients()["chita.A"].sum(axis=0) / recorded.ITERATIONS)  # the rows are those of the same batches
    masks = run(sparsity, rounding).select(Snip(), gradients=mean)
    assert recorded.differing_bits(as_arrays(masks), recorded.masks(f"snip@{sparsity}")) == {}


def recorded_sum(step: int) -> NDArray[np.float32]:
    """Gradient of a step of ITERSNIP at 0.75: two iterations, of the model as it was masked then."""
    if step == 1:
        both: NDArray[np.float32] = gradients()["chita.A"][:2].sum(axis=0)
        return both
    found = np.zeros(sum(SIZES), np.float32)
    key = f"itersnip@0.75.step{step - 1}"
    found[np.unpackbits(gradients()[f"{key}.places"], count=found.size) == 1] = gradients()[f"{key}.grad_sum"]
    return found


def test_itersnip_gives_the_recorded_masks() -> None:
    kept = []

    def gradient(step: int, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = recorded_sum(step)
        if masks:
            mask = flat(as_arrays(masks))
            kept.append(int(mask.sum()))
            assert not found[~mask].any(), f"step {step}: a weight that is masked here has a recorded gradient"
            assert int((found[mask] == 0).sum()) < 20, f"step {step}: weights that are kept here have no recorded gradient"
        return by_layer(found)

    masks = iterate(run("0.75"), 3, "exp", gradient)
    assert recorded.differing_bits(as_arrays(masks), recorded.masks("itersnip@0.75")) == {}
    size = sum(SIZES)
    assert kept == [size - int((1 - 0.25 ** (1 / 3)) * size), size - int((1 - 0.25 ** (2 / 3)) * size)]


# --- CHITA ---


def kept_count(sparsity: str) -> int:
    return int((1 - float(sparsity)) * sum(SIZES))


@pytest.mark.parametrize(("key", "sparsity"), CHITA_KEYS)
def test_the_reference_with_the_published_defect_gives_the_recorded_masks(key: str, sparsity: str) -> None:
    whole = chita_reference.problem(gradients()["chita.A"], dense(), 1e-5, SAMPLES)
    mask, _ = chita_reference.solve(whole, SIZES, kept_count(sparsity), CHITA_BLOCKS[key], loses_blocks=True, refits=False)
    assert np.array_equal(mask, flat(recorded.masks(f"{key}@{sparsity}")))


@pytest.mark.parametrize(("key", "sparsity"), CHITA_KEYS)
def test_chita_gives_the_recorded_masks_but_for_the_lost_blocks(key: str, sparsity: str) -> None:
    expected = flat(recorded.masks(f"{key}@{sparsity}"))
    weights = FlatWeights(run(sparsity, "official"))
    weights.update(
        run(sparsity, "official"), torch.from_numpy(gradients()["chita.A"]), Chita(block_size=CHITA_BLOCKS[key]), SAMPLES
    )
    found = flat(as_arrays(weights.masks))
    assert int(found.sum()) == kept_count(sparsity)
    lost = 0
    for places in chita_reference.blocks(SIZES, CHITA_BLOCKS[key]):
        if found[places].any() and not expected[places].any():
            lost += int(found[places].sum())
        else:
            assert np.array_equal(found[places], expected[places]), places
    assert lost == kept_count(sparsity) - int(expected.sum()), "the recording lost blocks, and nothing else"
    assert (lost > 0) == (sparsity != "0.63")


def test_exact_rounding_keeps_what_was_asked_for() -> None:
    weights = FlatWeights(run("0.63"))
    weights.update(run("0.63"), torch.from_numpy(gradients()["chita.A"]), Chita(), SAMPLES)
    assert sum(int(mask.sum()) for mask in weights.masks.values()) == sum(SIZES) - int(0.63 * sum(SIZES)) == 27753


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_new_values_are_the_recorded_ones_and_nearer_to_the_optimum(sparsity: str) -> None:
    rows = gradients()["chita.A"]
    solution = chita_solver.solve(
        torch.from_numpy(rows), torch.from_numpy(dense()), SIZES, kept_count(sparsity), samples=SAMPLES
    )
    mask = flat(recorded.masks(f"chita@{sparsity}"))
    expected = np.zeros(mask.size)
    expected[mask] = gradients()[f"chita@{sparsity}.weights"]
    found = np.where(mask, solution.weights.numpy().astype(np.float64), 0.0)  # without the blocks that the recording lost
    # Single precision and a division by l2 = 1.5e-5 cost the recording three digits.
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-3)
    assert np.abs(expected - np.where(mask, dense(), 0)).max() > 5, "the update is no small correction"
    whole = chita_reference.problem(rows, dense(), 1e-5, SAMPLES)
    for places in chita_reference.blocks(SIZES, 10_000):
        if mask[places].any():
            this = whole.part(places)
            assert this.value(found[places]) <= this.value(expected[places]) + 1e-9


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_chita_is_the_reference_without_the_defect(sparsity: str) -> None:
    rows = gradients()["chita.A"]
    whole = chita_reference.problem(rows, dense(), 1e-5, SAMPLES)
    mask, _ = chita_reference.solve(whole, SIZES, kept_count(sparsity), 1000, loses_blocks=False, refits=False)
    found = chita_solver.solve(
        torch.from_numpy(rows), torch.from_numpy(dense()), SIZES, kept_count(sparsity), samples=SAMPLES, block_size=1000
    )
    assert np.array_equal(found.support.numpy(), mask)


# --- TAMT ---


def published_start(sparsity: str) -> recorded.Masks:
    """Where M is not zero: |w| >= the k-th smallest of its layer, which lets at least one weight per layer too many live."""
    found = {}
    for layer in LAYERS:
        magnitude = np.abs(recorded.weights()[layer.name])
        found[layer.name] = magnitude >= np.sort(magnitude.reshape(-1))[int(float(sparsity) * layer.size) - 1]
    return found


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_tamt_starts_from_the_published_scores_with_as_many_weights_as_are_to_stay(sparsity: str) -> None:
    scores = {name: score.numpy() for name, score in initial_scores(run(sparsity)).items()}
    size, published = sum(SIZES), published_start(sparsity)
    cut = np.sort(np.abs(dense()))[int(float(sparsity) * size) - 1]
    living = 0
    for layer in LAYERS:
        found = scores[layer.name] != 0
        assert not (found & ~published[layer.name]).any(), layer.name
        assert 0 <= int(published[layer.name].sum()) - int(found.sum()) <= 2, layer.name
        np.testing.assert_allclose(scores[layer.name][found], 2 * cut, rtol=1e-6)
        living += int(found.sum())
    assert living == size - int(float(sparsity) * size)


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_the_recorded_masks_of_tamt_lie_within_the_published_start(sparsity: str) -> None:
    """Published training only drops the few weights that its start has too many; ours begins a few weights away.

    The recording's dropout cannot be drawn again, and with it not its choice among these few.
    """
    expected, start = recorded.masks(f"tamt@{sparsity}"), published_start(sparsity)
    assert not any((expected[name] & ~start[name]).any() for name in expected)
    surplus = int(flat(start).sum()) - int(flat(expected).sum())
    assert 0 < surplus <= 2 * len(LAYERS)
    ours = {name: (score != 0).numpy() for name, score in initial_scores(run(sparsity)).items()}
    assert sum(recorded.differing_bits(ours, expected).values()) <= 2 * surplus
