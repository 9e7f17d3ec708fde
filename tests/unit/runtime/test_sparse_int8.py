"""SparseLinearInt8 against NumPy, to the last bit, for every instruction set and class of shapes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.int8_models import Ints, expected_int8, int8_model, quantized, random_int8
from tests.sparse_models import Floats, run, session_of

Refused = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument


def layer(rng: np.random.Generator, rows: int, columns: int, density: float, block: int = 1) -> tuple[Ints, Floats, Floats]:
    """Weight, scales and bias."""
    scales = rng.uniform(0.001, 0.1, rows).astype(np.float32)
    return random_int8(rng, rows, columns, density, block), scales, rng.standard_normal(rows).astype(np.float32)


def check(library: str | None, x: Floats, of: tuple[Ints, Floats, Floats], **options: Any) -> None:
    np.testing.assert_array_equal(run(session_of(int8_model(*of, **options), library), x), expected_int8(x, *of))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 9, 16, 17, 24, 25, 33, 100, 197])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 70), (33, 129), (64, 48), (600, 260)])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_shapes(forced_library: str, rows: int, columns: int, tokens: int, block: int, density: float) -> None:
    rng = np.random.default_rng(rows * 1000 + tokens)
    of = layer(rng, rows, columns, density, block)
    check(forced_library, rng.standard_normal((tokens, columns)).astype(np.float32), of)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("encoding", ["int8-gap8", "int8-gap4"])
def test_weights_of_extreme_structure(forced_library: str, tokens: int, encoding: str) -> None:
    rng = np.random.default_rng(5)
    full, scales, bias = layer(rng, 40, 88, 1)
    full[full == 0] = 1
    full[0, 0] = 0  # gap4 stores an even number of entries
    cases = {
        "nothing kept": np.zeros_like(full),
        "all kept": full,
        "one weight": full * (np.arange(3520) == 3519).reshape(40, 88),
        "empty rows": full * (np.arange(40)[:, None] % 3 == 1),
        "one row": full * (np.arange(40)[:, None] == 21),
        "one column": full * (np.arange(88) == 64),
        "far apart": full * (np.arange(3520) % 1100 == 7).reshape(40, 88),
    }
    x = rng.standard_normal((tokens, 88)).astype(np.float32)
    for weight in cases.values():
        for block in (1, 4):
            check(forced_library, x, (weight.astype(np.int8), scales, bias), encoding=encoding, block=block)


@pytest.mark.parametrize("tokens", [1, 2, 20, 70])
def test_the_largest_products_do_not_saturate(forced_library: str, tokens: int) -> None:
    """255 * 127, four times in a word and twice in 16 bits: what vpmaddubsw cuts off at 32,767."""
    rng = np.random.default_rng(6)
    weight = np.where(rng.random((32, 1024)) < 0.5, 127, -127).astype(np.int8)
    weight[0], weight[1] = 127, -127
    weight[2:20] *= rng.random((18, 1024)) < 0.2
    bias = np.zeros(32, np.float32)
    for signs in ([1], [-1], [-1, 1]):
        x = rng.choice(signs, (tokens, 1024)).astype(np.float32)
        assert set(np.unique(quantized(x)[0])) <= {0, 254, 255}
        check(forced_library, x, (weight, np.ones(32, np.float32), bias))


@pytest.mark.parametrize("tokens", [1, 20])
def test_activations_of_every_range(forced_library: str, tokens: int) -> None:
    """Positive, negative, nothing but zero, one far out, halves that round to even, and the least and largest of float32."""
    rng = np.random.default_rng(7)
    of = layer(rng, 20, 36, 0.5)
    noise = rng.standard_normal((tokens, 36)).astype(np.float32)
    far = noise.copy()
    far[0, 5] = 1e6
    halves = (np.arange(tokens * 36) % 511 * 0.5).astype(np.float32).reshape(tokens, 36)
    halves[0, 0] = 255  # a scale of 1, so that every half lies between two integers
    for x in (abs(noise) + 3, -abs(noise) - 3, 0 * noise, far, halves, noise * 1e-30, noise * 1e37, -0.0 * noise):
        check(forced_library, x.astype(np.float32), of)
    tiny = np.full((tokens, 36), 1e-45, np.float32)  # its scale is 0 in float32
    np.testing.assert_array_equal(run(session_of(int8_model(*of), forced_library), tiny), np.tile(of[2], (tokens, 1)))


@pytest.mark.parametrize("tokens", [1, 8, 50])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 18, 35])
def test_nan_and_infinity_make_every_output_nan(forced_library: str, tokens: int, bad: float, place: int) -> None:
    rng = np.random.default_rng(8)
    of = layer(rng, 20, 36, 0.5)
    x = rng.standard_normal((tokens, 36)).astype(np.float32)
    x[tokens // 2, place] = bad
    session = session_of(int8_model(*of), forced_library)
    assert np.isnan(run(session, x)).all()
    x[tokens // 2, place] = 1
    np.testing.assert_array_equal(run(session, x), expected_int8(x, *of))


def test_a_range_that_overflows_is_nan(forced_library: str) -> None:
    of = layer(np.random.default_rng(9), 3, 4, 1)
    x = np.array([[3e38, -3e38, 0, 0]], np.float32)
    assert np.isnan(run(session_of(int8_model(*of), forced_library), x)).all()


def test_any_rank_and_no_tokens(library: str) -> None:
    rng = np.random.default_rng(10)
    of = layer(rng, 12, 20, 0.5)
    for shape in [(20,), (3, 20), (2, 3, 20), (2, 1, 5, 20), (0, 20), (2, 0, 20)]:
        x = rng.standard_normal(shape).astype(np.float32)
        found = run(session_of(int8_model(*of, rank=len(shape)), library), x)
        assert found.shape == (*shape[:-1], 12)
        if x.size:
            np.testing.assert_array_equal(found, expected_int8(x, *of))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 80), columns=st.integers(1, 600), tokens=st.integers(1, 140), density=st.floats(0, 1),
    block=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 2**32 - 1), threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_fuzz(
    forced_library: str, rows: int, columns: int, tokens: int, density: float, block: int, seed: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    of = layer(rng, rows, columns, density, block)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    np.testing.assert_array_equal(run(session_of(int8_model(*of), forced_library, threads), x), expected_int8(x, *of))


def test_concurrent_runs_of_one_session(library: str) -> None:
    """Eight threads meet a session that has made no layout yet, with token counts that need different ones."""
    rng = np.random.default_rng(11)
    of = layer(rng, 200, 150, 0.1, 2)
    inputs = [rng.standard_normal((tokens, 150)).astype(np.float32) for tokens in (1, 40, 3, 97, 8, 16, 1, 64)]
    for _ in range(5):
        session = session_of(int8_model(*of), library, threads=2)
        with ThreadPoolExecutor(len(inputs)) as pool:
            for x, found in zip(inputs, pool.map(partial(run, session), inputs), strict=True):
                np.testing.assert_array_equal(found, expected_int8(x, *of))


DAMAGE: dict[str, tuple[dict[str, NDArray[Any]], dict[str, Any], str]] = {
    "truncated gaps": ({"gaps": np.ones(5, np.uint8)}, {}, "has 5 gaps and 6 values"),
    "truncated values": ({"values": np.ones((2, 4), np.int8)}, {}, "has 6 gaps and 2 values"),
    "behind the end": ({"gaps": np.full(6, 255, np.uint8)}, {}, "behind the last of 6"),
    "one place twice": ({"gaps": np.array([0, 1, 0, 1, 1, 1], np.uint8)}, {}, "two entries name one place"),
    "negative side": ({}, {"shape": [-3, -8]}, "given scales of shape"),
    "smaller shape": ({}, {"shape": [3, 4]}, "behind the last of 3"),
    "no whole blocks": ({}, {"shape": [3, 7]}, "7 inputs are no whole number of blocks of 4"),
    "three sides": ({}, {"shape": [3, 8, 1]}, "needs an attribute shape"),
    "gaps of rank 2": ({"gaps": np.ones((6, 1), np.uint8)}, {}, "needs gaps of type uint8 and rank 1"),
    "values of rank 1": ({"values": np.ones(24, np.int8)}, {}, "needs values of type int8 and rank 2"),
    "blocks of 3": ({"values": np.ones((6, 3), np.int8)}, {}, "must hold 1 or 4"),
    "fewer scales": ({"scales": np.ones(2, np.float32)}, {}, r"has 3 outputs and was given scales of shape \(2\)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_weight_is_refused(library: str, damage: str) -> None:
    replaced, attributes, message = DAMAGE[damage]
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    model = int8_model(
        np.ones((3, 8), np.int8), ones, zeros, encoding="int8-gap8", block=4, with_function=False, replaced=replaced,
        attributes=attributes,
    )  # fmt: skip
    with pytest.raises(Exception, match=message):
        session_of(model, library)


def test_inputs_that_do_not_fit_are_refused(library: str) -> None:
    of = layer(np.random.default_rng(12), 3, 4, 1)
    model = int8_model(*of, with_function=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "k"
    with pytest.raises(Refused, match=r"weight of shape \(3, 4\) and was given X of shape \(2, 5\)"):
        run(session_of(model, library), np.ones((2, 5), np.float32))
    short = int8_model(of[0], of[1], np.ones(2, np.float32), with_function=False)
    with pytest.raises(Refused, match=r"bias of shape \(2\)"):
        run(session_of(short, library), np.ones((2, 4), np.float32))


@pytest.mark.parametrize("encoding", ["int8-gap8", "int8-gap4"])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("tokens", [1, 30])
def test_both_worlds_compute_the_same_bits(library: str, encoding: str, block: int, tokens: int) -> None:
    rng = np.random.default_rng(13)
    of = layer(rng, 90, 72, 0.3, block)
    model = int8_model(*of, encoding=encoding, block=block)
    onnx.checker.check_model(model, full_check=True)
    x = rng.standard_normal((tokens, 72)).astype(np.float32)
    stock = run(session_of(model), x)
    np.testing.assert_array_equal(run(session_of(model, library), x), stock)
    assert np.abs(stock).max() > 1


def test_stock_onnxruntime_runs_one_fused_operator(tmp_path: Any) -> None:
    """The decode folds to a dense int8 weight, and what is left is what a dynamically quantized dense model runs."""
    of = layer(np.random.default_rng(14), 64, 64, 0.3, 4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(int8_model(*of).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["DynamicQuantizeMatMul"]
