"""Which readers of a weight are linear layers, and that SparseLinear nodes compute what these computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mfcompile import runtime
from mfcompile.exporters import weight_placement
from mfcompile.exporters.sparse_crossover import least_sparsity
from tests.unit.exporters.packed_graphs import DECODING, Array, Packed, make_model, pack, session

K, N, TOKENS = 24, 32, 70
node = helper.make_node


@dataclass(frozen=True)
class Case:
    """A graph that reads the masked weight "w", and what becomes of it.

    Attributes:
        nodes: the graph, from inputs to "y".
        shape: of the weight.
        sparse: types of the SparseLinear nodes.
        refusal: a part of why a dense product is computed, where one is.
        inputs: name -> shape.
        tensors: other initializers.
    """

    nodes: Sequence[onnx.NodeProto]
    shape: tuple[int, ...] = (N, K)
    sparse: tuple[str, ...] = ()
    refusal: str = ""
    inputs: Mapping[str, Sequence[int | str]] = field(default_factory=lambda: {"x": ["batch", 7, K]})
    tensors: Mapping[str, Array] = field(default_factory=dict)


RNG = np.random.default_rng(0)
BIAS = {"b": RNG.standard_normal(N).astype(np.float32)}
MATRIX: dict[str, Sequence[int | str]] = {"x": ["batch", K]}
TRANSPOSED = node("Transpose", ["w"], ["wt"], perm=[1, 0])
PRODUCT = node("MatMul", ["x", "wt"], ["p"])
SQUARE = node("MatMul", ["x", "wt"], ["h"]), node("MatMul", ["h", "wt"], ["y"])
THEN = helper.make_graph(
    [node("MatMul", ["x", "w"], ["inner"])], "then", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
)
ELSE = helper.make_graph(
    [node("Neg", ["other"], ["negative"])], "else", [], [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)]
)
BIASED, PLAIN = ("SparseLinear",), ("SparseLinearNoBias",)

CASES = {
    "linear": Case([TRANSPOSED, PRODUCT, node("Add", ["p", "b"], ["y"])], sparse=BIASED, tensors=BIAS),
    "bias first": Case([TRANSPOSED, PRODUCT, node("Add", ["b", "p"], ["y"])], sparse=BIASED, tensors=BIAS),
    "no bias": Case([TRANSPOSED, node("MatMul", ["x", "wt"], ["y"])], sparse=PLAIN),
    "stored as K, N": Case([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])], (K, N), BIASED, tensors=BIAS),
    "a matrix": Case([TRANSPOSED, node("MatMul", ["x", "wt"], ["y"])], sparse=PLAIN, inputs=MATRIX),
    "one vector": Case([TRANSPOSED, node("MatMul", ["x", "wt"], ["y"])], sparse=PLAIN, inputs={"x": [K]}),
    "default transpose": Case([node("Transpose", ["w"], ["wt"]), node("MatMul", ["x", "wt"], ["y"])], sparse=PLAIN),
    "gemm": Case([node("Gemm", ["x", "w", "b"], ["y"], transB=1)], sparse=BIASED, inputs=MATRIX, tensors=BIAS),
    "gemm of K, N": Case([node("Gemm", ["x", "w", "b"], ["y"])], (K, N), BIASED, inputs=MATRIX, tensors=BIAS),
    "gemm without C": Case([node("Gemm", ["x", "w"], ["y"], transB=1)], sparse=PLAIN, inputs=MATRIX),
    "gemm of a transpose": Case(
        [TRANSPOSED, node("Gemm", ["x", "wt", "b"], ["y"])], sparse=BIASED, inputs=MATRIX, tensors=BIAS
    ),
    "gemm without C, and a bias": Case(
        [node("Gemm", ["x", "w"], ["p"], transB=1), node("Add", ["p", "b"], ["y"])],
        sparse=BIASED, inputs=MATRIX, tensors=BIAS,
    ),
    "scaled gemm": Case([node("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5)], refusal="Gemm reads it", inputs=MATRIX),
    "gemm of a scaled bias": Case(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=1, beta=2.0)], refusal="Gemm reads it", inputs=MATRIX, tensors=BIAS
    ),
    "gemm of another C": Case(
        [node("Gemm", ["x", "w", "c"], ["y"], transB=1)],
        refusal="Gemm reads it", inputs=MATRIX, tensors={"c": np.ones((1, N), np.float32)},
    ),
    "gemm that transposes x": Case(
        [node("Gemm", ["x", "w"], ["y"], transA=1, transB=1)], refusal="Gemm reads it", inputs={"x": [K, TOKENS]}
    ),
    "sum that is no bias": Case(
        [TRANSPOSED, PRODUCT, node("Add", ["p", "r"], ["y"])], sparse=PLAIN, inputs={"x": ["batch", 7, K], "r": ["batch", 7, N]}
    ),
    "bias that widens": Case(
        [TRANSPOSED, PRODUCT, node("Add", ["p", "c"], ["y"])], sparse=PLAIN, tensors={"c": np.ones((2, 1, 1, N), np.float32)}
    ),
    "product read twice": Case(
        [TRANSPOSED, PRODUCT, node("Add", ["p", "b"], ["q"]), node("Mul", ["p", "q"], ["y"])], sparse=PLAIN, tensors=BIAS
    ),
    "read twice": Case([TRANSPOSED, *SQUARE], (K, K), PLAIN * 2),
    "read through two transposes": Case(
        [TRANSPOSED, node("Transpose", ["w"], ["wt2"], perm=[1, 0]), PRODUCT, node("MatMul", ["p", "wt2"], ["y"])],
        (K, K), PLAIN * 2,
    ),
    "read as it is and transposed": Case(
        [TRANSPOSED, PRODUCT, node("MatMul", ["p", "w"], ["y"])], refusal="by it and by its transpose"
    ),
    "tied embedding": Case(
        [
            node("Gather", ["w", "rows"], ["e"]), TRANSPOSED, PRODUCT, node("MatMul", ["p", "e"], ["y"]),
        ],
        refusal="Gather reads it", tensors={"rows": np.arange(N)},
    ),
    "left factor": Case([node("MatMul", ["w", "x"], ["y"])], refusal="MatMul reads it", inputs={"x": [K, TOKENS]}),
    "both factors": Case(
        [node("MatMul", ["w", "w"], ["s"]), node("MatMul", ["x", "s"], ["y"])], (K, K), refusal="MatMul reads it"
    ),
    "other operator": Case([node("Add", ["w", "w"], ["d"]), node("MatMul", ["x", "d"], ["y"])], (K, N), refusal="Add reads it"),
    "transposed output": Case(
        [TRANSPOSED, node("MatMul", ["x", "wt"], ["q"]), node("Identity", ["wt"], ["y"])], refusal="Identity reads it"
    ),
    "body of control flow": Case(
        [
            node("ReduceSum", ["x"], ["total"], keepdims=0), node("Greater", ["total", "zero"], ["is_positive"]),
            node("MatMul", ["x", "v"], ["other"]),
            node("If", ["is_positive"], ["y"], then_branch=THEN, else_branch=ELSE),
        ],
        (K, N), refusal="MatMul reads it", inputs=MATRIX,
        tensors={"zero": np.zeros((), np.float32), "v": np.ones((K, N), np.float32)},
    ),
    "three axes": Case([node("MatMul", ["x", "w"], ["y"])], (2, K, N), refusal="no float32 matrix", inputs={"x": [2, 9, K]}),
}  # fmt: skip


def build(case: Case, density: float = 0.25) -> Packed:
    """The packed graph, whether or not that is faster."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(case.shape).astype(np.float32)
    model = make_model(case.nodes, case.inputs, ["y"], {"w": weight, **case.tensors})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_placement, "least_sparsity", lambda *_: 0.0)
        return pack(model, {"w": rng.random(case.shape) < density}, sizes={"batch": 10})


