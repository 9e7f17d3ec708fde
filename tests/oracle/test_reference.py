"""The plain NumPy reference gives the recorded masks, so it can stand for them where nothing was recorded."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.oracle import recorded, reference
from tests.oracle.reference import Rounding

GROUPS = {layer.name: layer.modality for layer in recorded.layers()}
ONE_GROUP = dict.fromkeys(GROUPS, "all")
VARIANTS = ("multiflow_general", "multiflow_regionfix", "multiflow")
# The recording accumulates in fp32 and from other activations in the last bits; relative to each feature's own norm.
RTOL_OF_NORMS = 2e-6

Norms = dict[str, NDArray[np.float64]]


def token_mask(layer: recorded.Layer, batch: recorded.Batch, tokens: int, variant: str) -> NDArray[Any] | None:
    """Which rows count: no padding in text and fusion layers, except where a layer reads the image.

    The published code takes the token ids of region batches for their padding mask (``variant="multiflow"``).
    """
    if layer.modality == "vision" or tokens != batch["text_atts"].shape[1]:
        return None
    is_slip = variant == "multiflow" and "image_atts" in batch
    mask: NDArray[Any] = batch["text_ids"].numpy() == 1 if is_slip else batch["text_atts"].numpy()
    return mask


@cache
def mean_squares(variant: str) -> dict[str, tuple[NDArray[np.float64], int]]:
    """Squared norms and sample counts from the activations of the rebuilt model."""
    batches = recorded.general_batches() if variant == "multiflow_general" else recorded.interleaved_batches()
    inputs = recorded.linear_inputs(recorded.model(), batches)
    found = {}
    for layer in recorded.layers():
        activations = [seen[layer.name] for seen in inputs]
        masks = [token_mask(layer, batch, x.shape[1], variant) for batch, x in zip(batches, activations, strict=True)]
        found[layer.name] = reference.mean_square(activations, masks)
    return found


def norms(variant: str) -> Norms:
    return {name: np.sqrt(squares) for name, (squares, _) in mean_squares(variant).items()}


def masks_of(key: str, sparsity: float, rounding: Rounding) -> recorded.Masks:
    """What the reference makes of a key of the recording. The recorded ablations used the published norms."""
    weights = recorded.weights()
    magnitudes = {name: np.abs(weight) for name, weight in weights.items()}
    match key:
        case "omp":
            return reference.threshold_group(magnitudes, sparsity, rounding)
        case "omp_local":
            alone = ({name: magnitude} for name, magnitude in magnitudes.items())
            return {k: v for one in alone for k, v in reference.threshold_group(one, sparsity, rounding).items()}
        case "omp_modality":
            masks: recorded.Masks = {}
            for group in ("vision", "text", "fusion"):
                members = {name: value for name, value in magnitudes.items() if GROUPS[name] == group}
                masks |= reference.threshold_group(members, sparsity, rounding)
            return masks
        case "lamp" | "l2":
            score = reference.score_lamp if key == "lamp" else reference.score_l2
            return reference.threshold_group({k: score(w) for k, w in weights.items()}, sparsity, rounding)
        case "multiflow_wo_distribution":
            return reference.multiflow_without_distribution(weights, norms("multiflow"), sparsity, rounding)
        case "multiflow_wo_multimodality":
            return reference.multiflow(weights, norms("multiflow"), ONE_GROUP, sparsity, rounding)
        case "multiflow_inversion":
            return reference.multiflow(weights, norms("multiflow"), GROUPS, sparsity, rounding, inverted=True)
        case _:
            return reference.multiflow(weights, norms(key), GROUPS, sparsity, rounding)


KEYS = (
    *VARIANTS,
    "multiflow_wo_distribution",
    "multiflow_wo_multimodality",
    "multiflow_inversion",
    "omp",
    "omp_local",
    "omp_modality",
    "lamp",
    "l2",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_norms_equal_the_recorded_norms(variant: str) -> None:
    expected = recorded.mean_squares(variant)
    samples = recorded.sample_counts(variant)
    for name, (squares, count) in mean_squares(variant).items():
        np.testing.assert_allclose(squares, expected[name], rtol=RTOL_OF_NORMS, atol=0, err_msg=name)
        assert count == samples[name], name


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("key", KEYS)
def test_official_rounding_gives_the_recorded_masks(key: str, sparsity: str) -> None:
    found = masks_of(key, float(sparsity), "official")
    assert recorded.differing_bits(found, recorded.masks(f"{key}@{sparsity}")) == {}


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("key", KEYS)
def test_exact_budgets_differ_by_at_most_one_weight_in_a_layer(key: str, sparsity: str) -> None:
    found = masks_of(key, float(sparsity), "exact")
    expected = recorded.masks(f"{key}@{sparsity}")
    for name, count in recorded.differing_bits(found, expected).items():
        assert count == 1, f"{name}: {count} bits differ"
        assert found[name].sum() == expected[name].sum() - 1, f"{name}: the recorded mask should keep the extra weight"


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_layer_budgets_equal_the_recorded_ones(sparsity: str) -> None:
    summary = json.loads((recorded.DATA / "summary.json").read_text(encoding="utf-8"))[f"multiflow_general@{sparsity}"]
    weights = recorded.weights()
    exact = reference.layer_budgets(weights, GROUPS, float(sparsity), "exact")
    official = reference.layer_budgets(weights, GROUPS, float(sparsity), "official")
    assert [weights[name].size - count for name, count in exact.items()] == summary["kept_by_magnitude"]
    assert list(official.values()) == summary["k_pruned"]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.63, 0.75, 0.9, 1.0])
def test_exact_budgets_remove_what_was_asked_of_every_group(sparsity: float) -> None:
    removed = reference.layer_budgets(recorded.weights(), GROUPS, sparsity, "exact")
    for group in ("vision", "text", "fusion"):
        sizes = sum(layer.size for layer in recorded.layers() if layer.modality == group)
        assert sum(count for name, count in removed.items() if GROUPS[name] == group) == int(sparsity * sizes)


def test_exact_breaks_ties_by_position_and_official_removes_them_all() -> None:
    scores = np.array([[2.0, 1.0, 1.0], [1.0, 3.0, 0.5]])
    exact = reference.remove_lowest(scores, 2, "exact")
    official = reference.remove_lowest(scores, 2, "official")
    assert exact.tolist() == [[True, False, True], [True, True, False]]
    assert official.tolist() == [[True, False, False], [False, True, False]]
