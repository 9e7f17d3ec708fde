"""Packed files made dense again, and sessions of them that are loaded with little memory."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import nn

import mfcompile
from mfcompile import runtime
from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import InputError, RuntimeLibraryError
from mfcompile.exporters import packing, unpacking
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.exporters.split_session import SplitSession
from mfcompile.graph import CapturedGraph
from tests.unit.exporters import toy_session
from tests.unit.exporters.toy_models import (
    TWO_TOWER_AXES,
    Tied,
    TwoTower,
    capture,
    feeds,
    random_masks,
    seeded,
    two_tower_inputs,
)

DENSITIES = {
    "patches.weight": 0.37,
    "embedding.weight": 0.05,
    "query.weight": 0.0,
    "key.weight": 0.35,
    "value.weight": 0.1,
    "head.weight": 0.6,
}
LAYOUTS = [(inline, external) for inline in (False, True) for external in (False, True)]


class Case(NamedTuple):
    """One export, and the dense one of the same masks."""

    packed: ExportedArtifact
    dense: ExportedArtifact


@pytest.fixture(scope="module")
def pruned() -> CapturedGraph:
    module = seeded(TwoTower, width=96)
    return capture(module, two_tower_inputs(), TWO_TOWER_AXES, random_masks(module, DENSITIES))


@pytest.fixture(scope="module")
def cases(pruned: CapturedGraph, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, bool], Case]:
    folder = tmp_path_factory.mktemp("packed")
    found = {}
    for values in ("fp32", "fp16"):
        dense = export_onnx(pruned, folder / f"dense-{values}.onnx", format="dense", values=values)
        for inline, external in LAYOUTS:
            path = folder / f"{values}-{inline}-{external}.onnx"
            packed = export_onnx(pruned, path, values=values, inline=inline, external_data=external)
            found[values, inline, external] = Case(packed, dense)
    return found


@pytest.fixture
def packed(cases: dict[tuple[str, bool, bool], Case]) -> Path:
    return cases["fp32", False, False].packed.path


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {item.name: numpy_helper.to_array(item, str(path.parent)) for item in onnx.load(path).graph.initializer}


def run(session: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


@pytest.mark.parametrize(("inline", "external"), LAYOUTS)
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_unpacking_gives_the_dense_export(
    cases: dict[tuple[str, bool, bool], Case], values: str, inline: bool, external: bool, tmp_path: Path
) -> None:
    case, output = cases[values, inline, external], tmp_path / "dense.onnx"
    assert {item.is_sparse for item in case.packed.encodings} == ({False} if inline else {True, False})
    assert mfcompile.unpack(case.packed.path, output) == (output,)
    onnx.checker.check_model(str(output), full_check=True)
    own, dense = stored(output), stored(case.dense.path)
    for name in DENSITIES:
        expected = dense[name] if values == "fp32" else dense[f"{name}.values"].astype(np.float32)
        assert own.pop(name).tobytes() == expected.tobytes(), name
        dense = {key: array for key, array in dense.items() if key not in (name, f"{name}.values")}
    assert {name: array.tobytes() for name, array in own.items()} == {name: array.tobytes() for name, array in dense.items()}
    inputs = feeds(two_tower_inputs(3, 5))
    for name, value in toy_session.run(case.dense.path, inputs).items():
        assert toy_session.run(output, inputs)[name].tobytes() == value.tobytes(), name
    model = onnx.load(output, load_external_data=False)
    assert not model.functions
    assert {item.domain for item in model.opset_import} == {""}
    metadata = {item.key: item.value for item in model.metadata_props}
    assert metadata["mfcompile.format"] == "dense"
    assert "mfcompile.weights" not in metadata


@pytest.mark.parametrize(("inline", "external"), LAYOUTS)
@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("has_room", [True, False])
def test_a_session_of_decoded_weights_computes_what_the_dense_file_computes(
    cases: dict[tuple[str, bool, bool], Case],
    values: str,
    inline: bool,
    external: bool,
    has_room: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, inputs = cases[values, inline, external], feeds(two_tower_inputs(3, 5))
    if not has_room:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        session = mfcompile.load_session(case.packed.path, runtime=False, threads=1)
    count = sum(item.encoding != "dense" for item in case.packed.encodings)
    way = "through a file" if has_room else "into memory"
    assert f"{count} weights decoded" in caplog.text
    assert way in caplog.text
    assert "runtime=False" in caplog.text
    expected = toy_session.run(case.dense.path, inputs)
    for name, value in run(session, inputs).items():
        assert value.tobytes() == expected[name].tobytes(), name


def test_sparse_layers_stay_packed_where_the_runtime_is(
    cases: dict[tuple[str, bool, bool], Case], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    if not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    case, inputs = cases["fp32", False, True], feeds(two_tower_inputs(3, 5))
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        sessions = [mfcompile.load_session(case.packed.path, runtime=way) for way in ("auto", True)]
    sparse = sum(item.is_sparse for item in case.packed.encodings)
    assert sparse >= 2
    assert f"{sparse} weights stay packed for" in caplog.text
    expected = toy_session.run(case.dense.path, inputs)
    for session in sessions:
        outputs = run(session, inputs)
        np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


def test_without_a_library_auto_goes_on_and_true_says_why(
    packed: Path, cases: dict[tuple[str, bool, bool], Case], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> str:
        raise RuntimeLibraryError("no C++ compiler was found")

    monkeypatch.setattr(runtime, "library_path", refuse)
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        mfcompile.load_session(packed)
    assert "without the sparse runtime: no C++ compiler was found" in caplog.text
    for path in (packed, cases["fp32", True, False].packed.path, cases["fp32", False, False].dense.path):
        with pytest.raises(RuntimeLibraryError, match="no C\\+\\+ compiler was found"):
            mfcompile.load_session(path, runtime=True)


def test_a_dense_file_is_loaded_as_it_is(cases: dict[tuple[str, bool, bool], Case], caplog: pytest.LogCaptureFixture) -> None:
    path, inputs = cases["fp32", False, False].dense.path, feeds(two_tower_inputs())
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        session = mfcompile.load_session(path)
    assert "loaded as it is" in caplog.text
    assert run(session, inputs)["logits"].tobytes() == toy_session.run(path, inputs)["logits"].tobytes()


def test_options_are_taken(packed: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = mfcompile.load_session(packed, threads=3, session_options=options, providers=["CPUExecutionProvider"])
    assert options.intra_op_num_threads == 3
    assert not isinstance(session, SplitSession)
    assert session.get_providers() == ["CPUExecutionProvider"]
    mfcompile.load_session(packed, session_options=options)  # once more with the same options


@pytest.mark.parametrize("way", ["yes", "True", None])
def test_runtime_takes_three_values(packed: Path, way: Any) -> None:
    with pytest.raises(InputError, match='choose "auto", True or False'):
        mfcompile.load_session(packed, runtime=way)


def test_tied_weights_are_unpacked_once(tmp_path: Path) -> None:
    import torch

    module: nn.Module = seeded(Tied)
    inputs = {"input_ids": torch.arange(10).reshape(2, 5)}
    tied = capture(module, inputs, masks=random_masks(module, {"embedding.weight": 0.3, "middle.weight": 0.3}))
    packed, dense = (export_onnx(tied, tmp_path / f"{format}.onnx", format=format) for format in ("packed", "dense"))
    mfcompile.unpack(packed.path, tmp_path / "unpacked.onnx")
    own, expected = stored(tmp_path / "unpacked.onnx"), stored(dense.path)
    assert {name: array.tobytes() for name, array in own.items()} == {name: array.tobytes() for name, array in expected.items()}


def test_a_split_model_is_loaded_part_by_part(cases: dict[tuple[str, bool, bool], Case], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.split\.json"):
        mfcompile.load_session(tmp_path)


def changed(path: Path, target: Path, change: Any) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, target)
    return target


def without(name: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        kept = [item for item in model.graph.initializer if item.name != name]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))

    return change


def with_gaps_doubled(name: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(item for item in model.graph.initializer if item.name == name)
        tensor.raw_data = bytes(min(2 * value, 255) for value in tensor.raw_data)

    return change


def with_another_node(model: onnx.ModelProto) -> None:
    node = next(item for item in model.graph.node if item.op_type == "CumSum")
    model.graph.node.insert(0, onnx.helper.make_node("Abs", [node.input[0]], ["absolute"]))
    start = list(model.graph.node).index(node)
    shifted = onnx.helper.make_node("Neg", [node.output[0]], [f"{node.output[0]}.negative"])
    model.graph.node.insert(start + 1, shifted)
    reader = next(item for item in model.graph.node if item.op_type == "ScatterElements" and node.output[0] in item.input)
    reader.input[1] = shifted.output[0]


def without_entry(model: onnx.ModelProto) -> None:
    kept = [item for item in model.metadata_props if item.key != "mfcompile.weights"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def without_functions(model: onnx.ModelProto) -> None:
    del model.functions[:]


@pytest.mark.parametrize(
    ("inline", "change", "message"),
    [
        (False, without("value.weight.gaps"), r"stores value\.weight as gap8, but it has no initializer value\.weight\.gaps"),
        (True, without("value.weight.gaps"), r"stores value\.weight as gap8, but it has no initializer value\.weight\.gaps"),
        (True, with_another_node, r"a node Neg stands among those that decode it"),
        (False, without_functions, "has no function in the file"),
        (False, with_gaps_doubled("value.weight.gaps"), r"value\.weight \(96, 96\) cannot be decoded as gap8: the last value"),
        (True, with_gaps_doubled("value.weight.gaps"), r"value\.weight \(96, 96\) cannot be decoded as gap8: the last value"),
    ],
)
def test_a_file_that_was_changed_is_refused_with_one_message(
    cases: dict[tuple[str, bool, bool], Case], inline: bool, change: Any, message: str, tmp_path: Path
) -> None:
    path = changed(cases["fp32", inline, False].packed.path, tmp_path / "changed.onnx", change)
    with pytest.raises(InputError, match=message):
        mfcompile.unpack(path, tmp_path / "dense.onnx")
    with pytest.raises(InputError, match=message):
        mfcompile.load_session(path, runtime=False)
    assert [item.name for item in tmp_path.iterdir()] == ["changed.onnx"]


def test_a_file_of_an_older_version_is_loaded_as_it_is(
    cases: dict[tuple[str, bool, bool], Case], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = changed(cases["fp32", True, False].packed.path, tmp_path / "older.onnx", without_entry)
    with pytest.raises(InputError, match="packed by an older mfcompile"):
        mfcompile.unpack(path, tmp_path / "dense.onnx")
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        session = mfcompile.load_session(path, runtime=False)
    assert "loaded as it is" in caplog.text
    inputs = feeds(two_tower_inputs())
    expected = toy_session.run(cases["fp32", False, False].dense.path, inputs)
    assert run(session, inputs)["logits"].tobytes() == expected["logits"].tobytes()


def test_int8_layers_stay_and_are_not_unpacked(pruned: CapturedGraph, tmp_path: Path) -> None:
    artifact = export_onnx(pruned, tmp_path / "int8.onnx", values="int8")
    assert any(item.encoding.startswith("int8") and item.is_sparse for item in artifact.encodings)
    inputs = feeds(two_tower_inputs())
    expected = toy_session.run(artifact.path, inputs)
    for name, value in run(mfcompile.load_session(artifact.path, runtime=False), inputs).items():
        assert value.tobytes() == expected[name].tobytes(), name
    only_int8 = changed(artifact.path, tmp_path / "only_int8.onnx", without_entry)
    for path in (artifact.path, only_int8):
        with pytest.raises(InputError, match=r"layers of SparseLinearInt8.* which are not unpacked"):
            mfcompile.unpack(path, tmp_path / "dense.onnx")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["int8.onnx", "only_int8.onnx"]


def test_the_output_is_checked_before_anything_is_read(
    packed: Path, cases: dict[tuple[str, bool, bool], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.onnx").write_bytes(b"kept")
    with pytest.raises(InputError, match="exists already"):
        mfcompile.unpack(packed, tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_bytes() == b"kept"
    with pytest.raises(InputError, match=r"does not end in \.onnx"):
        mfcompile.unpack(packed, tmp_path / "dense")
    with pytest.raises(InputError, match="holds no packed weight: it is dense as it is"):
        mfcompile.unpack(cases["fp32", False, False].dense.path, tmp_path / "dense.onnx")
    with pytest.raises(InputError, match="there is no ONNX file"):
        mfcompile.unpack(tmp_path / "missing.onnx", tmp_path / "dense.onnx")
    copy = shutil.copy(packed, tmp_path / "copy.onnx")
    with pytest.raises(InputError, match="write to another"):
        mfcompile.unpack(copy, copy, overwrite=True)
    mfcompile.unpack(packed, tmp_path / "there.onnx", overwrite=True)
    onnx.checker.check_model(str(tmp_path / "there.onnx"), full_check=True)


def test_one_weight_is_decoded_at_a_time(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[int] = []
    known: list[weakref.ref[Any]] = []
    original = packing.decode

    def watched(encoded: Any) -> Any:
        gc.collect()
        alive.append(sum(item() is not None for item in known))
        array = original(encoded).copy()
        known.append(weakref.ref(array))
        return array

    monkeypatch.setattr(unpacking, "decode", watched)
    mfcompile.unpack(packed, tmp_path / "dense.onnx")
    assert len(alive) >= 5
    assert max(alive) <= 1
