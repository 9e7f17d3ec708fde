"""One file for both worlds: the custom kernel where the library is registered, plain operators where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfcompile import runtime
from mfcompile.exporters.sparse_linear import OP_TYPES
from tests.sparse_models import Floats, random_weight, run, session_of, sparse_model


def executed(model: onnx.ModelProto, library: str | None, x: Floats, folder: Path) -> tuple[Floats, set[str]]:
    """The output, and the types of the operators that ran."""
    session = session_of(model, library, profile=str(folder / "profile"))
    y = run(session, x)
    events = json.loads(Path(session.end_profiling()).read_text())
    return y, {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}


@pytest.fixture(scope="module")
def library() -> str:
    reason = runtime.why_unavailable()
    if reason is not None:
        pytest.skip(f"no sparse runtime here: {reason}")
    return runtime.library_path()


@pytest.mark.parametrize("encoding", OP_TYPES)
@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_one_file_runs_in_both_worlds(library: str, encoding: str, values: str, tokens: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    weight, bias = random_weight(rng, 96, 70, 0.37), rng.standard_normal(96).astype(np.float32)
    weight[0, 0] += np.count_nonzero(weight) % 2  # gap4 stores an even number of entries
    model = sparse_model(weight, bias, encoding=encoding, values=values)
    onnx.checker.check_model(model, full_check=True)
    x = rng.standard_normal((tokens, 70)).astype(np.float32)
    fast, fast_operators = executed(model, library, x, tmp_path)
    stock, stock_operators = executed(model, None, x, tmp_path)
    assert fast_operators == {OP_TYPES[encoding]}
    assert stock_operators <= {"MatMul", "Add", "Gemm", "FusedMatMul"}, "the decode is folded, and no custom kernel runs"
    np.testing.assert_allclose(fast, stock, rtol=1e-5, atol=1e-5)
    assert np.abs(stock).max() > 1


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(2, 60), density=st.floats(0, 1), seed=st.integers(0, 2**32 - 1),
    is_infinite=st.booleans(), tokens=st.sampled_from([1, 2, 20]),
)  # fmt: skip
def test_both_worlds_agree(rows: int, columns: int, density: float, seed: int, is_infinite: bool, tokens: int) -> None:
    if not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    rng = np.random.default_rng(seed)
    model = sparse_model(random_weight(rng, rows, columns, density), rng.standard_normal(rows).astype(np.float32))
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    if is_infinite:
        x[0, columns // 2], x[tokens - 1, 0] = np.inf, np.nan
    fast, stock = run(session_of(model, runtime.library_path()), x), run(session_of(model), x)
    np.testing.assert_allclose(fast, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_the_function_follows_the_models_opset(opset: int) -> None:
    rng = np.random.default_rng(12)
    weight = random_weight(rng, 20, 30, 0.4)
    model = sparse_model(weight, opset=opset)
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    x = rng.standard_normal((4, 30)).astype(np.float32)
    np.testing.assert_allclose(run(session_of(model), x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_the_file_stores_the_packed_weight_only() -> None:
    weight = random_weight(np.random.default_rng(13), 256, 256, 0.25)
    size = len(sparse_model(weight).SerializeToString())
    assert size < 5.1 * np.count_nonzero(weight) + 4 * 256 + 4000
