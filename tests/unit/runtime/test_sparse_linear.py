"""SparseLinear against NumPy, for every instruction set and class of shapes."""

from __future__ import annotations

import math
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mfcompile.exporters.sparse_linear import ACTIVATIONS
from tests.sparse_models import Floats, random_weight, run, session_of, sparse_model

Refused = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument
RTOL = 1e-6
"""Of the sum of the magnitudes of an output's products: float32 sums in another order."""


def expected(x: Floats, weight: Floats, bias: Floats | None = None) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        product = x.astype(np.float64) @ weight.T.astype(np.float64)
        return product if bias is None else product + bias


def check(found: Floats, x: Floats, weight: Floats, bias: Floats | None = None) -> None:
    wanted = expected(x, weight, bias)
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_array_equal(found[~finite], wanted[~finite])
    size = expected(np.abs(x), np.abs(weight), None if bias is None else np.abs(bias)) + 1
    assert (np.abs(found[finite] - wanted[finite]) <= RTOL * size[finite]).all()


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 15, 16, 17, 33, 100, 197])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 70), (33, 129), (64, 48), (600, 65)])
@pytest.mark.parametrize("block_rows", [1, 4, 16])
def test_shapes(forced_library: str, rows: int, columns: int, tokens: int, block_rows: int) -> None:
    rng = np.random.default_rng(rows * 1000 + tokens)
    weight = random_weight(rng, rows, columns, 0.37, block_rows)
    bias = rng.standard_normal(rows).astype(np.float32)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    check(run(session_of(sparse_model(weight, bias), forced_library), x), x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 40])
def test_weights_of_extreme_structure(forced_library: str, tokens: int) -> None:
    rng = np.random.default_rng(5)
    full = rng.standard_normal((40, 90)).astype(np.float32)
    cases = {
        "nothing kept": np.zeros_like(full),
        "all kept": full,
        "one weight": full * (np.arange(3600) == 3599).reshape(40, 90),
    }
    cases["empty rows"] = full * (np.arange(40)[:, None] % 3 == 1)
    cases["one row"] = full * (np.arange(40)[:, None] == 21)
    cases["one column"] = full * (np.arange(90) == 64)
    cases["far apart"] = full * (np.arange(3600) % 700 == 0).reshape(40, 90)
    x = rng.standard_normal((tokens, 90)).astype(np.float32)
    for weight in cases.values():
        check(run(session_of(sparse_model(weight), forced_library), x), x, weight)


@pytest.mark.parametrize("encoding", ["gap8", "gap4", "mask"])
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_encodings_and_value_types(forced_library: str, encoding: str, values: str) -> None:
    rng = np.random.default_rng(6)
    weight = random_weight(rng, 50, 60, 0.2)
    weight[0, :4] = (6e-8, -6e-5, 65504, 1)  # denormal, least normal, largest
    x = rng.standard_normal((20, 60)).astype(np.float32)
    stored = weight.astype(np.float16).astype(np.float32) if values == "fp16" else weight
    check(run(session_of(sparse_model(weight, encoding=encoding, values=values), forced_library), x), x, stored)


