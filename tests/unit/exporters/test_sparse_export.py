"""One file for both worlds, from PyTorch models: sparse layers with the library of the runtime, dense ones without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mfcompile import runtime
from mfcompile.artifact import OutputParity, ParityReport
from mfcompile.errors import ParityError
from mfcompile.exporters import onnx_files
from mfcompile.exporters.latency import compare_latency, part_latency
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.exporters.parity import default_tolerance, make_cases, raise_on_failure, verify
from mfcompile.exporters.session import open_session, reads_sparsely
from mfcompile.exporters.stored_weights import read_weights
from mfcompile.graph import CapturedGraph
from mfcompile.split import SplitRequest
from tests.unit.exporters import toy_session
from tests.unit.exporters.packed_graphs import DECODING
from tests.unit.exporters.toy_models import TWO_TOWER_AXES, Tied, TwoTower, capture, feeds, masked, random_masks, seeded

LAYER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 32, "patch_size": 4}


class Clip(nn.Module):
    """CLIPModel: two towers."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        text = {**LAYER, "vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": 98}
        config = transformers.CLIPConfig(text_config=text, vision_config={**LAYER, **IMAGES}, projection_dim=16)
        self.clip = transformers.CLIPModel(config)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        out = self.clip(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return {"logits_per_image": out.logits_per_image, "text_embeds": out.text_embeds}


class Blip(nn.Module):
    """BLIP's text encoder, which attends to its image encoder."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        text = {**LAYER, "vocab_size": 99, "max_position_embeddings": 20, "encoder_hidden_size": 32, "projection_dim": 16}
        config = transformers.BlipConfig(text_config=text, vision_config={**LAYER, **IMAGES}, image_text_hidden_size=16)
        self.blip = transformers.BlipForImageTextRetrieval(config)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        out = self.blip(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask, use_itm_head=True)
        return {"itm_score": out.itm_score}


def image_and_text(batch: int = 2, words: int = 18) -> dict[str, Tensor]:
    ids = torch.randint(1, 97, (batch, words), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 98
    pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def two_towers(words: int = 40) -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (2, words), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module", params=[Clip, Blip])
def pruned(request: pytest.FixtureRequest) -> CapturedGraph:
    module = seeded(request.param)
    linear = {f"{name}.weight": 0.3 for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return capture(module, image_and_text(), TWO_TOWER_AXES, random_masks(module, linear))


@pytest.fixture(scope="module")
def small() -> CapturedGraph:
    module = seeded(TwoTower)
    return capture(module, two_towers(), TWO_TOWER_AXES, random_masks(module, 0.3))


@pytest.fixture
def library() -> str:
    if not runtime.is_available():
        pytest.skip(f"no sparse runtime here: {runtime.why_unavailable()}")
    return runtime.library_path()


@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_one_file_is_dense_without_the_library_and_sparse_with_it(pruned: CapturedGraph, values: str, tmp_path: Path) -> None:
    dense = export_onnx(pruned, tmp_path / "dense.onnx", format="dense", values=values)
    packed = export_onnx(pruned, tmp_path / "packed.onnx", values=values)
    sparse = {item.fqn for item in packed.encodings if item.is_sparse}
    assert len(sparse) > 12
    assert all("tokens dense is faster" in item.why_dense for item in packed.encodings if not item.is_sparse)
    nodes = [node for node in onnx.load(packed.path).graph.node if node.domain == "mfcompile"]
    assert {node.name.removesuffix(".2") for node in nodes} == sparse
    for batch, words in ((2, 18), (3, 5)):
        given = feeds(image_and_text(batch, words))
        expected, found = toy_session.run(dense.path, given), toy_session.run(packed.path, given)
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    assert toy_session.optimised_operators(packed.path, tmp_path) == toy_session.optimised_operators(dense.path, tmp_path)
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert not optimised.functions
    assert not {node.op_type for node in optimised.graph.node} & DECODING
    assert packed.size_bytes == packed.path.stat().st_size
    stored = {item.name for item in onnx.load(packed.path).graph.initializer}
    told = read_weights(open_session(packed.path).get_modelmeta().custom_metadata_map)
    assert {fqn for fqn, item in told.items() if item.is_sparse} == sparse
    assert all(name in stored for item in told.values() for name in item.tensors)


def test_both_worlds_are_held_to_the_module(pruned: CapturedGraph, library: str, tmp_path: Path) -> None:
    assert pruned.masks is not None
    artifact = export_onnx(pruned, tmp_path / "m.onnx")
    cases = make_cases(pruned.example_inputs, seed=1, batch_sizes=(2, 3))
    rtol, atol = default_tolerance("fp32")
    right = masked(pruned.module, pruned.masks)
    report = verify(artifact, right, cases, rtol=rtol, atol=atol, library=library)
    assert report.passed
    assert report.sparse is not None
    assert report.sparse.runtime == f"onnxruntime {onnxruntime.__version__} with mfcompile.runtime"
    assert 0 < report.sparse.max_abs_diff < 1e-4
    wrong = verify(artifact, pruned.module, cases, rtol=rtol, atol=atol, library=library)
    assert wrong.sparse is not None
    assert not any(output.within for item in wrong.reports for output in item.outputs)
    alone = verify(artifact, right, cases, rtol=rtol, atol=atol, missing="no compiler. Install one")
    assert alone.passed
    assert alone.sparse is None
    assert alone.notes == ("not compared with mfcompile.runtime, which is not available: no compiler. Install one",)
    plain = export_onnx(pruned, tmp_path / "i.onnx", inline=True)
    alone = verify(plain, right, cases, rtol=rtol, atol=atol, library=library, missing="nothing")
    assert (alone.sparse, alone.notes, alone.passed) == (None, (), True)


def test_a_file_that_fails_with_the_library_alone_is_refused() -> None:
    def report(name: str, within: bool, sparse: ParityReport | None = None) -> ParityReport:
        return ParityReport((OutputParity("y", 0.5, 1.0, within),), 1e-3, 1e-4, (2,), ("x (2,)",), name, sparse=sparse)

    raise_on_failure(report("stock", True, report("with runtime", True)))
    with pytest.raises(ParityError, match=r"^with runtime and the masked module disagree in 1 of 1 outputs"):
        raise_on_failure(report("stock", True, report("with runtime", False)))
    with pytest.raises(ParityError, match=r"^stock and"):
        raise_on_failure(report("stock", False, report("with runtime", True)))


def test_large_sparse_layers_keep_their_tensors_beside_the_file(
    small: CapturedGraph, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "SPARSE_LIMIT_BYTES", 4000)
    beside = export_onnx(small, tmp_path / "beside.onnx")
    inside = export_onnx(small, tmp_path / "inside.onnx", external_data=False)
    assert [len(item.files) for item in (beside, inside)] == [2, 1]
    assert len(export_onnx(small, tmp_path / "plain.onnx", inline=True).files) == 1
    assert len(export_onnx(small, tmp_path / "dense.onnx", format="dense").files) == 1
    given = feeds(two_towers())
    for given_library in (library, None):
        one, other = (open_session(item.path, 1, given_library) for item in (beside, inside))
        for left, right in zip(one.run(None, given), other.run(None, given), strict=True):
            assert left.tobytes() == right.tobytes()


def test_every_part_of_a_split_model_runs_in_both_worlds(small: CapturedGraph, library: str, tmp_path: Path) -> None:
    fusion = dict.fromkeys(("query.weight", "key.weight", "value.weight", "head.weight"), "fusion")
    request = SplitRequest({"pixel_values": "vision", "input_ids": "text", "attention_mask": None}, fusion)
    whole = export_onnx(small, tmp_path / "whole.onnx")
    parts = export_onnx(small, tmp_path / "parts", split=request)
    assert {item.fqn for item in parts.encodings if item.is_sparse} == {item.fqn for item in whole.encodings if item.is_sparse}
    stock, fast = open_session(parts.path), open_session(parts.path, library=library)
    assert reads_sparsely(stock)
    given = feeds(two_towers())
    expected = toy_session.run(whole.path, given)
    for session in (stock, fast):
        for name, value in zip(parts.output_names, session.run(None, given), strict=True):
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)
    seconds = part_latency(parts.path, small.example_inputs, repeats=2, libraries={"stock": None, "sparse": library})
    assert {way: set(times) for way, times in seconds.items()} == {way: set(stock.parts) for way in ("stock", "sparse")}
    assert all(time > 0 for times in seconds.values() for time in times.values())


def test_latency_is_measured_with_the_library_where_it_is_named(
    small: CapturedGraph, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_onnx(small, tmp_path / "m.onnx").path
    opened = []

    def note(path: Path, threads: int | None, library: str | None) -> object:
        opened.append(library)
        return open_session(path, threads, library)

    monkeypatch.setattr("mfcompile.exporters.latency.open_session", note)
    paths = {"pruned": path, "sparse": path}
    result = compare_latency(paths, small.example_inputs, repeats=2, warmup=0, libraries={"sparse": library})
    assert opened == [None, library]
    assert {name: len(times) for name, times in result.seconds.items()} == {"pruned": 2, "sparse": 2}


def test_a_tied_embedding_keeps_its_decode_nodes(tmp_path: Path) -> None:
    module = seeded(Tied)
    axes = {"input_ids": {0: "batch", 1: "sequence"}}
    captured = capture(module, torch.randint(0, 64, (2, 40)), axes, random_masks(module, 0.3))
    artifact = export_onnx(captured, tmp_path / "m.onnx")
    found = {item.fqn: (item.is_sparse, item.why_dense) for item in artifact.encodings}
    assert found == {"embedding.weight": (False, "Gather reads it"), "middle.weight": (True, "")}


def test_a_model_without_masks_has_no_sparse_layers(small: CapturedGraph, tmp_path: Path) -> None:
    artifact = export_onnx(dataclasses.replace(small, masks=None), tmp_path / "m.onnx")
    assert not onnx.load(artifact.path).functions
    assert not reads_sparsely(open_session(artifact.path))
