"""bench: files in, every form measured, and what there is no form of said with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import mfcompile
from mfcompile import runtime
from mfcompile.benchmark.cost import measure_cost
from mfcompile.benchmark.timing import SessionFile
from mfcompile.benchmark.variants import (
    FileForms,
    choose_variants,
    has_sparse_layers,
    masks_of_zeros,
    prepare_variants,
    size_of,
)
from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs
from mfcompile.runtime import building

WIDTH, HIDDEN, TOKENS = 64, 96, 64


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense file of two layers with nine of ten weights zero."""
    rng = np.random.default_rng(0)

    def weight(inputs: int, outputs: int) -> np.ndarray:
        return np.where(rng.random((inputs, outputs)) < 0.1, rng.standard_normal((inputs, outputs)), 0).astype(np.float32)

    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["hidden"], name="first"),
        helper.make_node("Relu", ["hidden"], ["active"], name="activation"),
        helper.make_node("MatMul", ["active", "down"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", WIDTH])],
        [numpy_helper.from_array(weight(WIDTH, HIDDEN), "up"), numpy_helper.from_array(weight(HIDDEN, WIDTH), "down")],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bench") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def examples() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def packed(dense: Path, examples: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FileForms(dense, examples, tmp_path_factory.mktemp("packed")).file("packed", "fp32")


def test_a_packed_file_in_all_forms(packed: Path, examples: dict[str, torch.Tensor]) -> None:
    if not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    names = ["dense", "packed", "decoded", "runtime"]
    found = mfcompile.bench(packed, examples, variants=names, tokens=(), threads=(1,), rounds=2, cost=False)
    assert [item.name for item in found.variants] == names
    assert {item.name: item.reason for item in found.variants} == dict.fromkeys(names)
    sizes = {item.name: item.size_bytes or 0 for item in found.variants}
    assert sizes["packed"] == sizes["runtime"] == size_of(packed) < sizes["dense"]
    assert [item.variant for item in found.timings] == names
    assert all((item.max_error or 0) < 1e-5 for item in found.timings)
    assert found.sizes[0].shapes == {"x": (1, TOKENS, WIDTH)}
    assert len(found.as_dict()["timings"]) == 4


def test_the_memory_of_a_file_that_is_decoded_first(packed: Path, examples: dict[str, torch.Tensor]) -> None:
    inputs = ExampleInputs((), examples, tuple(examples))
    found = measure_cost(SessionFile("decoded", packed, is_decoded=True), inputs, threads=1, processes=1)
    assert found.creation_seconds > 0
    if found.resident_bytes is not None and found.peak_bytes is not None:
        assert 0 < found.resident_bytes <= found.peak_bytes


def test_a_dense_file_gets_its_other_forms(dense: Path, examples: dict[str, torch.Tensor]) -> None:
    found = mfcompile.bench(dense, examples, variants=["dense", "packed"], tokens=(1, 4), threads=(1,), rounds=1, cost=False)
    assert found.variants[0].size_bytes == dense.stat().st_size
    assert (found.variants[1].size_bytes or 0) < dense.stat().st_size
    assert [(item.variant, item.size) for item in found.timings] == [("dense", 0), ("packed", 0), ("dense", 1), ("packed", 1)]
    assert all(item.cost is None for item in found.variants)


def test_a_captured_model_is_measured_with_its_masks(dense: Path, examples: dict[str, torch.Tensor]) -> None:
    captured = mfcompile.capture(dense, examples)
    with pytest.raises(InputError, match="has no masks"):
        mfcompile.bench(captured)
    pruned = replace(captured, masks=masks_of_zeros(captured))
    found = mfcompile.bench(pruned, variants=["dense", "packed"], tokens=(), threads=(1,), rounds=1, cost=False)
    assert found.model["sparsity"] == pytest.approx(0.9, abs=0.02)
    assert len(found.timings) == 2


def test_without_a_compiler_the_other_forms_are_measured(
    packed: Path, examples: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime._find_library.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(building.CACHE_VARIABLE, str(tmp_path / "cache"))
    try:
        found = mfcompile.bench(
            packed, examples, variants=["packed", "runtime"], tokens=(), threads=(1,), rounds=1, cost=False
        )  # fmt: skip
    finally:
        runtime._find_library.cache_clear()
    reasons = {item.name: item.reason for item in found.variants}
    assert reasons["packed"] is None
    assert "C++ compiler" in str(reasons["runtime"])
    assert found.baseline == "packed"
    assert found.machine["sparse_runtime"] is None


def test_a_file_without_sparse_layers_has_no_runtime_form(
    dense: Path, examples: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    if not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    captured = mfcompile.capture(dense, examples)
    plain = mfcompile.export_onnx(replace(captured, masks=masks_of_zeros(captured)), tmp_path / "plain.onnx", inline=True).path
    assert not has_sparse_layers(plain)
    prepared = prepare_variants(FileForms(plain, examples, tmp_path), ["packed", "runtime"], lambda done, total: None)
    assert [item.reason is None for item in prepared] == [True, False]
    assert "no sparse layers" in str(prepared[1].reason)


def test_a_model_that_is_not_pruned_has_nothing_to_pack(tmp_path: Path, examples: dict[str, torch.Tensor]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", WIDTH])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    path = tmp_path / "full.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = mfcompile.bench(path, examples, variants=["dense", "packed"], tokens=(), threads=(1,), rounds=1, cost=False)
    assert "there is nothing to pack" in str(found.variants[1].reason)
    with pytest.raises(InputError, match=r"there is no form to measure: packed: no weight of full\.onnx"):
        mfcompile.bench(path, examples, variants=["packed"], tokens=(), threads=(1,), rounds=1)


def test_sizes_that_do_not_run_are_left_out_with_a_note(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["words"]), helper.make_node("Add", ["words", "places"], ["y"])], "net",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None, 4])],
        [numpy_helper.from_array(np.ones((9, 4), np.float32), "table"),
         numpy_helper.from_array(np.ones((1, 8, 4), np.float32), "places")],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = mfcompile.bench(path, variants=["dense"], tokens=(8, 5), threads=(1,), rounds=1, cost=False)
    assert [size.tokens for size in found.sizes] == [8]
    assert any(note.startswith("the model does not run at batch 1, 5 tokens") for note in found.notes)
    with pytest.raises(InputError, match="no form of the model runs at any size"):
        mfcompile.bench(path, variants=["dense"], tokens=(5,), threads=(1,), rounds=1)


def test_forms_are_chosen_by_name_and_in_order() -> None:
    assert [item.name for item in choose_variants(["runtime", "dense"])] == ["dense", "runtime"]
    with pytest.raises(InputError, match="sparse is not known"):
        choose_variants(["dense", "sparse"])
    with pytest.raises(InputError, match="none is named"):
        choose_variants([])
