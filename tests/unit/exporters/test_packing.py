from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfcompile.errors import ExportError, InputError
from mfcompile.exporters.packing import (
    ENCODINGS,
    EncodingPlan,
    choose_encoding,
    choose_encodings,
    decode,
    encode,
    entry_count,
    possible_encodings,
)


def plan_encoding(mask: np.ndarray, values: str = "fp32", allowed: tuple[str, ...] = ENCODINGS) -> EncodingPlan:
    return choose_encoding(possible_encodings(mask, np.float32, values, allowed=allowed))


SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 65504.0, 3.4e38, 1.5], np.float32)


def weight_of(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(count).astype(np.float32)
    odd = rng.random(count) < 0.2
    weight[odd] = rng.choice(SPECIAL, odd.sum())
    return weight


def masked(weight: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, weight, np.zeros((), weight.dtype))


def edge_masks() -> Iterator[tuple[str, np.ndarray]]:
    yield "keep all", np.ones((3, 5), bool)
    yield "keep none", np.zeros((4, 300), bool)
    yield "one element, kept", np.ones((1,), bool)
    yield "one element, pruned", np.zeros((1,), bool)
    for gap in (15, 16, 17, 30, 31, 254, 255, 256, 257, 510, 511, 512, 5000):
        mask = np.zeros(2 * gap + 3, bool)
        mask[[gap, 2 * gap]] = True
        yield f"gaps of {gap}", mask
    rows = np.random.default_rng(1).random((6, 400)) < 0.4
    rows[[0, 3, 5]] = False
    yield "rows that are all zero", rows
    yield "rank 4", np.random.default_rng(2).random((4, 3, 3, 3)) < 0.5
    yield "empty", np.zeros((0, 7), bool)
    yield "last place only", np.eye(1, 1000, 999, dtype=bool)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("_name", "mask"), list(edge_masks()), ids=lambda value: value if isinstance(value, str) else "")
def test_round_trip_is_bit_identical_at_the_edges(encoding: str, _name: str, mask: np.ndarray) -> None:
    weight = weight_of(mask.size).reshape(mask.shape)
    if encoding == "gap4" and mask.size and entry_count(mask, "gap4") % 2:
        with pytest.raises(ExportError, match="even number"):
            encode(weight, mask, "fp32", encoding="gap4")
        return
    encoded = encode(weight, mask, "fp32", encoding=encoding)
    decoded = decode(encoded)
    assert decoded.shape == mask.shape
    assert decoded.tobytes() == masked(weight, mask).tobytes()
    assert encoded.values.size == entry_count(mask, encoding)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 3000),
    density=st.sampled_from([0.0, 0.002, 0.02, 0.1, 0.37, 0.8, 0.99]),
    seed=st.integers(0, 2**20),
    encoding=st.sampled_from(ENCODINGS),
)
def test_round_trip_is_bit_identical(count: int, density: float, seed: int, encoding: str) -> None:
    weight = weight_of(count, seed)
    mask = np.random.default_rng(seed + 1).random(count) < density
    if encoding == "gap4" and entry_count(mask, "gap4") % 2:
        return
    before = weight.tobytes()
    encoded = encode(weight, mask, "fp32", encoding=encoding)
    assert decode(encoded).tobytes() == masked(weight, mask).tobytes()
    assert encoded.values.size == entry_count(mask, encoding)
    assert weight.tobytes() == before


def test_pruned_places_are_positive_zero_even_where_the_weight_is_nan_or_negative() -> None:
    weight = np.array([-1.0, np.nan, -0.0, np.inf, 2.0, -3.0], np.float32)
    mask = np.array([0, 0, 0, 0, 1, 1], bool)
    for encoding in ENCODINGS:
        decoded = decode(encode(weight, mask, "fp32", encoding=encoding))
        assert decoded[:4].tobytes() == bytes(16)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_dtypes_keep_their_bits(dtype: type) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((20, 30)) < 0.3
    weight: np.ndarray = rng.standard_normal(mask.shape).astype(dtype)
    for encoding in ENCODINGS:
        if encoding == "gap4" and entry_count(mask, "gap4") % 2:
            continue
        decoded = decode(encode(weight, mask, "fp32", encoding=encoding))
        assert decoded.dtype == weight.dtype
        assert decoded.tobytes() == masked(weight, mask).tobytes()


