"""The parts of a small model as files: external data, precision, what is kept when writing fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.exporters.session import open_session
from mfcompile.exporters.split_manifest import MANIFEST
from mfcompile.exporters.split_session import load_parts
from mfcompile.graph import CapturedGraph
from mfcompile.split import SplitRequest, split_request
from tests.unit.exporters import toy_session
from tests.unit.exporters.toy_models import TWO_TOWER_AXES, TwoTower, capture, feeds, random_masks, seeded, two_tower_inputs

REQUEST = SplitRequest(
    {"pixel_values": "vision", "input_ids": "text", "attention_mask": None},
    dict.fromkeys(("query.weight", "key.weight", "value.weight", "head.weight"), "fusion"),
)


@pytest.fixture(scope="module")
def pruned() -> CapturedGraph:
    module = seeded(TwoTower, width=96)
    return capture(module, two_tower_inputs(), TWO_TOWER_AXES, random_masks(module, 0.3))


@pytest.fixture(scope="module")
def parts(pruned: CapturedGraph, tmp_path_factory: pytest.TempPathFactory) -> ExportedArtifact:
    return export_onnx(pruned, tmp_path_factory.mktemp("split") / "parts", split=REQUEST)


def test_parts_give_what_the_file_gives_at_several_sizes(
    pruned: CapturedGraph, parts: ExportedArtifact, tmp_path: Path
) -> None:
    whole = export_onnx(pruned, tmp_path / "whole.onnx")
    for batch, sequence in ((2, 7), (1, 3), (5, 11)):
        given = feeds(two_tower_inputs(batch, sequence))
        expected = toy_session.run(whole.path, given)
        for name, value in zip(parts.output_names, load_parts(parts.path).run(None, given), strict=True):
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    assert parts.dense_size_bytes == whole.dense_size_bytes
    assert parts.dynamic_axes == whole.dynamic_axes
    assert {item.fqn for item in parts.encodings} == {item.fqn for item in whole.encodings}


def test_every_file_says_how_it_is_stored(parts: ExportedArtifact) -> None:
    for part in parts.parts:
        told = {item.key: item.value for item in onnx.load(part.path).metadata_props}
        assert told["mfcompile.format"] == "packed"
        assert "mfcompile.masks_sha256" in told
    manifest = load_parts(parts.path).manifest
    of_all = {key.removeprefix("mfcompile."): value for key, value in told.items() if key != "mfcompile.weights"}
    assert manifest.storage == of_all
    assert [part.size_bytes for part in manifest.parts] == [part.size_bytes for part in parts.parts]


def test_shapes_and_dtypes_of_what_crosses_are_told(parts: ExportedArtifact) -> None:
    vision, text, fusion = load_parts(parts.path).manifest.parts
    (handed,) = vision.outputs
    assert (handed.name, handed.dtype) == ("vision_features", "float32")
    assert handed.shape is not None
    assert handed.shape[0] == "batch"
    assert set(handed.shape[1:]) == {16, 96}
    assert [item.part for item in fusion.inputs if item.name in ("vision_features", "text_features")] == ["vision", "text"]
    assert {item.name: item.modality for item in text.inputs} == {"input_ids": "text", "attention_mask": None}


def test_external_data_lies_beside_each_part(pruned: CapturedGraph, parts: ExportedArtifact, tmp_path: Path) -> None:
    artifact = export_onnx(pruned, tmp_path / "parts", external_data=True, split=REQUEST)
    assert (tmp_path / "parts" / "vision.onnx.data") in artifact.files
    assert sum(file.stat().st_size for file in artifact.files) == artifact.size_bytes
    given = feeds(two_tower_inputs())
    for one, other in zip(load_parts(artifact.path).run(None, given), load_parts(parts.path).run(None, given), strict=True):
        assert one.tobytes() == other.tobytes()
    with (tmp_path / "parts" / "vision.onnx.data").open("r+b") as file:
        file.seek(40)
        file.write(b"?")
    with pytest.raises(InputError, match=r"vision\.onnx\.data is not the file"):
        load_parts(artifact.path)


def test_halves_are_stored_in_every_part(pruned: CapturedGraph, parts: ExportedArtifact, tmp_path: Path) -> None:
    half = export_onnx(pruned, tmp_path / "parts", values="fp16", split=REQUEST)
    assert half.values == "fp16"
    assert all(new.size_bytes < old.size_bytes for new, old in zip(half.parts, parts.parts, strict=True) if old.encodings)


def test_nothing_is_published_that_is_not_accepted(pruned: CapturedGraph, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        assert open_session(path).run(None, feeds(two_tower_inputs()))[0].shape == (2, 7, 50)
        raise ExportError("not right")

    with pytest.raises(ExportError, match="not right"):
        export_onnx(pruned, tmp_path / "parts", split=REQUEST, accept=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_opens_like_its_manifest(parts: ExportedArtifact) -> None:
    given = feeds(two_tower_inputs())
    one, other = open_session(parts.path.parent), open_session(parts.path.parent / MANIFEST)
    assert [node.name for node in one.get_inputs()] == list(parts.input_names)
    assert one.run(["pooled"], given)[0].tobytes() == other.run(["pooled"], given)[0].tobytes()


def test_requests_are_checked() -> None:
    assert split_request(None, None) is None
    with pytest.raises(InputError, match="split='layers' is not known; choose regions, or None"):
        split_request("layers", None)
    with pytest.raises(InputError, match="needs the regions of the model"):
        split_request("regions", None)