def feeds(case: Case) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    return {
        name: rng.standard_normal([10 if isinstance(size, str) else size for size in shape]).astype(np.float32)
        for name, shape in case.inputs.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_layers_are_found_by_structure(name: str) -> None:
    case = CASES[name]
    packed = build(case)
    assert [item.op_type.replace("Gap4", "") for item in packed.sparse_nodes] == list(case.sparse)
    assert (case.refusal in packed.placed["w"].why_dense) if case.refusal else not packed.placed["w"].why_dense
    assert {item.name for item in packed.proto.functions} == {item.op_type for item in packed.sparse_nodes}
    assert not any(item.name == "w" for item in packed.proto.graph.initializer)
    assert packed.placed["w"].plan.encoding in ("gap8", "gap4")


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_dense_model(name: str) -> None:
    case = CASES[name]
    packed, inputs = build(case), feeds(case)
    dense = session(packed.dense).run(None, inputs)[0]
    stock = session(packed.proto).run(None, inputs)[0]
    assert stock.tobytes() == dense.tobytes()
    if runtime.is_available():
        np.testing.assert_allclose(
            session(packed.proto, runtime.library_path()).run(None, inputs)[0], dense, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sparse])
def test_nothing_of_the_decode_is_left_after_optimisation(name: str, tmp_path: Path) -> None:
    packed = build(CASES[name])
    session(packed.proto, optimised=str(tmp_path / "optimised.onnx"))
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert not {item.op_type for item in optimised.graph.node} & DECODING
    assert not optimised.functions
    assert not any(item.domain == "mfcompile" for item in optimised.graph.node)