def test_fp16_rounds_kept_values_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    weight, mask = rng.standard_normal((50, 40)).astype(np.float32), rng.random((50, 40)) < 0.37
    for encoding in ("dense", "gap8"):
        encoded = encode(weight, mask, "fp16", encoding=encoding)
        assert encoded.values.dtype == np.float16
        decoded = decode(encoded)
        assert decoded.dtype == np.float32
        assert decoded.tobytes() == masked(weight, mask).astype(np.float16).astype(np.float32).tobytes()


@pytest.mark.parametrize("bad", [65505.0, -1e30, np.nan, np.inf])
def test_fp16_refuses_a_kept_value_that_does_not_fit_and_names_the_weight(bad: float) -> None:
    weight = np.ones(10, np.float32)
    weight[3] = bad
    mask = np.ones(10, bool)
    with pytest.raises(ExportError, match=r"tower\.proj\.weight.*1 kept weights do not fit fp16.*values='fp32'"):
        encode(weight, mask, "fp16", encoding="gap8", name="tower.proj.weight")
    mask[3] = False
    assert decode(encode(weight, mask, "fp16", encoding="gap8"))[3] == 0


def test_arguments_are_checked() -> None:
    weight, mask = np.ones(4, np.float32), np.ones(4, bool)
    with pytest.raises(InputError, match=r"mask of w has shape \(3,\)"):
        encode(weight, mask[:3], "fp32", encoding="gap8", name="w")
    with pytest.raises(InputError, match="encoding 'zip'"):
        encode(weight, mask, "fp32", encoding="zip")
    with pytest.raises(InputError, match="values='int8'"):
        encode(weight, mask, "int8", encoding="gap8")


@pytest.mark.parametrize(
    ("density", "expected", "ratio"),
    [(1.0, "dense", 1.0), (0.9, "mask", 0.931), (0.5, "mask", 0.531), (0.37, "gap4", 0.4175), (0.25, "gap4", 0.287),
     (0.1, "gap8", 0.1255), (0.37, "mask fp16", 0.216), (0.1, "gap8 fp16", 0.0752)],
)  # fmt: skip
def test_the_plan_is_within_five_percent_of_the_smallest_and_its_size_is_exact(
    density: float, expected: str, ratio: float
) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((256, 1024)) < density
    expected, _, values = expected.partition(" ")
    values = values or "fp32"
    plan = plan_encoding(mask, values)
    encoded = encode(np.ones(mask.shape, np.float32), mask, values, encoding=plan.encoding)
    assert plan.encoding == expected
    assert plan.stored_bytes == encoded.stored_bytes
    assert plan.kept_count == mask.sum()
    assert plan.stored_bytes / (4 * mask.size) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("allowed", [("dense", "gap8"), ENCODINGS])
def test_uneven_layers_take_at_most_047_at_63_percent(allowed: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    sparsities = [0.2, 0.3, 0.5, 0.95, 0.95, 0.88]
    assert sum(sparsities) / len(sparsities) == pytest.approx(0.63)
    masks = [rng.random((300, 1000)) < 1 - sparsity for sparsity in sparsities]
    plans = [plan_encoding(mask, "fp32", allowed=allowed) for mask in masks]
    assert sum(plan.stored_bytes for plan in plans) <= 0.47 * 4 * 300_000 * len(plans)


def test_structured_masks_cost_little_more_than_random_ones() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[:370] = True  # whole rows: the worst case is one long gap
    assert plan_encoding(mask, "fp32").stored_bytes <= 0.47 * 4 * mask.size


def test_a_weight_that_onnxruntime_would_not_fold_stays_dense() -> None:
    mask = np.broadcast_to(np.zeros((), bool), (1 << 28) + 1)
    assert plan_encoding(mask, "fp32", allowed=("dense",)).stored_bytes == 4 * mask.size
    assert plan_encoding(mask, "fp32").encoding == "dense"


def test_folded_bytes_is_the_formula_of_its_docstring() -> None:
    mask = np.random.default_rng(0).random((100, 100)) < 0.1
    plan = plan_encoding(mask, "fp32")
    assert plan.encoding == "gap8"
    assert plan.folded_bytes == 8 * plan.entries + 12 * mask.size
    assert math.isclose(plan.folded_bytes / mask.size, 8 * 0.1 + 12, rel_tol=0.02)


@settings(max_examples=60, deadline=None)
@given(density=st.floats(0, 1), seed=st.integers(0, 2**20), values=st.sampled_from(["fp32", "fp16"]))
def test_every_weight_is_within_five_percent_of_its_kept_values_and_a_bit_for_each_place(
    density: float, seed: int, values: str
) -> None:
    mask = np.random.default_rng(seed).random((64, 512)) < density
    plan = plan_encoding(mask, values)
    width = plan.values_dtype.itemsize
    assert plan.stored_bytes <= 1.05 * (np.count_nonzero(mask) * width + mask.size / 8 + width)


def test_a_mask_is_one_bit_for_each_place_lowest_first_and_the_values_end_in_a_zero() -> None:
    weight = np.array([[1, -0.0, 3, 4], [5, np.nan, 7, 8], [9, 10, 11, 12]], np.float32)
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], bool)
    encoded = encode(weight, mask, "fp32", encoding="mask")
    assert encoded.gaps is not None
    assert encoded.gaps.tolist() == [0b00100011, 0b00001000]
    assert encoded.values.tobytes() == np.array([1, -0.0, np.nan, 12, 0], np.float32).tobytes()