def activate(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
    erf = np.array([math.erf(value / 2**0.5) for value in x.ravel()]).reshape(x.shape)
    curve = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    formulas: dict[str, NDArray[np.float64]] = {
        "": x, "relu": np.maximum(x, 0), "gelu": x * (1 + erf) / 2, "gelu_tanh": x * (1 + np.tanh(curve)) / 2,
        "quick_gelu": x / (1 + np.exp(-1.702 * x)), "silu": x / (1 + np.exp(-x)),
    }  # fmt: skip
    return formulas[name]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block_rows", [1, 4, 16])
def test_activations(forced_library: str, activation: str, block_rows: int) -> None:
    """In the kernels, and in the function that stands in for them."""
    rng = np.random.default_rng(16)
    weight, bias = random_weight(rng, 50, 60, 0.4, block_rows), rng.standard_normal(50).astype(np.float32)
    encoding = {1: "gap8", 4: "gap4", 16: "mask"}[block_rows]
    model = sparse_model(weight, bias, encoding=encoding, activation=activation)
    sessions = session_of(model, forced_library), session_of(model)
    for tokens in (1, 7, 40):
        x = (3 * rng.standard_normal((tokens, 60))).astype(np.float32)
        sums = expected(x, weight, bias)
        limit = 2 * RTOL * (expected(np.abs(x), np.abs(weight), np.abs(bias)) + 1)  # no activation is steeper than 1.13
        for session in sessions:
            assert (np.abs(run(session, x) - activate(activation, sums)) <= limit).all()


def test_any_rank_and_no_tokens(library: str) -> None:
    rng = np.random.default_rng(7)
    weight = random_weight(rng, 12, 20, 0.5)
    for shape in [(20,), (3, 20), (2, 3, 20), (2, 1, 5, 20), (0, 20), (2, 0, 20)]:
        x = rng.standard_normal(shape).astype(np.float32)
        check(run(session_of(sparse_model(weight, rank=len(shape)), library), x), x, weight)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 50])
@pytest.mark.parametrize("block_rows", [1, 4, 16])
def test_nan_and_infinity_spread_as_in_a_dense_product(forced_library: str, tokens: int, block_rows: int) -> None:
    rng = np.random.default_rng(8)
    weight = random_weight(rng, 48, 70, 0.9, block_rows)
    weight[:16, 3] = 1.0
    x = rng.standard_normal((tokens, 70)).astype(np.float32)
    for places in ({0: np.nan}, {3: np.inf}, {3: -np.inf, 5: np.inf}, {69: np.inf, 68: np.nan}, {3: np.float32(1e36)}):
        bad = x.copy()
        for column, value in places.items():
            bad[tokens // 2, column] = value
        check(run(session_of(sparse_model(weight), forced_library), bad), bad, weight)


def test_nan_and_infinity_in_the_weight(forced_library: str) -> None:
    rng = np.random.default_rng(9)
    weight = random_weight(rng, 20, 30, 0.5)
    weight[2, 3], weight[7, 1], weight[19, 29] = np.nan, np.inf, -np.inf
    for tokens in (2, 20):
        x = rng.standard_normal((tokens, 30)).astype(np.float32)
        x[0, 1] = 0
        check(run(session_of(sparse_model(weight), forced_library), x), x, weight)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 80), columns=st.integers(1, 150), tokens=st.integers(1, 70), density=st.floats(0, 1),
    block_rows=st.sampled_from([1, 2, 4, 16]), seed=st.integers(0, 2**32 - 1), threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_fuzz(
    forced_library: str, rows: int, columns: int, tokens: int, density: float, block_rows: int, seed: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, rows, columns, density, block_rows)
    bias = rng.standard_normal(rows).astype(np.float32) if seed % 2 else None
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    check(run(session_of(sparse_model(weight, bias), forced_library, threads), x), x, weight, bias)


def test_concurrent_runs_of_one_session(library: str) -> None:
    """Eight threads meet a session that has made no layout yet, with token counts that need different ones."""
    rng = np.random.default_rng(10)
    weight = random_weight(rng, 200, 150, 0.3)
    inputs = [rng.standard_normal((tokens, 150)).astype(np.float32) for tokens in (1, 40, 3, 97, 8, 16, 1, 64)]
    for _ in range(5):
        session = session_of(sparse_model(weight), library, threads=2)
        with ThreadPoolExecutor(len(inputs)) as pool:
            for x, found in zip(inputs, pool.map(partial(run, session), inputs), strict=True):
                check(found, x, weight)


