"""What may be done to weights without changing what a criterion says of them: scaling, signs, order, storage, threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, SiteData
from mfcompile.passes.criteria.registry import pruner
from mfcompile.region import COLUMNS, ROWS, WeightLayout
from tests.made_sites import MadeModel

CRITERIA = ("magnitude", "multiflow", "multiflow-inverted", "lamp", "l2", "wanda", "random")
SHAPES = ((12, 8), (8, 12), (16, 16), (7, 10), (5, 3))
SPARSITY = st.sampled_from([0.1, 0.5, 0.63, 0.75, 0.9, 0.97])

Change = Callable[[int, Tensor], Tensor]


def model_of(seed: int, change: Change = lambda index, weight: weight) -> MadeModel:
    generator = torch.Generator().manual_seed(seed)
    model = MadeModel()
    for index, shape in enumerate(SHAPES):
        weight = torch.randn(shape, generator=generator) * (0.5 + torch.rand(1, generator=generator))
        model.add(f"w{index}", change(index, weight), ("vision", "text")[index % 2])
    return model


def removed(model: MadeModel, **options: Any) -> dict[str, NDArray[np.bool_]]:
    return model.removed(model.select(**options))


def same(one: dict[str, NDArray[np.bool_]], other: dict[str, NDArray[np.bool_]]) -> bool:
    return all((one[name] == other[name]).all() for name in one)


# --- scaling ---


@pytest.mark.parametrize("criterion", ["lamp", "l2"])
@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(0, 99), SPARSITY, st.lists(st.integers(-70, 70), min_size=5, max_size=5))
def test_the_scale_of_a_layer_does_not_matter(criterion: str, seed: int, sparsity: float, powers: list[int]) -> None:
    """Powers of two, so that nothing rounds; their squares alone would leave the range of float32."""
    plain = removed(model_of(seed), criterion=criterion, sparsity=sparsity)
    scaled = model_of(seed, lambda index, weight: weight * 2.0 ** powers[index])
    assert same(removed(scaled, criterion=criterion, sparsity=sparsity), plain)


@pytest.mark.parametrize("allocation", ["magnitude-per-region", "score-global", "uniform"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_the_scale_of_the_model_and_signs_do_not_matter(criterion: str, allocation: str) -> None:
    options = {"criterion": criterion, "allocation": allocation, "sparsity": 0.63}
    plain = removed(model_of(1), **options)
    assert same(removed(model_of(1, lambda index, weight: weight * 2.0**-20), **options), plain)
    assert same(removed(model_of(1, lambda index, weight: -weight), **options), plain)


@pytest.mark.parametrize("criterion", ["multiflow", "wanda"])
def test_the_scale_of_an_input_does_not_matter_inside_a_layer(criterion: str) -> None:
    model = model_of(2)
    plain = removed(model, criterion=criterion, sparsity=0.63)
    for index, site in enumerate(model.sites):
        seen = model.statistics.sites[site.name]
        model._statistics[site.name] = replace(seen, sum_of_squares=seen.sum_of_squares * 4.0**index)
    assert same(removed(model, criterion=criterion, sparsity=0.63), plain)


def test_the_scale_of_a_layer_matters_to_magnitudes() -> None:
    scaled = model_of(1, lambda index, weight: weight * 2.0**index)
    assert not same(*(removed(model, criterion="magnitude", sparsity=0.63) for model in (scaled, model_of(1))))


# --- order ---


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(0, 99), SPARSITY)
def test_masks_follow_the_order_of_outputs_and_inputs(criterion: str, seed: int, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    orders = [tuple(torch.randperm(size, generator=generator) for size in shape) for shape in SHAPES]
    model = model_of(seed)
    moved = model_of(seed, lambda index, weight: weight[orders[index][0]][:, orders[index][1]])
    for site, (_, inputs) in zip(model.sites, orders, strict=True):
        seen = model.statistics.sites[site.name]
        moved._statistics[site.name] = replace(seen, sum_of_squares=seen.sum_of_squares[inputs])
    # An allocation that does not favour the first rows.
    options = {"criterion": criterion, "sparsity": sparsity, "allocation": "magnitude-per-region"}
    plain, found = removed(model, **options), removed(moved, **options)
    for name, (outputs, inputs) in zip(plain, orders, strict=True):
        np.testing.assert_array_equal(found[name], plain[name][outputs.numpy()][:, inputs.numpy()])


# --- storage ---


def stored(weight: Tensor, layout: WeightLayout, shape: tuple[int, ...]) -> Tensor:
    return layout.stored(weight.unsqueeze(0), shape).contiguous()


PATCHES = WeightLayout(outputs=(0,), inputs=(1, 2, 3))
EXPERTS, TURNED_EXPERTS = WeightLayout((1,), (2,), (0,)), WeightLayout((2,), (1,), (0,))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_storage_does_not_matter(criterion: str, pattern: str) -> None:
    """Plain, transposed, patches of a convolution, experts, ranges of rows: 2:4 runs along inputs, blocks along outputs."""
    generator = torch.Generator().manual_seed(3)
    first, second, third = (torch.randn(8, 12, generator=generator) for _ in range(3))
    plain = MadeModel()
    for name, weight in {"a": first, "b": second, "c": third}.items():
        plain.add(name, weight)
    options: dict[str, Any] = {"criterion": criterion, "pattern": pattern}
    if pattern != "2:4":
        options["sparsity"] = 0.5
    expected = list(removed(plain, **options).values())

    ways: dict[str, MadeModel] = {name: MadeModel() for name in ("turned", "patches", "experts", "turned experts", "rows")}
    for name, weight in {"a": first, "b": second, "c": third}.items():
        ways["turned"].add(name, weight.T.contiguous(), layout=COLUMNS)
        ways["patches"].add(name, stored(weight, PATCHES, (8, 3, 2, 2)), layout=PATCHES)
    stack = torch.stack([first, second, third])
    ways["experts"].add("e", stack, layout=EXPERTS)
    ways["turned experts"].add("e", stack.mT.contiguous(), layout=TURNED_EXPERTS)
    ways["rows"].add("r", torch.cat([first, second, third]), layout=ROWS, rows=[(0, 8), (8, 16), (16, 24)])
    for way, model in ways.items():
        found = list(removed(model, **options).values())
        for mask, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mask, wanted, err_msg=way)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_may_be_of_any_float_type(criterion: str, dtype: torch.dtype, pattern: str) -> None:
    """They are ranked as the float32 numbers that they are."""
    given_as = model_of(4, lambda index, weight: weight.bfloat16().to(dtype))
    as_float = model_of(4, lambda index, weight: weight.bfloat16().float())
    options: dict[str, Any] = {"criterion": criterion, "pattern": pattern}
    assert same(removed(given_as, **options), removed(as_float, **options))


# --- threads ---


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("name", ["lamp", "l2", "wanda", "multiflow", "random", "magnitude"])
def test_scores_do_not_depend_on_threads_or_storage(name: str, is_turned: bool) -> None:
    weight = torch.randn(300, 700, generator=torch.Generator().manual_seed(5))
    norm = torch.rand(700, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    data = SiteData("w", "text", weight.T.contiguous().T if is_turned else weight, norm, 9, 3)
    criterion = pruner(name)
    assert isinstance(criterion, Criterion)
    threads, scores = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            criterion.begin([data], 0)
            scores.append(criterion.score(data if count > 1 else replace(data, weight=weight)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(scores[0], other) for other in scores[1:])


# --- what LAMP promises ---


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(0, 99), st.integers(5, 40))
def test_lamp_lets_no_layer_collapse(seed: int, kept: int) -> None:
    """The largest weight of a layer scores about one, all others a half at most: nothing else is kept before them."""
    model = model_of(seed, lambda index, weight: weight * 10.0**index)
    total = sum(site.weight_count for site in model.sites)
    found = removed(model, criterion="lamp", sparsity=1 - (kept - 0.5) / total)
    assert sum((~gone).sum() for gone in found.values()) == kept
    for site in model.sites:
        assert not found[site.name].reshape(-1)[np.abs(model.weight(site)).argmax()]


def test_lamp_scores_equal_weights_in_their_order() -> None:
    criterion = pruner("lamp")
    assert isinstance(criterion, Criterion)
    score = criterion.score(SiteData("w", "text", torch.tensor([[1.0, -1.0], [1.0, 2.0]])))
    torch.testing.assert_close(score, torch.tensor([[1 / 7, 1 / 6], [1 / 5, 1.0]]))


@pytest.mark.parametrize("name", ["lamp", "l2"])
@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38])
def test_weights_at_the_ends_of_float32_have_finite_scores(name: str, value: float) -> None:
    criterion = pruner(name)
    assert isinstance(criterion, Criterion)
    score = criterion.score(SiteData("w", "text", torch.full((3, 2), value)))
    assert bool(torch.isfinite(score).all())
    assert bool((score > 0).all()) == (value > 0)
