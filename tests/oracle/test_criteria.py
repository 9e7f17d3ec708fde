"""Criteria without gradients give the masks and the scores of the authors' published code."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

import mfcompile
from mfcompile.passes.criteria.base import Criterion
from mfcompile.passes.criteria.registry import pruner
from mfcompile.passes.mask_selection import site_weight
from tests.oracle import recorded
from tests.oracle.test_compile_pruned import as_arrays, captured, regions

RECORDED_SEED = 42
"""Of the recorded random masks: one stream of torch.randn, layer by layer, begun anew for every sparsity."""

WITHOUT_DATA: dict[str, dict[str, Any]] = {
    "omp": {"criterion": "magnitude"},
    "omp_modality": {"criterion": "magnitude", "allocation": "magnitude-per-region"},
    "omp_local": {"criterion": "magnitude", "allocation": "uniform"},
    "lamp": {"criterion": "lamp"},
    "l2": {"criterion": "l2"},
    "rand": {"criterion": "random", "seed": RECORDED_SEED},
}


def select(key: str, sparsity: str, rounding: str) -> recorded.Masks:
    masks = mfcompile.select_masks(
        captured(), regions(), None, sparsity=float(sparsity), rounding=rounding, **WITHOUT_DATA[key]
    )
    return as_arrays(masks)


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("key", WITHOUT_DATA)
def test_official_rounding_gives_the_recorded_masks(key: str, sparsity: str) -> None:
    found, expected = select(key, sparsity, "official"), recorded.masks(f"{key}@{sparsity}")
    assert list(found) == list(expected)
    assert recorded.differing_bits(found, expected) == {}


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
@pytest.mark.parametrize("key", [key for key in WITHOUT_DATA if key != "omp_local"])
def test_exact_counts_change_nothing_where_one_threshold_is_set(key: str, sparsity: str) -> None:
    assert recorded.differing_bits(select(key, sparsity, "exact"), recorded.masks(f"{key}@{sparsity}")) == {}


@pytest.mark.parametrize("sparsity", recorded.SPARSITIES)
def test_exact_uniform_masks_hold_what_truncation_leaves_over(sparsity: str) -> None:
    """The published code truncates s n of every layer; exact counts sum to int(s N), one weight in some of the layers."""
    found, expected = select("omp_local", sparsity, "exact"), recorded.masks(f"omp_local@{sparsity}")
    more = {name: int(expected[name].sum()) - int(mask.sum()) for name, mask in found.items()}
    total = sum(layer.size for layer in recorded.layers())
    assert set(more.values()) <= {0, 1}
    assert sum(more.values()) == int(float(sparsity) * total) - sum(
        int(float(sparsity) * layer.size) for layer in recorded.layers()
    )
    assert all(not (mask & ~expected[name]).any() for name, mask in found.items())


def test_layers_of_one_size_lose_the_same_under_a_uniform_allocation() -> None:
    """Up to one weight, which goes to the earlier of them."""
    found = select("omp_local", "0.63", "exact")
    counts: dict[int, list[int]] = {}
    for mask in found.values():
        counts.setdefault(mask.size, []).append(int((~mask).sum()))
    for removed in counts.values():
        assert removed == sorted(removed, reverse=True)
        assert removed[0] - removed[-1] <= 1


def recorded_scores(key: str) -> tuple[NDArray[np.float32], str]:
    """(80, 64) scores of every layer at ``linspace`` places, and the digest of all of them."""
    with safe_open(recorded.DATA / "scores.safetensors", framework="numpy") as file:
        return file.get_tensor(key), file.metadata()[key]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("key", ["lamp", "l2"])
def test_scores_equal_the_recorded_ones_to_the_bit(key: str, threads: int) -> None:
    criterion = pruner(key)
    assert isinstance(criterion, Criterion)
    torch.set_num_threads(threads)
    try:
        scores = [
            criterion.score(mfcompile.SiteData(site.name, site.region, site_weight(captured(), site))).numpy().reshape(-1)
            for site in regions().pruned_sites
        ]
    finally:
        torch.set_num_threads(1)
    some, digest = recorded_scores(key)
    for layer, score, expected in zip(recorded.layers(), scores, some, strict=True):
        places = np.linspace(0, score.size - 1, 64).astype(np.int64)
        np.testing.assert_array_equal(score[places], expected, err_msg=layer.name)
    assert hashlib.sha256(np.concatenate(scores).astype("<f4").tobytes()).hexdigest() == digest


def test_another_seed_draws_other_masks() -> None:
    """The recorded seed is no accident: any other gives masks that agree by chance only."""
    other = mfcompile.select_masks(captured(), regions(), None, sparsity=0.75, criterion="random", seed=RECORDED_SEED + 1)
    differing = sum(recorded.differing_bits(as_arrays(other), recorded.masks("rand@0.75")).values())
    total = sum(layer.size for layer in recorded.layers())
    assert abs(differing / total - 2 * 0.75 * 0.25) < 0.02