@pytest.mark.parametrize("block_rows", [1, 4, 16])
def test_threads_change_no_bit(forced_library: str, block_rows: int) -> None:
    rng = np.random.default_rng(11)
    model = sparse_model(random_weight(rng, 700, 150, 0.3, block_rows))
    sessions = [session_of(model, forced_library, threads) for threads in (1, 2, 3)]
    for tokens in (1, 5, 16, 130):
        x = rng.standard_normal((tokens, 150)).astype(np.float32)
        first, *others = [run(session, x) for session in sessions]
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_sessions_share_the_library(library: str) -> None:
    """Two sessions of different weights, run in turns and together; one is gone before the other is done."""
    rng = np.random.default_rng(12)
    weights = [random_weight(rng, 90, 70, density) for density in (0.3, 0.6)]
    sessions = [session_of(sparse_model(weight), library, threads=2) for weight in weights]
    x = rng.standard_normal((20, 70)).astype(np.float32)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: run(sessions[index % 2], x), range(20)))
    for index, output in enumerate(found):
        check(output, x, weights[index % 2])
    del sessions[0]
    check(run(sessions[0], x), x, weights[1])


def run_in_child(model: bytes, library: str, x: Floats) -> Floats:
    return run(session_of(onnx.load_from_string(model), library), x)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_uses_the_library(library: str) -> None:
    """The parent has run sessions of one thread, whose scratch memory and library the child inherits."""
    rng = np.random.default_rng(13)
    weight = random_weight(rng, 60, 50, 0.3)
    x = rng.standard_normal((20, 50)).astype(np.float32)
    model = sparse_model(weight)
    wanted = run(session_of(model, library), x)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(run_in_child, (model.SerializeToString(), library, x)).get(60)
    np.testing.assert_array_equal(found, wanted)


