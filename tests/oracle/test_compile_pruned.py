"""mfcompile gives the masks of the authors' published code, from a model that it knows nothing about."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import mfcompile
from mfcompile.statistics import SiteStatistics
from tests.oracle import recorded, reference

GROUPS = {layer.name: layer.modality for layer in recorded.layers()}
BY_HAND = {
    "vision_encoder*": "vision",
    "text_encoder.bert.encoder.*": "text",
    "re:text_encoder.bert.encoder.layer.[67].*": "fusion",
}
# Observed in float64 from fp32 activations; the recording accumulated in fp32.
RTOL_OF_NORMS = 2e-6

CALIBRATIONS = {
    "multiflow_general": recorded.general_batches,
    "multiflow_regionfix": recorded.interleaved_batches,
}


def as_arrays(masks: mfcompile.MaskSet) -> recorded.Masks:
    return {name: mask.numpy() for name, mask in masks.items()}


@cache
def captured() -> mfcompile.CapturedGraph:
    return mfcompile.capture(recorded.model(), recorded.general_batches()[0])


@cache
def regions() -> mfcompile.RegionMap:
    return mfcompile.infer_regions(captured())


@cache
def statistics(variant: str) -> mfcompile.CalibrationStatistics:
    return mfcompile.calibrate(captured(), CALIBRATIONS[variant](), regions=regions())


@cache
def published_statistics() -> mfcompile.CalibrationStatistics:
    """The recorded norms of the published code, which the recorded ablations were made from."""
    samples = recorded.sample_counts("multiflow")
    sites = {
        name: SiteStatistics(torch.from_numpy(squares).double() * samples[name], 1, 0, samples[name])
        for name, squares in recorded.mean_squares("multiflow").items()
    }
    return mfcompile.CalibrationStatistics(sites, 2 * recorded.ITERATIONS, "recorded norms", "recording")


def exact_reference(variant: str, sparsity: float) -> recorded.Masks:
    norms = {name: np.sqrt(squares.astype(np.float64)) for name, squares in recorded.mean_squares(variant).items()}
    return reference.multiflow(recorded.weights(), norms, GROUPS, sparsity, "exact")


def assert_one_weight_a_layer(found: recorded.Masks, expected: recorded.Masks) -> None:
    """The published code truncates a layer's budget and may keep one weight more; nothing else may differ."""
    assert found.keys() == expected.keys()
    for name, count in recorded.differing_bits(found, expected).items():
        assert count == 1, f"{name}: {count} bits differ"
        assert found[name].sum() == expected[name].sum() - 1, f"{name}: the recorded mask should keep the extra weight"


# --- regions and sites ---


@pytest.mark.parametrize("kind", [0, 1], ids=["general", "region"])
def test_dataflow_finds_the_modality_of_every_layer(kind: int) -> None:
    found = mfcompile.infer_regions(mfcompile.capture(recorded.model(), recorded.interleaved_batches()[kind]))
    assert {name: found.weights[name] for name in GROUPS} == GROUPS
    assert [site.name for site in found.pruned_sites] == list(GROUPS), "heads and projections are no sites"


def test_regions_by_hand_equal_regions_by_dataflow() -> None:
    found = mfcompile.infer_regions(captured(), regions=BY_HAND)
    assert {name: found.weights[name] for name in GROUPS} == GROUPS
    masks = mfcompile.select_masks(captured(), found, statistics("multiflow_general"), sparsity=0.63)
    assert masks.digest() == mfcompile.select_masks(captured(), regions(), statistics("multiflow_general")).digest()


def test_weights_may_be_grouped_by_what_they_read() -> None:
    found = mfcompile.infer_regions(captured(), cross_attention_kv="input")
    moved = {name for name in GROUPS if found.weights[name] != GROUPS[name]}
    layer = "text_encoder.bert.encoder.layer"
    images = {f"{layer}.{index}.crossattention.self.{kind}.weight": "vision" for index in (6, 7) for kind in ("key", "value")}
    # The first fusion layer reads plain text until its cross-attention has answered.
    texts = {f"{layer}.6.attention.{part}.weight": "text" for part in ("self.query", "self.key", "self.value", "output.dense")}
    texts[f"{layer}.6.crossattention.self.query.weight"] = "text"
    assert {name: found.weights[name] for name in moved} == {**images, **texts}


# --- statistics ---


@pytest.mark.parametrize("variant", CALIBRATIONS)
def test_statistics_equal_the_recorded_norms(variant: str) -> None:
    expected = recorded.mean_squares(variant)
    samples = recorded.sample_counts(variant)
    found = statistics(variant).sites
    assert found.keys() == expected.keys()
    for name, site in found.items():
        assert site.sample_count == samples[name], name
        mean = site.sum_of_squares.numpy() / site.sample_count
        np.testing.assert_allclose(mean, expected[name], rtol=RTOL_OF_NORMS, atol=0, err_msg=name)


@pytest.mark.parametrize("observe", ["graph", "module"])
def test_graph_and_module_observe_the_same(observe: str) -> None:
    found = mfcompile.calibrate(captured(), recorded.general_batches(), regions=regions(), observe=observe)
    masks = mfcompile.select_masks(captured(), regions(), found, sparsity=0.63, rounding="official")
    assert recorded.differing_bits(as_arrays(masks), recorded.masks("multiflow_general@0.63")) == {}


