"""int8 weights against the equations: scales, rounding, exact zeros, and what is stored of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfcompile.errors import ExportError
from mfcompile.exporters.quantization import (
    DENSE,
    GAP4,
    GAP8,
    LARGEST_INPUTS,
    decode_int8,
    encode_int8,
    plan_int8,
    quantize_rows,
)


def test_every_row_is_scaled_by_its_largest_and_rounded() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((7, 50)) * 10.0 ** rng.integers(-20, 20, (7, 1))).astype(np.float32)
    weight[3] = 0
    found = quantize_rows(weight)
    assert found.values.dtype == np.int8
    for row in range(7):
        largest = max(abs(float(value)) for value in weight[row])
        scale = largest / 127 or 1.0
        assert found.scales[row] == pytest.approx(scale, rel=1e-6)
        for column in range(50):
            quotient = float(weight[row, column]) / float(found.scales[row])
            assert abs(int(found.values[row, column]) - quotient) <= 0.5 + 1e-4
        assert abs(found.values[row].astype(int)).max() == (127 if largest else 0)
    np.testing.assert_array_equal(found.dequantized(), found.values * found.scales[:, None])


def test_zeros_stay_zeros_and_signs_are_alike() -> None:
    rng = np.random.default_rng(1)
    weight = np.where(rng.random((5, 40)) < 0.3, rng.standard_normal((5, 40)), 0).astype(np.float32)
    found = quantize_rows(weight)
    assert not found.values[weight == 0].any()
    np.testing.assert_array_equal(quantize_rows(-weight).values, -found.values)
    assert not quantize_rows(np.full((2, 3), 1e-45, np.float32)).values[:, 0].any()  # too small to divide by


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_quantization_is_refused(bad: float) -> None:
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = bad
    with pytest.raises(ExportError, match="layer: row 1 holds NaN or infinity"):
        quantize_rows(weight, "layer")
    with pytest.raises(ExportError, match=r"layer of shape \(4,\) cannot be int8"):
        quantize_rows(np.ones(4, np.float32), "layer")
    with pytest.raises(ExportError, match="66,311 inputs"):
        quantize_rows(np.zeros((1, LARGEST_INPUTS + 1), np.float32))


def test_as_many_inputs_as_are_allowed_cannot_overflow() -> None:
    assert LARGEST_INPUTS * 255 * 127 < 2**31 <= (LARGEST_INPUTS + 1) * 255 * 127


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    density=st.floats(0, 1),
    block=st.sampled_from([1, 4]),
    encoding=st.sampled_from([GAP8, GAP4]),
    seed=st.integers(0, 999),
)
def test_what_is_stored_is_read_back(rows: int, columns: int, density: float, block: int, encoding: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = columns * block
    mask = np.repeat(rng.random((rows, columns // block)) < density, block, axis=1)
    values = np.where(mask, rng.integers(-127, 128, mask.shape), 0).astype(np.int8)  # a kept weight may round to zero
    try:
        plan = plan_int8(mask, encodings=(encoding,), blocks=(block,))
    except ExportError:
        assert encoding == GAP4
        assert mask.size // block % 2
        return
    encoded = encode_int8(values, mask, plan)
    assert encoded.values.shape == (plan.entries, block)
    assert encoded.gaps.nbytes == plan.gap_bytes
    assert encoded.gaps.nbytes + encoded.values.nbytes + 4 * rows == plan.stored_bytes
    np.testing.assert_array_equal(decode_int8(encoded, plan), values)


def test_the_smallest_is_chosen() -> None:
    rng = np.random.default_rng(2)
    blocks = np.repeat(rng.random((64, 64)) < 0.25, 4, axis=1)
    single = rng.random((64, 256)) < 0.25
    assert (plan_int8(blocks).encoding, plan_int8(blocks).block) == (GAP4, 4)
    assert plan_int8(blocks).stored_bytes < 1.2 * blocks.sum() + 4 * 64
    assert (plan_int8(single).encoding, plan_int8(single).block) == (GAP4, 1)
    assert plan_int8(rng.random((64, 256)) < 0.02).encoding == GAP8
    assert plan_int8(rng.random((64, 256)) < 0.9).encoding == DENSE
    assert plan_int8(np.ones((3, 5), bool)).stored_bytes == 15 + 12
    with pytest.raises(ExportError, match="cannot be stored as int8-gap8 in blocks of 4"):
        plan_int8(np.ones((3, 5), bool), encodings=(GAP8,), blocks=(4,))
