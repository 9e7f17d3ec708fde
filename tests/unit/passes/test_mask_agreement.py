"""Agreement of masks against its definition, written out with NumPy over plain booleans."""

import numpy as np
import pytest
import torch

from mfcompile.masks import PackedMask
from mfcompile.passes.mask_agreement import PairAgreement, agreement
from tests.models import vlm_regions

SITES = vlm_regions().pruned_sites


def masks(kept: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site.fqn: torch.rand(site.out_features, site.in_features, generator=generator) < kept for site in SITES}


def flat(chosen: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([mask.numpy().reshape(-1) for mask in chosen.values()])


def cohen(one: np.ndarray, other: np.ndarray) -> float:
    """(p - q) / (1 - q), from the table of counts."""
    table = np.array([[np.sum((one == a) & (other == b)) for b in (False, True)] for a in (False, True)]) / one.size
    expected = float(table.sum(1) @ table.sum(0))
    return (float(np.trace(table)) - expected) / (1 - expected)


def test_every_measure_follows_its_definition() -> None:
    given = {"a": masks(0.3, 1), "b": masks(0.6, 2), "c": masks(0.3, 1)}
    given["c"][SITES[0].fqn] = ~given["c"][SITES[0].fqn]
    found = agreement({name: {fqn: PackedMask.pack(item) for fqn, item in own.items()} for name, own in given.items()}, SITES)
    assert found.labels == ("a", "b", "c")
    for row, one in enumerate(given.values()):
        for column, other in enumerate(given.values()):
            first, second, pair = flat(one), flat(other), found.pairs[row][column]
            assert pair.kept == (first.sum(), second.sum())
            assert pair.kappa == pytest.approx(cohen(first, second), abs=1e-12)
            shared = np.sum(first & second)
            assert pair.shared_fraction == pytest.approx(2 * shared / (first.sum() + second.sum()))
            assert pair.jaccard_kept == pytest.approx(shared / np.sum(first | second))
            assert pair.jaccard_pruned == pytest.approx(np.sum(~first & ~second) / np.sum(~first | ~second))
    assert found.as_dict()["kappa"][0][0] == 1
    assert abs(found.pairs[0][1].kappa) < 0.1, "independent masks agree as by chance"


def test_chance_is_what_random_masks_share() -> None:
    generator = np.random.default_rng(0)
    total, kept = 400, (100, 160)
    shared = []
    for _ in range(400):
        one, other = (generator.permutation(total) < count for count in kept)
        shared.append(np.sum(one & other))
    pair = PairAgreement(kept, round(float(np.mean(shared))), total)
    assert pair.shared_by_chance == pytest.approx(2 * np.mean(shared) / sum(kept), rel=0.02)
    assert pair.kappa == pytest.approx(0, abs=0.02)


def test_opposite_masks_are_below_chance_and_whole_ones_agree() -> None:
    assert PairAgreement((50, 50), 0, 100).kappa == -1
    assert PairAgreement((100, 100), 100, 100).kappa == 1
    empty = PairAgreement((0, 0), 0, 100)
    assert (empty.kappa, empty.shared_fraction, empty.jaccard_kept, empty.jaccard_pruned) == (1, 1, 1, 1)


def test_weights_that_belong_to_no_site_are_not_counted() -> None:
    """A packed parameter of which only a part is pruned keeps the rest in every mask."""
    site = SITES[0]
    one, other = (torch.ones(3 * site.out_features, site.in_features, dtype=torch.bool) for _ in range(2))
    one[0, 0] = other[0, 1] = False
    found = agreement({name: {site.fqn: PackedMask.pack(item)} for name, item in (("a", one), ("b", other))}, [site])
    count = site.weight_count
    assert found.pairs[0][1] == PairAgreement((count - 1, count - 1), count - 2, count)