# --- masks ---


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("variant", CALIBRATIONS)
def test_official_rounding_gives_the_recorded_masks(variant: str, sparsity: str) -> None:
    compiled = mfcompile.compile_pruned(
        recorded.model(),
        recorded.general_batches()[0],
        sparsity=float(sparsity),
        calibration=CALIBRATIONS[variant](),
        rounding="official",
    )
    found, expected = as_arrays(compiled.masks), recorded.masks(f"{variant}@{sparsity}")
    assert found.keys() == expected.keys()
    assert recorded.differing_bits(found, expected) == {}


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("variant", CALIBRATIONS)
def test_exact_budgets_differ_by_at_most_one_weight_in_a_layer(variant: str, sparsity: str) -> None:
    masks = mfcompile.select_masks(captured(), regions(), statistics(variant), sparsity=float(sparsity))
    assert_one_weight_a_layer(as_arrays(masks), recorded.masks(f"{variant}@{sparsity}"))
    assert recorded.differing_bits(as_arrays(masks), exact_reference(variant, float(sparsity))) == {}


def test_exact_is_the_default_and_removes_what_was_asked_of_every_region() -> None:
    compiled = mfcompile.compile_pruned(recorded.model(), recorded.general_batches()[0], calibration=recorded.general_batches())
    assert recorded.differing_bits(as_arrays(compiled.masks), exact_reference("multiflow_general", 0.63)) == {}
    for region in ("vision", "text", "fusion"):
        masks = [compiled.masks[name] for name, group in GROUPS.items() if group == region]
        size = sum(mask.numel() for mask in masks)
        assert sum(int(mask.sum()) for mask in masks) == size - int(0.63 * size)


@pytest.mark.parametrize("kind", [0, 1], ids=["general", "region"])
def test_the_kind_of_example_does_not_matter(kind: int) -> None:
    example = recorded.interleaved_batches()[kind]
    compiled = mfcompile.compile_pruned(
        recorded.model(), example, calibration=recorded.interleaved_batches(), rounding="official"
    )
    assert recorded.differing_bits(as_arrays(compiled.masks), recorded.masks("multiflow_regionfix@0.63")) == {}


def test_calibrations_differ_where_they_should() -> None:
    """The recorded variants are not equal by accident: each comparison above could fail."""
    general = mfcompile.select_masks(captured(), regions(), statistics("multiflow_general"), rounding="official")
    assert recorded.differing_bits(as_arrays(general), recorded.masks("multiflow_regionfix@0.63")) != {}
    both = mfcompile.select_masks(captured(), regions(), statistics("multiflow_regionfix"), rounding="official")
    assert recorded.differing_bits(as_arrays(both), recorded.masks("multiflow@0.63")) != {}


# --- ablations and baselines, from the recorded norms ---

ABLATIONS = {
    "multiflow": ("multiflow", "magnitude-per-region"),
    "multiflow_inversion": ("multiflow-inverted", "magnitude-per-region"),
    "multiflow_wo_multimodality": ("multiflow", "magnitude-global"),
    "multiflow_wo_distribution": ("multiflow", "score-global"),
    "omp": ("magnitude", "magnitude-global"),
    "omp_modality": ("magnitude", "magnitude-per-region"),
}
# The recorded masks of these use their threshold directly, not a budget per layer, so nothing is truncated.
WITHOUT_LAYER_BUDGET = ("multiflow_wo_distribution", "omp", "omp_modality")


def select_ablation(key: str, sparsity: str, rounding: str) -> recorded.Masks:
    criterion, allocation = ABLATIONS[key]
    masks = mfcompile.select_masks(
        captured(),
        regions(),
        published_statistics(),
        sparsity=float(sparsity),
        criterion=criterion,
        allocation=allocation,
        rounding=rounding,
    )
    return as_arrays(masks)


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("key", ABLATIONS)
def test_exact_ablations_and_baselines_equal_the_recorded_masks(key: str, sparsity: str) -> None:
    found, expected = select_ablation(key, sparsity, "exact"), recorded.masks(f"{key}@{sparsity}")
    if key in WITHOUT_LAYER_BUDGET:
        assert recorded.differing_bits(found, expected) == {}
    else:
        assert_one_weight_a_layer(found, expected)


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("key", ABLATIONS)
def test_official_ablations_and_baselines_equal_the_recorded_masks(key: str, sparsity: str) -> None:
    found, expected = select_ablation(key, sparsity, "official"), recorded.masks(f"{key}@{sparsity}")
    assert recorded.differing_bits(found, expected) == {}


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_one_region_for_all_is_the_ablation_without_multimodality(sparsity: str) -> None:
    one = mfcompile.infer_regions(captured(), regions={"*": "all"})
    masks = mfcompile.select_masks(captured(), one, published_statistics(), sparsity=float(sparsity), rounding="official")
    expected = recorded.masks(f"multiflow_wo_multimodality@{sparsity}")
    assert recorded.differing_bits(as_arrays(masks), expected) == {}
