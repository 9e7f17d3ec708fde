"""Every allocation with every pattern: counts are exact, masks are nested, and the weights that stay score best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mfcompile.errors import InputError
from mfcompile.masks import MaskSet
from mfcompile.passes.allocation import ALLOCATIONS
from mfcompile.passes.sparsity_patterns import parse_pattern
from tests.made_sites import MadeModel, made, subset

Shapes = dict[str, list[tuple[int, int]]]

FLAT = st.tuples(st.integers(1, 9), st.integers(1, 9))
TALL = st.tuples(st.integers(1, 40), st.integers(1, 5))
WIDE = st.tuples(st.integers(1, 5), st.integers(1, 40))
SHAPES = {"unstructured": FLAT, "1x4": WIDE, "4x1": TALL, "16x1": TALL}
SPARSITY = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.5, 0.63, 0.75, 0.9]))
CRITERIA = ("magnitude", "multiflow", "multiflow-inverted", "lamp", "wanda", "random")


def regions_of(shape: st.SearchStrategy[tuple[int, int]]) -> st.SearchStrategy[Shapes]:
    one = st.lists(shape, min_size=1, max_size=4)
    return st.fixed_dictionaries({"vision": one, "text": one}, optional={"fusion": one})


def select(model: MadeModel, **options: Any) -> MaskSet:
    """The masks, unless blocks cannot hold what is asked for, which is refused and no property of masks."""
    try:
        return model.select(**options)
    except InputError as error:
        if "whole ones. Ask for less" in str(error):
            assume(False)
        raise


def by_group(model: MadeModel, allocation: str, has_regions: bool) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for site in model.sites:
        groups.setdefault(site.region if has_regions or allocation.endswith("per-region") else "all", []).append(site.name)
    return groups


def assert_counts(model: MadeModel, masks: MaskSet, groups: Mapping[str, Sequence[str]], sparsity: Any, pattern: str) -> None:
    removed, unit = model.removed(masks), parse_pattern(pattern).unit_weights
    for group, names in groups.items():
        own = sparsity[group] if isinstance(sparsity, dict) else sparsity
        total = sum(removed[name].size for name in names)
        assert sum(int(removed[name].sum()) for name in names) == int(own * total) // unit * unit, group


@pytest.mark.parametrize("pattern", SHAPES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_counts_are_exact_and_masks_are_nested(allocation: str, pattern: str, data: st.DataObject) -> None:
    shapes = data.draw(regions_of(SHAPES[pattern]))
    model = made(shapes, data.draw(st.integers(0, 99)), has_ties=data.draw(st.booleans()))
    has_regions = data.draw(st.booleans()) and not allocation.endswith("-global")
    low, high = (dict(zip(shapes, data.draw(st.lists(SPARSITY, min_size=3, max_size=3)), strict=False)) for _ in range(2))
    if not has_regions:
        low, high = low["text"], high["text"]  # type: ignore[assignment]
    else:
        pairs = {region: sorted((low[region], high[region])) for region in shapes}
        low, high = ({region: pair[index] for region, pair in pairs.items()} for index in (0, 1))
    if not has_regions and low > high:  # type: ignore[operator]
        low, high = high, low
    options = {"allocation": allocation, "pattern": pattern, "criterion": data.draw(st.sampled_from(CRITERIA))}
    fewer, more = (select(model, sparsity=sparsity, **options) for sparsity in (low, high))
    groups = by_group(model, allocation, has_regions)
    assert_counts(model, fewer, groups, low, pattern)
    assert_counts(model, more, groups, high, pattern)
    assert subset(model.removed(fewer), model.removed(more))


@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "uniform-rows"])
@settings(deadline=None, max_examples=10, derandomize=True)
@given(shapes=regions_of(FLAT), sparsity=SPARSITY, seed=st.integers(0, 99), has_ties=st.booleans())
def test_the_smallest_go_and_ties_go_by_position(
    allocation: str, shapes: Shapes, sparsity: float, seed: int, has_ties: bool
) -> None:
    model = made(shapes, seed, has_ties=has_ties)
    removed = model.removed(model.select(sparsity=sparsity, criterion="magnitude", allocation=allocation))
    for site in model.sites:
        gone = removed[site.name].reshape(-1)
        order = np.argsort(np.abs(model.weight(site)).reshape(-1), kind="stable")
        assert gone[order[: gone.sum()]].all()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(shapes=regions_of(FLAT), sparsity=SPARSITY, seed=st.integers(0, 99), has_ties=st.booleans())
def test_one_threshold_over_all_layers_is_one_sort(shapes: Shapes, sparsity: float, seed: int, has_ties: bool) -> None:
    """Ties between layers too: those of the earlier layer go first."""
    model = made(shapes, seed, has_ties=has_ties)
    joined = np.concatenate([np.abs(model.weight(site)).reshape(-1) for site in model.sites])
    gone = np.zeros(joined.size, bool)
    gone[np.argsort(joined, kind="stable")[: int(sparsity * joined.size)]] = True
    for allocation in ("magnitude-global", "score-global"):
        removed = model.removed(model.select(sparsity=sparsity, criterion="magnitude", allocation=allocation))
        np.testing.assert_array_equal(np.concatenate([removed[site.name].reshape(-1) for site in model.sites]), gone)


@pytest.mark.parametrize("pattern", ["1x4", "4x1", "16x1"])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data(), sparsity=SPARSITY, seed=st.integers(0, 99))
def test_blocks_go_whole_and_what_fills_none_stays(pattern: str, data: st.DataObject, sparsity: float, seed: int) -> None:
    model, (rows, columns) = made(data.draw(regions_of(SHAPES[pattern])), seed), map(int, pattern.split("x"))
    masks = select(model, sparsity=sparsity, criterion="magnitude", allocation="magnitude-global", pattern=pattern)
    removed, sums = model.removed(masks), []
    for site in model.sites:
        gone, tall, wide = removed[site.name], site.out_features // rows, site.in_features // columns
        assert not gone[tall * rows :].any()
        assert not gone[:, wide * columns :].any()
        whole, grid = np.s_[: tall * rows, : wide * columns], (tall, rows, wide, columns)
        blocks = gone[whole].reshape(grid)
        assert (blocks.all((1, 3)) == blocks.any((1, 3))).all()
        scores = np.abs(model.weight(site)[whole]).reshape(grid).astype(np.float64).sum((1, 3))
        sums += list(zip(scores.reshape(-1), blocks.all((1, 3)).reshape(-1), strict=True))
    kept, lost = [s for s, gone in sums if not gone], [s for s, gone in sums if gone]
    assert max(lost, default=0) <= min(kept, default=np.inf) * (1 + 1e-6)
    left = [site for site in model.sites if site.out_features % rows or site.in_features % columns]
    assert {item.subject for item in masks.diagnostics} == {site.name for site in left}


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
@settings(deadline=None, max_examples=20, derandomize=True)
@given(shapes=regions_of(FLAT), seed=st.integers(0, 99), has_ties=st.booleans(), criterion=st.sampled_from(CRITERIA))
def test_n_of_m_holds_in_every_group_and_keeps_the_best(
    kept: int, of: int, shapes: Shapes, seed: int, has_ties: bool, criterion: str
) -> None:
    model = made(shapes, seed, has_ties=has_ties)
    masks = model.select(criterion=criterion, pattern=f"{kept}:{of}")
    assert masks.sparsity == 1 - kept / of
    for site in model.sites:
        gone, weight = model.removed(masks)[site.name], np.abs(model.weight(site))
        for row in range(site.out_features):
            for start in range(0, site.in_features, of):
                group = gone[row, start : start + of]
                expected = max(group.size - kept, 0)
                assert group.sum() == expected
                if criterion == "magnitude":
                    order = np.argsort(weight[row, start : start + of], kind="stable")
                    assert group[order[:expected]].all()


@pytest.mark.parametrize("rounding", ["exact", "official"])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(shapes=regions_of(FLAT), sparsity=SPARSITY, seed=st.integers(0, 99))
def test_rows_lose_the_same(rounding: str, shapes: Shapes, sparsity: float, seed: int) -> None:
    """Published, int(s n) of every row of n inputs; exact, so that the whole sums up, and rows differ by one at most."""
    model = made(shapes, seed)
    removed = model.removed(model.select(sparsity=sparsity, criterion="wanda", rounding=rounding))
    norms = {site.name: model.statistics.sites[site.name].input_norm().numpy() for site in model.sites}
    for site in model.sites:
        gone = removed[site.name]
        counts = gone.sum(1)
        if rounding == "official":
            assert (counts == int(site.in_features * sparsity)).all()
        else:
            assert counts.max() - counts.min() <= 1
            assert (np.diff(counts) <= 0).all(), "the first rows lose what does not divide"
        score = np.abs(model.weight(site)).astype(np.float64) * norms[site.name]
        for row in range(site.out_features):
            highest_lost = max(score[row][gone[row]], default=0)
            assert highest_lost <= min(score[row][~gone[row]], default=np.inf) * (1 + 1e-6)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(shapes=regions_of(FLAT), sparsity=SPARSITY)
def test_erk_densities_are_in_proportion_to_outputs_and_inputs(shapes: Shapes, sparsity: float) -> None:
    model = made(shapes)
    removed = model.removed(model.select(sparsity=sparsity, criterion="magnitude", allocation="erk"))
    sizes = np.array([site.weight_count for site in model.sites], dtype=np.float64)
    wanted = sizes.sum() - int(sparsity * sizes.sum())
    raw = np.array([site.out_features + site.in_features for site in model.sites], dtype=np.float64)
    full = np.zeros(len(sizes), bool)
    while True:  # RigL: layers that would be more than dense are dense, and the others share what is left
        factor = (wanted - sizes[full].sum()) / raw[~full].sum() if (~full).any() else 0.0
        over = ~full & (raw * factor > sizes)
        if not over.any():
            break
        full |= over
    ideal = np.where(full, sizes, np.minimum(raw * factor, sizes))
    found = np.array([(~removed[site.name]).sum() for site in model.sites])
    slack = 0.5 + len(sizes) / 2 * raw / raw[~full].sum() if (~full).any() else np.full(len(sizes), 0.5)
    assert (np.abs(found - ideal) <= slack + 1).all()
    assert found.sum() == wanted


@settings(deadline=None, max_examples=25, derandomize=True)
@given(shapes=regions_of(FLAT), sparsity=SPARSITY, seed=st.integers(0, 99))
def test_official_uniform_truncates_every_layer(shapes: Shapes, sparsity: float, seed: int) -> None:
    model = made(shapes, seed)
    options: dict[str, Any] = {"sparsity": sparsity, "criterion": "magnitude", "allocation": "uniform"}
    removed = model.removed(model.select(rounding="official", **options))
    assert all(gone.sum() == int(sparsity * gone.size) for gone in removed.values())


@pytest.mark.parametrize("criterion", ["magnitude", "l2", "wanda"])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(shapes=regions_of(FLAT), sparsity=SPARSITY, seed=st.integers(0, 99))
def test_official_thresholds_take_all_that_ties(criterion: str, shapes: Shapes, sparsity: float, seed: int) -> None:
    """score <= t goes, in every layer: at least as much as the exact count, and no tie is split."""
    model = made(shapes, seed, has_ties=True)
    options: dict[str, Any] = {"sparsity": sparsity, "criterion": criterion, "allocation": "score-global"}
    exact = model.removed(model.select(**options))
    official = model.removed(model.select(rounding="official", **options))
    assert subset(exact, official)
    for site in model.sites:
        gone, weight = official[site.name], np.abs(model.weight(site))
        if criterion == "magnitude":
            threshold = max(np.abs(model.weight(other))[exact[other.name]].max(initial=-1) for other in model.sites)
            np.testing.assert_array_equal(gone, weight <= threshold)
