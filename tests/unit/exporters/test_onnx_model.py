from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters import onnx_files
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet, PackedMask
from tests.unit.exporters import toy_session
from tests.unit.exporters.toy_models import (
    TWO_TOWER_AXES,
    Tied,
    TwoTower,
    capture,
    feeds,
    masked,
    random_masks,
    seeded,
    two_tower_inputs,
)

WIDTH = 96
DENSITIES = {
    "patches.weight": 0.37,
    "embedding.weight": 0.05,
    "query.weight": 0.0,
    "key.weight": 1.0,
    "value.weight": 0.004,
    "head.weight": 0.8,
}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return seeded(TwoTower, width=WIDTH)


@pytest.fixture(scope="module")
def unpruned(module: nn.Module) -> CapturedGraph:
    return capture(module, two_tower_inputs(), TWO_TOWER_AXES)


@pytest.fixture(scope="module")
def pruned(module: nn.Module, unpruned: CapturedGraph) -> CapturedGraph:
    masks = random_masks(module, DENSITIES)
    rows = masks["head.weight"].clone()
    rows[:10] = False
    return dataclasses.replace(unpruned, masks=MaskSet({**masks.packed, "head.weight": PackedMask.pack(rows)}))


@pytest.fixture(scope="module")
def artifacts(pruned: CapturedGraph, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], ExportedArtifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        (format, values): export_onnx(pruned, folder / f"{format}_{values}.onnx", format=format, values=values)
        for format in ("dense", "packed")
        for values in ("fp32", "fp16")
    }


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor, str(path.parent)) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_packed_and_dense_outputs_are_bit_identical_at_several_sizes(
    artifacts: dict[tuple[str, str], ExportedArtifact], values: str
) -> None:
    for batch, sequence in ((2, 7), (1, 1), (5, 11)):
        inputs = feeds(two_tower_inputs(batch, sequence))
        dense = toy_session.run(artifacts["dense", values].path, inputs)
        packed = toy_session.run(artifacts["packed", values].path, inputs)
        assert dense.keys() == packed.keys()
        for name, value in dense.items():
            assert value.tobytes() == packed[name].tobytes(), name


