"""Allocation: counts that sum to the request, Eq. 7, and the published truncation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes.allocation import allocate_by_magnitude, check_sparsity
from mfcompile.region import ROWS, PruneSite

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6))
GROUPS = st.lists(st.lists(SHAPES, min_size=1, max_size=4), min_size=1, max_size=3)
SPARSITIES = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.5, 0.63, 0.75, 0.9]))


def site(name: str, shape: tuple[int, int]) -> PruneSite:
    return PruneSite(name, name, (0, shape[0]), shape[0], shape[1], ROWS, "text")


class Weights:
    """Groups of sites with weights; ``__call__`` is the allocation's ``weight_of``."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, list[PruneSite]] = {}
        for g, tensors in enumerate(groups):
            for index, tensor in enumerate(tensors):
                name = f"g{g}.w{index}"
                self.tensors[name] = tensor
                self.groups.setdefault(f"g{g}", []).append(site(name, (tensor.shape[0], tensor.shape[1])))

    def __call__(self, wanted: PruneSite) -> Tensor:
        return self.tensors[wanted.name]

    def magnitudes(self, group: str) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        return [self.tensors[item.name].abs().numpy() for item in self.groups[group]]


def drawn(shapes: Sequence[Sequence[tuple[int, int]]], seed: int, has_ties: bool) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape: tuple[int, int]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * 2).round() / 2 if has_ties else values

    return Weights([[tensor(shape) for shape in group] for group in shapes])


@settings(deadline=None, max_examples=60)
@given(GROUPS, SPARSITIES, st.integers(0, 99), st.booleans())
def test_every_group_loses_exactly_its_share(
    shapes: list[list[tuple[int, int]]], sparsity: float, seed: int, has_ties: bool
) -> None:
    weights = drawn(shapes, seed, has_ties)
    budget = allocate_by_magnitude(weights.groups, weights, sparsity)
    assert set(budget.pruned) == set(weights.tensors)
    for group, sites in weights.groups.items():
        total = sum(item.weight_count for item in sites)
        assert sum(budget.pruned[item.name] for item in sites) == int(sparsity * total)
        assert all(0 <= budget.pruned[item.name] <= item.weight_count for item in sites)
        order = np.argsort(np.concatenate([m.reshape(-1) for m in weights.magnitudes(group)]), kind="stable")
        edges = np.cumsum([0, *(item.weight_count for item in sites)])
        chosen = order[: int(sparsity * total)]
        for item, start, stop in zip(sites, edges[:-1], edges[1:], strict=True):
            assert budget.pruned[item.name] == ((chosen >= start) & (chosen < stop)).sum()


def published(weights: Weights, group: str, sparsity: float) -> dict[str, int]:
    """The arithmetic of the published code: threshold, then int(f * n) of a rounded quotient."""
    magnitudes = weights.magnitudes(group)
    flat = np.sort(np.concatenate([item.reshape(-1) for item in magnitudes]))
    k = int(len(flat) * sparsity)
    found: dict[str, int] = {}
    for item, magnitude in zip(weights.groups[group], magnitudes, strict=True):
        fraction = 1 - np.float64((magnitude > flat[k - 1]).sum()) / magnitude.size if k else 0.0
        found[item.name] = int(fraction * magnitude.size)
    return found


@settings(deadline=None, max_examples=60)
@given(GROUPS, SPARSITIES, st.integers(0, 99), st.booleans())
def test_official_rounding_is_the_published_arithmetic(
    shapes: list[list[tuple[int, int]]], sparsity: float, seed: int, has_ties: bool
) -> None:
    weights = drawn(shapes, seed, has_ties)
    budget = allocate_by_magnitude(weights.groups, weights, sparsity, "official")
    for group in weights.groups:
        expected = published(weights, group, sparsity)
        assert {name: budget.pruned[name] for name in expected} == expected