def test_the_instruction_set_must_exist(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFCOMPILE_RUNTIME_CPU", "sse9")
    with pytest.raises(Exception, match="MFCOMPILE_RUNTIME_CPU=sse9 names"):
        session_of(sparse_model(np.ones((2, 2), np.float32)), library)


DAMAGE: dict[str, tuple[dict[str, NDArray[Any]], dict[str, Any], str]] = {
    "truncated gaps": ({"gaps": np.ones(5, np.uint8)}, {}, "has 5 gaps and 12 values"),
    "truncated values": ({"values": np.ones(3, np.float32)}, {}, "has 12 gaps and 3 values"),
    "nothing stored": ({"gaps": np.ones(0, np.uint8), "values": np.ones(0, np.float32)}, {}, "stores no value"),
    "behind the end": ({"gaps": np.full(12, 255, np.uint8)}, {}, "behind the last of 12"),
    "one too far": ({"gaps": np.array([1] + [1] * 11, np.uint8)}, {}, "entry 11 lies at place 12"),
    "one place twice": ({"gaps": np.array([0, 1, 0] + [1] * 9, np.uint8)}, {}, "two entries name one place"),
    "negative side": ({}, {"shape": [-3, -4]}, "both sides must lie in"),
    "a side that overflows": ({}, {"shape": [2**40, 2**40]}, "both sides must lie in"),
    "smaller shape": ({}, {"shape": [3, 3]}, "behind the last of 9"),
    "three sides": ({}, {"shape": [3, 4, 1]}, "needs an attribute shape"),
    "gaps of rank 2": ({"gaps": np.ones((12, 1), np.uint8)}, {}, "needs gaps of type uint8 and rank 1"),
    "values of type int32": ({"values": np.ones(12, np.int32)}, {}, "needs values of type float32 or float16"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights_are_refused_when_the_session_is_created(library: str, name: str) -> None:
    replaced, attributes, message = DAMAGE[name]
    model = sparse_model(np.ones((3, 4), np.float32), replaced=replaced, attributes=attributes, with_function=False)
    with pytest.raises(Exception, match=message) as caught:
        session_of(model, library)
    assert "layer" in str(caught.value)


def test_half_a_byte_of_gap4_too_many_is_refused(library: str) -> None:
    model = sparse_model(np.ones((3, 4), np.float32), encoding="gap4", replaced={"gaps": np.full(7, 0x11, np.uint8)})
    with pytest.raises(Exception, match="needs two values for each byte"):
        session_of(model, library)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gaps=st.binary(min_size=1, max_size=40), extra=st.integers(-2, 2), rows=st.integers(-1, 6), columns=st.integers(0, 90))
def test_any_bytes_are_refused_or_decoded(library: str, gaps: bytes, extra: int, rows: int, columns: int) -> None:
    stored = np.frombuffer(gaps, np.uint8)
    values = np.arange(1, max(1, stored.size + extra) + 1, dtype=np.float32)
    positions = np.cumsum(stored, dtype=np.int64)
    is_sound = (
        values.size == stored.size and rows > 0 and columns > 0 and positions[-1] < rows * columns and (stored[1:] > 0).all()
    )
    model = sparse_model(
        np.ones((1, 1), np.float32), replaced={"gaps": stored, "values": values, "bias": np.zeros(max(rows, 1), np.float32)},
        attributes={"shape": [rows, columns]}, with_function=False, rank=1,
    )  # fmt: skip
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "k"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    if not is_sound:
        with pytest.raises(Exception, match="damaged"):
            session_of(model, library)
        return
    weight = np.zeros(rows * columns, np.float32)
    weight[positions] = values
    x = np.arange(columns, dtype=np.float32)
    check(run(session_of(model, library), x), x, weight.reshape(rows, columns))


def test_weights_that_are_inputs_are_refused(library: str) -> None:
    model = sparse_model(np.ones((3, 4), np.float32), with_function=False)
    value_info = type(model.graph.input[0])()
    value_info.CopyFrom(model.graph.input[0])
    value_info.name, value_info.type.tensor_type.elem_type = "gaps", 2
    del value_info.type.tensor_type.shape.dim[1:]
    model.graph.input.append(value_info)
    with pytest.raises(Exception, match="needs constant gaps"):
        session_of(model, library)


def test_inputs_that_do_not_fit_are_refused(library: str) -> None:
    model = sparse_model(np.ones((3, 4), np.float32), with_function=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "k"
    with pytest.raises(Refused, match=r"weight of shape \(3, 4\) and was given X of shape \(2, 5\)"):
        run(session_of(model, library), np.ones((2, 5), np.float32))
    short = sparse_model(np.ones((3, 4), np.float32), np.ones(2, np.float32), with_function=False)
    with pytest.raises(Exception, match=r"bias of shape \(2\)"):
        session_of(short, library)
    short.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, ["n"]))  # no longer a constant
    with pytest.raises(Refused, match=r"bias of shape \(2\)"):
        run(session_of(short, library), np.ones((2, 4), np.float32))


def test_the_bias_may_be_absent(library: str) -> None:
    model = sparse_model(np.ones((3, 4), np.float32), with_function=False)
    del model.graph.node[0].input[3:]
    np.testing.assert_array_equal(run(session_of(model, library), np.ones((2, 4), np.float32)), np.full((2, 3), 4))


def saved_apart(weight: Floats, folder: Path) -> tuple[Path, Path]:
    """A model of the weight and the file beside it that holds its tensors."""
    model = sparse_model(weight, with_function=False)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=4096)
    return folder / "model.onnx", folder / "weights"


def session_at(path: Path, library: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_external_data_is_converted_when_the_session_is_created(library: str, tmp_path: Path) -> None:
    """Afterwards nothing reads the file, also not the search for pruned weights that meet an infinity."""
    rng = np.random.default_rng(14)
    weight = random_weight(rng, 300, 200, 0.37)
    path, data = saved_apart(weight, tmp_path)
    session = session_at(path, library)
    with data.open("r+b") as file:
        file.write(b"\xff" * data.stat().st_size)
    for tokens in (40, 1, 40, 1):
        x = rng.standard_normal((tokens, 200)).astype(np.float32)
        check(run(session, x), x, weight)