@pytest.mark.parametrize("density", [0.05, 0.4])
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_a_weight_that_several_layers_read_is_decoded_once(density: float, values: str, tmp_path: Path) -> None:
    case = CASES["read twice"]
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(case.shape).astype(np.float32)
    model = make_model(case.nodes, case.inputs, ["y"], {"w": weight})
    packed = pack(model, {"w": rng.random(case.shape) < density}, sizes={"batch": 10}, values=values)
    assert len(packed.sparse_nodes) == 2
    assert {item.op_type for item in packed.sparse_nodes} == {
        "SparseLinearNoBias" if density < 0.1 else "SparseLinearGap4NoBias"
    }
    session(packed.proto, optimised=str(tmp_path / "optimised.onnx"))
    stored = [numpy_helper.to_array(item) for item in onnx.load(tmp_path / "optimised.onnx").graph.initializer]
    assert sum(item.shape == case.shape for item in stored) == 1


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), leading=st.lists(st.integers(1, 9), max_size=2),
    density=st.floats(0, 0.6), has_bias=st.booleans(), is_stored_transposed=st.booleans(), is_gemm=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_layer_computes_the_same_bits(
    rows: int, columns: int, leading: list[int], density: float, has_bias: bool, is_stored_transposed: bool, is_gemm: bool,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    leading = [len(leading) * 4 + 1] if is_gemm else leading
    shape = (columns, rows) if is_stored_transposed else (rows, columns)
    weight, bias = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(rows).astype(np.float32)
    if is_gemm:
        nodes = [node("Gemm", ["x", "w", *(["b"] if has_bias else [])], ["y"], transB=int(not is_stored_transposed))]
    else:
        transpose = [] if is_stored_transposed else [TRANSPOSED]
        product = node("MatMul", ["x", "w" if is_stored_transposed else "wt"], ["p" if has_bias else "y"])
        nodes = [*transpose, product, *([node("Add", ["p", "b"], ["y"])] if has_bias else [])]
    model = make_model(nodes, {"x": [*leading, columns]}, ["y"], {"w": weight, **({"b": bias} if has_bias else {})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_placement, "least_sparsity", lambda *_: 0.0)
        packed = pack(model, {"w": rng.random(shape) < density})
    is_packed = packed.placed["w"].plan.encoding != "dense"
    assert [item.op_type.endswith("NoBias") for item in packed.sparse_nodes] == ([not has_bias] if is_packed else [])
    x = {"x": rng.standard_normal([*leading, columns]).astype(np.float32)}
    dense = session(packed.dense).run(None, x)[0]
    assert session(packed.proto).run(None, x)[0].tobytes() == dense.tobytes()
    if runtime.is_available():
        np.testing.assert_allclose(session(packed.proto, runtime.library_path()).run(None, x)[0], dense, rtol=1e-4, atol=1e-4)


def test_few_tokens_and_low_sparsity_stay_dense() -> None:
    def why(tokens: int | str, density: float, sizes: Mapping[str, int] | None = None) -> str:
        rng = np.random.default_rng(1)
        nodes = [TRANSPOSED, node("MatMul", ["x", "wt"], ["y"])]
        model = make_model(nodes, {"x": [tokens, K]}, ["y"], {"w": rng.standard_normal((N, K)).astype(np.float32)})
        mask = np.arange(N * K).reshape(N, K) % 100 < 100 * density
        return pack(model, {"w": mask}, sizes=sizes).placed["w"].why_dense

    for tokens in (1, 2, 4, 16, 64, 300):
        least = least_sparsity(tokens, 4 * N * K)
        assert why(tokens, 0.95 - least) == ""
        assert why(tokens, 1.05 - least).startswith(f"with {tokens:,} tokens dense is faster up to a sparsity of {least:.0%}")
        assert bool(why("rows", 1.05 - least, {"rows": tokens})) is True
    assert why("rows", 0.6) == ""  # not known: many are assumed


def test_plain_nodes_where_they_are_asked_for_or_needed() -> None:
    case = CASES["linear"]
    weight = {"w": np.random.default_rng(1).standard_normal(case.shape).astype(np.float32), **case.tensors}
    masks = {"w": np.random.default_rng(1).random(case.shape) < 0.25}
    for options, version, reason in (({"inline": True}, 8, "asked for"), ({}, 7, "too old")):
        packed = pack(
            make_model(case.nodes, case.inputs, ["y"], weight, ir_version=version), masks, sizes={"batch": 10}, **options
        )
        assert not packed.sparse_nodes
        assert not packed.proto.functions
        assert reason in packed.placed["w"].why_dense
        assert (
            session(packed.proto).run(None, feeds(case))[0].tobytes()
            == session(packed.dense).run(None, feeds(case))[0].tobytes()
        )