def test_onnxruntime_computes_what_the_masked_module_computes(
    artifacts: dict[tuple[str, str], ExportedArtifact], module: nn.Module, pruned: CapturedGraph
) -> None:
    assert pruned.masks is not None
    inputs = two_tower_inputs(3, 5)
    with torch.no_grad():
        expected, dense = masked(module, pruned.masks)(**inputs), module(**inputs)
    actual = toy_session.run(artifacts["packed", "fp32"].path, feeds(inputs))
    assert list(actual) == ["logits", "pooled", "best"]
    np.testing.assert_allclose(actual["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual["pooled"], expected["pooled"], rtol=1e-5, atol=1e-5)
    assert np.abs(actual["logits"] - dense["logits"].numpy()).max() > 0.1  # the masks do something


def test_the_decode_is_folded_when_the_session_is_created(
    artifacts: dict[tuple[str, str], ExportedArtifact], tmp_path: Path
) -> None:
    dense = toy_session.optimised_operators(artifacts["dense", "fp32"].path, tmp_path)
    for values in ("fp32", "fp16"):
        packed = toy_session.optimised_operators(artifacts["packed", values].path, tmp_path)
        assert packed == dense
    assert not {"ScatterElements", "CumSum"} & set(dense)
    stored = {node.op_type for node in onnx.load(artifacts["packed", "fp32"].path).graph.node}
    assert {"ScatterElements", "CumSum"} <= stored


def test_every_encoding_takes_part(artifacts: dict[tuple[str, str], ExportedArtifact]) -> None:
    encodings = {item.fqn: item.encoding for item in artifacts["packed", "fp32"].encodings}
    assert encodings == {
        "patches.weight": "gap4",
        "embedding.weight": "gap8",
        "query.weight": "gap8",
        "key.weight": "dense",
        "value.weight": "gap8",
        "head.weight": "mask",
    }


def test_initializers_carry_the_names_of_the_parameters_and_masked_bits(
    artifacts: dict[tuple[str, str], ExportedArtifact], module: nn.Module, pruned: CapturedGraph
) -> None:
    assert pruned.masks is not None
    dense, packed = (initializers(artifacts[format, "fp32"].path) for format in ("dense", "packed"))
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        own = parameter.detach().numpy()
        if name in pruned.masks:
            expected = np.where(pruned.masks[name].numpy(), own, np.float32(0))
            assert dense[name].tobytes() == expected.tobytes(), name
            assert ("." in name and {f"{name}.gaps", f"{name}.mask"} & packed.keys()) or name == "key.weight"
        else:
            assert dense[name].tobytes() == packed[name].tobytes() == own.tobytes(), name


def test_masked_nan_and_negative_weights_become_positive_zero(tmp_path: Path) -> None:
    module = nn.Linear(8, 8)
    with torch.no_grad():
        module.weight[0, 0], module.weight[0, 1] = float("nan"), -1.0
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[0] = False
    captured = capture(module, torch.randn(2, 8), masks=MaskSet({"weight": PackedMask.pack(mask)}))
    for format in ("dense", "packed"):
        path = export_onnx(captured, tmp_path / "m.onnx", format=format).path
        x = np.ones((2, 8), np.float32)
        (output,) = toy_session.run(path, {"input": x}).values()
        assert output[0, 0] == module.bias[0].item()
        if format == "dense":
            assert initializers(path)["weight"][0].tobytes() == bytes(32)


def test_names_and_axes(artifacts: dict[tuple[str, str], ExportedArtifact]) -> None:
    artifact = artifacts["packed", "fp32"]
    assert artifact.input_names == ("pixel_values", "input_ids", "attention_mask")
    assert artifact.output_names == ("logits", "pooled", "best")
    assert artifact.dynamic_axes == TWO_TOWER_AXES
    graph = onnx.load(artifact.path).graph
    sizes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.output}
    assert sizes == {"logits": ["batch", "sequence", 50], "pooled": ["batch", WIDTH], "best": ["batch", "sequence"]}


@pytest.mark.parametrize(("format", "values"), [("dense", "fp32"), ("packed", "fp32"), ("packed", "fp16")])
def test_sizes_are_those_of_the_files(artifacts: dict[tuple[str, str], ExportedArtifact], format: str, values: str) -> None:
    artifact = artifacts[format, values]
    assert artifact.size_bytes == artifact.path.stat().st_size
    assert artifact.files == (artifact.path,)
    stored = initializers(artifact.path)
    blanks = 2 * onnx_files.ALIGNMENT * len(stored)  # in front of tensors, as many as their order takes
    assert artifact.dense_size_bytes == pytest.approx(artifacts["dense", "fp32"].path.stat().st_size, abs=blanks)
    for item in artifact.encodings:
        names = [item.fqn, f"{item.fqn}.gaps", f"{item.fqn}.mask", f"{item.fqn}.values"]
        assert item.stored_bytes == sum(stored[name].nbytes for name in names if name in stored)


def test_at_63_percent_the_pruned_weights_take_at_most_047(unpruned: CapturedGraph, tmp_path: Path) -> None:
    captured = dataclasses.replace(unpruned, masks=random_masks(unpruned.module, 0.37))
    assert export_onnx(captured, tmp_path / "m.onnx").pruned_ratio <= 0.47
    assert export_onnx(captured, tmp_path / "h.onnx", values="fp16").pruned_ratio <= 0.26


def test_an_unpruned_model_is_written_as_it_is(unpruned: CapturedGraph, tmp_path: Path) -> None:
    artifact = export_onnx(unpruned, tmp_path / "m.onnx")
    assert artifact.encodings == ()
    assert artifact.pruned_ratio == 1.0
    stored = initializers(artifact.path)
    for name, parameter in unpruned.module.named_parameters():
        assert stored[name].tobytes() == parameter.detach().numpy().tobytes()


def test_nothing_given_is_changed(tmp_path: Path) -> None:
    module = seeded(TwoTower)
    pruned = capture(module, two_tower_inputs(), TWO_TOWER_AXES, random_masks(module, 0.37))
    assert pruned.exported is not None
    program = pruned.exported.program
    before = (str(program.graph), str(program.graph_signature), {k: v.clone() for k, v in program.state_dict.items()})
    export_onnx(pruned, tmp_path / "m.onnx")
    assert (str(program.graph), str(program.graph_signature)) == before[:2]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in program.state_dict.items())


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_external_data(
    pruned: CapturedGraph, artifacts: dict[tuple[str, str], ExportedArtifact], tmp_path: Path, format: str
) -> None:
    artifact = export_onnx(pruned, tmp_path / "big.onnx", format=format, external_data=True)
    assert artifact.files == (tmp_path / "big.onnx", tmp_path / "big.onnx.data")
    assert sorted(os.listdir(tmp_path)) == ["big.onnx", "big.onnx.data"]
    assert artifact.size_bytes == sum(file.stat().st_size for file in artifact.files)
    external = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(artifact.path, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert ("patches.weight.values" if format == "packed" else "patches.weight") in external
    assert all(place["location"] == "big.onnx.data" and int(place["offset"]) % 64 == 0 for place in external.values())
    inputs = feeds(two_tower_inputs(3, 4))
    inline = toy_session.run(artifacts[format, "fp32"].path, inputs)
    for name, value in toy_session.run(artifact.path, inputs).items():
        assert value.tobytes() == inline[name].tobytes()


def test_external_data_is_used_above_the_limit_and_a_stale_data_file_goes(
    pruned: CapturedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    monkeypatch.setattr("mfcompile.exporters.onnx_files.INLINE_LIMIT_BYTES", 1000)
    assert len(export_onnx(pruned, path).files) == 2
    monkeypatch.undo()
    assert export_onnx(pruned, path).files == (path,)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_tied_weights_are_one_initializer_and_masked_once(tmp_path: Path) -> None:
    module = seeded(Tied)
    masks = random_masks(module, 0.37)
    assert set(masks) == {"embedding.weight", "middle.weight"}
    captured = capture(module, torch.randint(0, 64, (2, 6)), {"input_ids": {0: "batch", 1: "sequence"}}, masks)
    dense = export_onnx(captured, tmp_path / "d.onnx", format="dense")
    packed = export_onnx(captured, tmp_path / "p.onnx")
    stored = initializers(dense.path)
    assert "head.weight" not in stored
    assert stored["embedding.weight"].shape == (64, 24)
    ids = torch.randint(0, 64, (3, 9))
    expected = masked(module, masks)(ids).detach().numpy()
    actual = toy_session.run(packed.path, {"input_ids": ids.numpy()})["output_0"]
    assert actual.tobytes() == toy_session.run(dense.path, {"input_ids": ids.numpy()})["output_0"].tobytes()
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    under_other_name = MaskSet({"head.weight": masks.packed["embedding.weight"]})
    renamed = export_onnx(dataclasses.replace(captured, masks=under_other_name), tmp_path / "r.onnx", format="dense")
    assert initializers(renamed.path)["head.weight"].tobytes() == stored["embedding.weight"].tobytes()
    both = MaskSet({**masks.packed, "head.weight": PackedMask.pack(~masks["embedding.weight"])})
    with pytest.raises(InputError, match=r"embedding\.weight and head\.weight are one tied weight"):
        export_onnx(dataclasses.replace(captured, masks=both), tmp_path / "x.onnx")


def test_a_value_that_does_not_fit_fp16_leaves_the_old_file_alone(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8))
    module.get_parameter("0.weight").data[0, 0] = 1e6
    everything = MaskSet({"0.weight": PackedMask.pack(torch.ones(8, 8, dtype=torch.bool))})
    captured = capture(module, torch.randn(2, 8), masks=everything)
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(ExportError, match=r"0\.weight.*do not fit fp16"):
        export_onnx(captured, tmp_path / "m.onnx", values="fp16")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_a_file_that_the_checker_refuses_is_not_kept(
    unpruned: CapturedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, full_check: bool) -> None:
        assert Path(path).is_file()
        assert full_check
        raise onnx.checker.ValidationError("no such operator\nmore")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match=r"does not pass onnx\.checker: no such operator\."):
        export_onnx(unpruned, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_refusals(unpruned: CapturedGraph, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(InputError, match="format='zip'"):
        export_onnx(unpruned, path, format="zip")
    with pytest.raises(InputError, match="values='int2'"):
        export_onnx(unpruned, path, values="int2")
    with pytest.raises(InputError, match="is a directory"):
        export_onnx(unpruned, tmp_path)
    with pytest.raises(ExportError, match="TwoTower has no exported program"):
        export_onnx(dataclasses.replace(unpruned, exported=None), path)
    foreign = MaskSet({"no.such.weight": PackedMask.pack(torch.ones(2, 2, dtype=torch.bool))})
    with pytest.raises(InputError, match=r"masks name no\.such\.weight"):
        export_onnx(dataclasses.replace(unpruned, masks=foreign), path)
    wrong = MaskSet({"query.weight": PackedMask.pack(torch.ones(2, 2, dtype=torch.bool))})
    with pytest.raises(InputError, match=r"mask of query\.weight has shape \(2, 2\)"):
        export_onnx(dataclasses.replace(unpruned, masks=wrong), path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        export_onnx(unpruned, tmp_path / "file" / "m.onnx")
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_holds_no_traces_of_the_machine(artifacts: dict[tuple[str, str], ExportedArtifact]) -> None:
    assert b"stack_trace" not in artifacts["packed", "fp32"].path.read_bytes()
    assert os.path.dirname(__file__).encode() not in artifacts["packed", "fp32"].path.read_bytes()


def test_load_peak_counts_what_is_folded(artifacts: dict[tuple[str, str], ExportedArtifact]) -> None:
    dense, packed = artifacts["dense", "fp32"], artifacts["packed", "fp32"]
    assert dense.load_peak_bytes == 2 * dense.size_bytes
    folded = packed.load_peak_bytes - 2 * packed.size_bytes
    decoded = [item for item in packed.encodings if item.encoding != "dense"]
    assert folded >= sum(8 * item.kept_count + 8 * item.weight_count for item in decoded)