def test_truncation_loses_a_weight_where_the_quotient_rounds_down() -> None:
    """(1 - 46/49) * 49 is 2.999999999999998 in float64."""
    weights = Weights([[torch.arange(1.0, 50.0).reshape(7, 7)]])
    exact = allocate_by_magnitude(weights.groups, weights, 3.5 / 49)
    official = allocate_by_magnitude(weights.groups, weights, 3.5 / 49, "official")
    assert (exact.pruned["g0.w0"], official.pruned["g0.w0"]) == (3, 2)


def test_layers_lose_what_their_magnitudes_earn() -> None:
    weights = Weights([[torch.full((2, 2), 0.1), torch.full((2, 4), 5.0)], [torch.full((3, 2), 9.0)]])
    budget = allocate_by_magnitude(weights.groups, weights, 0.5)
    assert budget.pruned == {"g0.w0": 4, "g0.w1": 2, "g1.w0": 3}
    assert budget.thresholds == {"g0": 5.0, "g1": 9.0}


def test_official_rounding_removes_all_ties() -> None:
    weights = Weights([[torch.full((2, 2), 0.1), torch.full((2, 4), 5.0)]])
    assert allocate_by_magnitude(weights.groups, weights, 0.5, "official").pruned == {"g0.w0": 4, "g0.w1": 8}


@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_less_than_one_weight_is_none(rounding: str) -> None:
    weights = Weights([[torch.ones(3, 3)]])
    budget = allocate_by_magnitude(weights.groups, weights, 0.1, rounding)
    assert (budget.pruned, budget.thresholds) == ({"g0.w0": 0}, {})


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_broken_weight_is_refused_by_name_at_any_sparsity(sparsity: float) -> None:
    weights = Weights([[torch.ones(2, 2)], [torch.tensor([[1.0, float("nan")]])]])
    with pytest.raises(InputError, match=r"g1\.w0 holds 1 NaN or infinite values"):
        allocate_by_magnitude(weights.groups, weights, sparsity)


@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_a_layer_without_weights_loses_none(rounding: str) -> None:
    weights = Weights([[torch.ones(0, 3), torch.arange(1.0, 9.0).reshape(2, 4)]])
    assert allocate_by_magnitude(weights.groups, weights, 0.5, rounding).pruned == {"g0.w0": 0, "g0.w1": 4}


def test_an_unknown_rounding_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="rounding='bankers' is unknown; choose one of exact, official"):
        allocate_by_magnitude({}, Weights([]), 0.5, "bankers")


@pytest.mark.parametrize(("given_value", "hint"), [(63, "0.63"), (63.0, "0.63"), (7.5, "0.075"), (99, "0.99")])
def test_a_percentage_gets_a_hint(given_value: float, hint: str) -> None:
    with pytest.raises(InputError, match=rf"in \[0, 1\).*got {given_value:g}; did you mean {hint}\?"):
        check_sparsity(given_value)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 100, float("nan"), float("inf")])
def test_a_sparsity_outside_of_the_range_is_refused_without_a_hint(value: float) -> None:
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\)") as caught:
        check_sparsity(value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("value", [True, "0.63", None, [0.5]])
def test_a_sparsity_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="sparsity must be a number"):
        check_sparsity(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 0.0, 0.63, 0.999999, np.float32(0.5), np.float64(0.63)])
def test_a_good_sparsity_comes_back_as_a_float(value: float) -> None:
    found = check_sparsity(value)
    assert type(found) is float
    assert found == value


def test_weights_are_read_one_site_at_a_time() -> None:
    """Nothing joins the weights: ``weight_of`` may load them when they are needed."""
    weights = drawn([[(4, 4), (4, 4), (4, 4)]], 0, False)
    alive: list[int] = []

    class Lent(torch.Tensor):
        def __del__(self) -> None:
            alive.append(-1)

    def lend(wanted: PruneSite) -> Tensor:
        alive.append(1)
        assert sum(alive) <= 2, "an earlier weight is still held"
        return weights(wanted).clone().as_subclass(Lent)

    expected: Mapping[str, int] = allocate_by_magnitude(weights.groups, weights, 0.5).pruned
    assert allocate_by_magnitude(weights.groups, lend, 0.5).pruned == expected
