"""Masked weights as sparse initializers of the ONNX specification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import InputError
from mfcompile.exporters import sparse_initializers
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.graph import CapturedGraph
from tests.unit.exporters import toy_session
from tests.unit.exporters.toy_models import TWO_TOWER_AXES, TwoTower, capture, feeds, random_masks, seeded, two_tower_inputs

DENSITIES = {
    "patches.weight": 0.37, "embedding.weight": 0.05, "query.weight": 0.0, "key.weight": 1.0, "value.weight": 0.3,
    "head.weight": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def pruned() -> CapturedGraph:
    module = seeded(TwoTower, width=64)
    return capture(module, two_tower_inputs(), TWO_TOWER_AXES, random_masks(module, DENSITIES))


@pytest.fixture(scope="module")
def artifacts(pruned: CapturedGraph, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedArtifact]:
    folder = tmp_path_factory.mktemp("sparse")
    return {format: export_onnx(pruned, folder / f"{format}.onnx", format=format) for format in ("dense", "onnx-sparse")}


def test_outputs_are_those_of_the_dense_file(artifacts: dict[str, ExportedArtifact]) -> None:
    for batch, sequence in ((2, 7), (1, 3)):
        inputs = feeds(two_tower_inputs(batch, sequence))
        dense, sparse = (toy_session.run(artifacts[format].path, inputs) for format in ("dense", "onnx-sparse"))
        assert {name: value.tobytes() for name, value in sparse.items()} == {
            name: value.tobytes() for name, value in dense.items()
        }


def test_every_masked_weight_is_a_sparse_initializer_with_its_bits(
    artifacts: dict[str, ExportedArtifact], pruned: CapturedGraph
) -> None:
    graph = onnx.load(artifacts["onnx-sparse"].path).graph
    dense = {item.name: numpy_helper.to_array(item) for item in onnx.load(artifacts["dense"].path).graph.initializer}
    assert {item.values.name for item in graph.sparse_initializer} == set(DENSITIES)
    assert pruned.masks is not None
    for item in graph.sparse_initializer:
        name, places = item.values.name, numpy_helper.to_array(item.indices)
        assert places.dtype == np.int64
        assert (np.diff(places) > 0).all()
        assert places.tolist() == np.flatnonzero(pruned.masks[name].numpy()).tolist()
        made = np.zeros(list(item.dims), np.float32)
        made.reshape(-1)[places] = numpy_helper.to_array(item.values)
        assert made.tobytes() == dense[name].tobytes(), name
    others = {item.name for item in graph.initializer}
    assert others == dense.keys() - set(DENSITIES)


def test_sizes_are_twelve_bytes_for_every_kept_weight(artifacts: dict[str, ExportedArtifact]) -> None:
    artifact = artifacts["onnx-sparse"]
    assert artifact.size_bytes == artifact.path.stat().st_size
    blanks = artifacts["dense"].path.stat().st_size - artifact.dense_size_bytes  # they align tensors in the file, to be mapped
    assert 0 <= blanks <= 64 * len(artifacts["dense"].encodings or artifact.encodings)
    for item in artifact.encodings:
        assert (item.encoding, item.stored_bytes) == ("onnx-sparse", 12 * item.kept_count)
    assert artifact.size_bytes > artifact.dense_size_bytes, "below two thirds it is larger than dense"


def test_the_full_checker_fails_on_the_type_of_sparse_initializers_alone(artifacts: dict[str, ExportedArtifact]) -> None:
    path = str(artifacts["onnx-sparse"].path)
    onnx.checker.check_model(path)
    with pytest.raises(onnx.shape_inference.InferenceError, match="Inference"):
        onnx.checker.check_model(path, full_check=True)


def test_what_it_cannot_store_is_refused(pruned: CapturedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="stores weights as they are, not as fp16"):
        export_onnx(pruned, tmp_path / "half.onnx", format="onnx-sparse", values="fp16")
    monkeypatch.setattr(sparse_initializers, "LARGEST_BYTES", 50_000)
    with pytest.raises(InputError, match=r"would take [\d,]+ bytes as onnx-sparse.*may hold 2 GB: write it packed or dense"):
        export_onnx(pruned, tmp_path / "large.onnx", format="onnx-sparse", external_data=True)
    assert not list(tmp_path.iterdir())


def test_other_tensors_may_lie_outside(artifacts: dict[str, ExportedArtifact], pruned: CapturedGraph, tmp_path: Path) -> None:
    artifact = export_onnx(pruned, tmp_path / "outside.onnx", format="onnx-sparse", external_data=True)
    assert [file.name for file in artifact.files] == ["outside.onnx", "outside.onnx.data"]
    inputs = feeds(two_tower_inputs(2, 7))
    expected = toy_session.run(artifacts["dense"].path, inputs)
    for name, value in toy_session.run(artifact.path, inputs).items():
        assert value.tobytes() == expected[name].tobytes(), name
