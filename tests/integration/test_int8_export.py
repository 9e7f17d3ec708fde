"""int8 files: what stock onnxruntime and the sparse kernels compute, how large they are, and what they are held to."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile import runtime
from mfcompile.artifact import ExportedArtifact
from mfcompile.compile import CompiledModel
from mfcompile.errors import ParityError
from mfcompile.exporters import parity, tolerances
from mfcompile.exporters.quantization import quantize_rows
from mfcompile.exporters.stored_weights import INT8_KEY


class Block(nn.Module):
    """Attention with q, k and v over one X, of which k has no bias, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + torch.softmax(self.query(y) @ self.key(y).transpose(-1, -2) / 8, -1) @ self.value(y)
        mixed: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))
        return mixed


class Model(nn.Module):
    """Blocks behind an embedding, which is no linear layer, and a head that lies outside of them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))}
    return mfcompile.compile_pruned(Model().eval(), ids, sparsity=0.75, pattern="1x4", targets=["blocks"])


@pytest.fixture(scope="module")
def files(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedArtifact]:
    """By format."""
    folder = tmp_path_factory.mktemp("int8")
    return {name: compiled.export_onnx(folder / f"{name}.onnx", name, "int8") for name in ("dense", "packed")}


@pytest.fixture(params=["dense", "packed"])
def exported(request: pytest.FixtureRequest, files: dict[str, ExportedArtifact]) -> ExportedArtifact:
    return files[request.param]


def session_of(path: Path, library: str | None = None, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def operators(path: Path, library: str | None, folder: Path) -> Counter[str]:
    """Of the optimised graph."""
    session_of(path, library, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_stock_onnxruntime_multiplies_int8_only(exported: ExportedArtifact, tmp_path: Path) -> None:
    """Eleven layers; q, k and v share one X, and all other layers quantize their own."""
    found = operators(exported.path, None, tmp_path)
    assert found["DynamicQuantizeMatMul"] == 5
    assert found["MatMulIntegerToFloat"] == 6
    assert found["DynamicQuantizeLinear"] == 2
    assert found["MatMul"] + found["FusedMatMul"] == 4  # of activations with each other
    assert not found.keys() & {"ScatterND", "CumSum", "MatMulInteger", "Gemm"}


def test_sparse_layers_run_on_the_kernels(exported: ExportedArtifact, tmp_path: Path) -> None:
    if not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    found = operators(exported.path, runtime.library_path(), tmp_path)
    sparse = found["SparseLinearInt8"] + found["SparseLinearInt8Gap4"]
    assert sparse == (10 if exported.format == "packed" else 0)
    assert {item.encoding for item in exported.encodings if item.is_sparse} <= {"int8-gap8", "int8-gap4"}
    described = json.loads(session_of(exported.path).get_modelmeta().custom_metadata_map.get(INT8_KEY, "{}"))
    assert len(described) == sparse
    assert not described or Counter(item["block"] for item in described.values()).most_common(1)[0][0] == 4


def test_both_worlds_and_both_formats_compute_the_same(files: dict[str, ExportedArtifact]) -> None:
    ids = {"input_ids": np.random.default_rng(2).integers(0, 50, (2, 12))}
    outputs = []
    for artifact in files.values():
        for library in (None, runtime.library_path() if runtime.is_available() else None):
            outputs.append(session_of(artifact.path, library).run(None, ids)[0])
    assert np.abs(outputs[0]).max() > 0.1
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=tolerances.WORLDS_SHARE * np.abs(outputs[0]).max(), rtol=0)


def test_weights_are_those_of_the_equations(compiled: CompiledModel, files: dict[str, ExportedArtifact]) -> None:
    stored = onnx.load(files["dense"].path).graph.initializer
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in stored}
    name = "blocks.0.up.weight"
    mask = compiled.masks[name].numpy()
    weight = compiled.captured.module.get_parameter(name).detach().numpy()
    wanted = quantize_rows(np.where(mask, weight, 0))
    np.testing.assert_array_equal(tensors[f"{name}.values"].T, wanted.values)
    np.testing.assert_array_equal(tensors[f"{name}.scales"], wanted.scales)
    assert not tensors[f"{name}.values"].T[~mask].any()
    assert tensors["embedding.weight"].dtype == np.float32


def test_a_packed_file_stores_kept_weights_only(compiled: CompiledModel, files: dict[str, ExportedArtifact]) -> None:
    packed, dense = files["packed"], files["dense"]
    kept = sum(item.kept_count for item in packed.encodings)
    rows = sum(len(mask) for mask in compiled.masks.values())
    assert sum(item.stored_bytes for item in packed.encodings) < 1.2 * kept + 4 * rows
    assert sum(item.stored_bytes for item in dense.encodings) == 4 * kept + 4 * rows
    assert packed.size_bytes < dense.size_bytes < packed.dense_size_bytes / 2
    assert packed.path.stat().st_size == packed.size_bytes


def test_parity_is_held_to_the_range_of_the_output(compiled: CompiledModel, exported: ExportedArtifact) -> None:
    report = compiled.verify(exported)
    assert report.passed
    assert (report.rtol, report.atol) == (0.0, tolerances.INT8_SHARE)
    assert 1e-4 < report.max_abs_diff / report.outputs[0].max_abs < tolerances.INT8_SHARE
    if exported.format == "packed" and runtime.is_available():
        assert report.sparse is not None


def test_wrong_weights_are_outside(compiled: CompiledModel, exported: ExportedArtifact, tmp_path: Path) -> None:
    """The scales of the last layer, a fifth too large."""
    model = onnx.load(exported.path)
    scales = next(item for item in model.graph.initializer if item.name == "head.weight.scales")
    scales.CopyFrom(onnx.numpy_helper.from_array(np.float32(1.2) * onnx.numpy_helper.to_array(scales), scales.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    report = mfcompile.verify(tmp_path / "wrong.onnx", compiled.captured, values="int8")
    assert not report.passed
    with pytest.raises(ParityError, match="disagree"):
        parity.raise_on_failure(report)


def test_plain_nodes_where_functions_are_refused(compiled: CompiledModel, tmp_path: Path) -> None:
    artifact = compiled.export_onnx(tmp_path / "model.onnx", "packed", "int8", inline=True)
    model = onnx.load(artifact.path)
    assert not model.functions
    assert {item.domain for item in model.opset_import} <= {"", "ai.onnx"}
    assert {item.why_dense for item in artifact.encodings} == {"plain nodes were asked for"}


@pytest.mark.parametrize("library", [True, False])
def test_load_session_opens_it(files: dict[str, ExportedArtifact], library: bool) -> None:
    if library and not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    ids = {"input_ids": np.random.default_rng(3).integers(0, 50, (2, 12))}
    for artifact in files.values():
        found = mfcompile.load_session(artifact.path, runtime="auto" if library else False).run(None, ids)[0]
        wanted = session_of(artifact.path).run(None, ids)[0]
        np.testing.assert_allclose(found, wanted, atol=tolerances.WORLDS_SHARE * np.abs(wanted).max(), rtol=0)