@pytest.mark.parametrize(
    ("encoding", "change", "message"),
    [
        ("gap8", lambda gaps, values: (gaps[:-1], values), "99 gaps for 100 values"),
        ("gap8", lambda gaps, values: (np.full_like(gaps, 200), values), r"the last value is at place 20000 of 400"),
        ("mask", lambda gaps, values: (gaps[:-1], values), "49 bytes of mask for 400 places"),
        ("mask", lambda gaps, values: (np.zeros_like(gaps), values), "0 kept places for 100 values"),
        ("mask", lambda gaps, values: (gaps, values[:-1]), "100 kept places for 99 values"),
        ("dense", lambda gaps, values: (gaps, values.reshape(-1)[1:]), "399 values for 400 places"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(encoding: str, change: Any, message: str) -> None:
    mask = np.zeros(400, bool)
    mask[::4] = True
    encoded = encode(np.ones((20, 20), np.float32), mask.reshape(20, 20), "fp32", encoding=encoding)
    gaps, values = change(encoded.gaps, encoded.values)
    with pytest.raises(InputError, match=rf"w \(20, 20\) cannot be decoded as {encoding}: {message}"):
        decode(dataclasses.replace(encoded, name="w", gaps=gaps, values=values))


def load_bytes(plan: EncodingPlan) -> int:
    return plan.stored_bytes + plan.folded_bytes


@settings(max_examples=40, deadline=None)
@given(
    densities=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    budget=st.floats(0, 8),
    values=st.sampled_from(["fp32", "fp16"]),
)
def test_encodings_stay_under_the_budget_and_cost_no_more_than_they_must(
    densities: list[float], budget: float, values: str
) -> None:
    rng = np.random.default_rng(len(densities))
    masks = {str(index): rng.random((16, 64)) < density for index, density in enumerate(densities)}
    possible = {name: possible_encodings(mask, np.float32, values) for name, mask in masks.items()}
    limit = budget * 4 * 1024 * len(masks)
    chosen = choose_encodings(possible, load_bytes, limit)
    least = sum(min(load_bytes(plan) for plan in plans) for plans in possible.values())
    total = sum(map(load_bytes, chosen.values()))
    assert total <= max(limit, least)
    assert chosen == choose_encodings(possible, load_bytes, limit)
    free = {name: choose_encoding(plans) for name, plans in possible.items()}
    if sum(map(load_bytes, free.values())) <= limit:
        assert chosen == free
        return
    # Of all choices that take no more memory, none stores less.
    choices = itertools.product(*(
        [plan for plan in plans if load_bytes(plan) <= load_bytes(free[name])] for name, plans in possible.items()
    ))  # fmt: skip
    stored = [sum(plan.stored_bytes for plan in choice) for choice in choices if sum(map(load_bytes, choice)) <= total]
    assert sum(plan.stored_bytes for plan in chosen.values()) <= min(stored)
