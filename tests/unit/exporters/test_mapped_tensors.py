"""Tensors inside of an .onnx file that onnxruntime maps from it: the same outputs, in less memory."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import mfcompile
from mfcompile import loading, mapped_tensors, runtime
from mfcompile.errors import InputError
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.mapped_tensors import ALIGNMENT, mapped_model
from mfcompile.onnx_wire import read_file
from tests.unit.exporters import toy_session
from tests.unit.exporters.toy_models import capture, random_masks, seeded


class Wide(nn.Module):
    """Words, and two layers of which one is pruned; their tensors take more than ``MAPPED_BYTES``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(512, 384)
        self.inner, self.outer = nn.Linear(384, 1536), nn.Linear(1536, 384)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.outer(torch.relu(self.inner(self.words(ids))))
        return output


IDS = torch.arange(40).reshape(1, 40)
FEEDS = {"ids": IDS.numpy()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> file, with everything inside of it; and the packed one as other writers lay tensors out."""
    folder, module = tmp_path_factory.mktemp("mapped"), seeded(Wide)
    pruned = capture(module, {"ids": IDS}, masks=random_masks(module, {"inner.weight": 0.3, "outer.weight": 0.3}))
    found = {name: export_onnx(pruned, folder / f"{name}.onnx", format=name).path for name in ("packed", "dense")}
    for name in ("packed", "dense"):
        found[f"older {name}"] = folder / f"older_{name}.onnx"
        onnx.save(onnx.load(found[name]), found[f"older {name}"])
    return found


def run(session: Any) -> np.ndarray:
    output: np.ndarray = session.run(None, FEEDS)[0]
    return output


def plain(path: Path, library: bool) -> np.ndarray:
    """What onnxruntime computes that reads the file as it is."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library:
        options.register_custom_ops_library(runtime.library_path())
    return run(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def is_mapped(path: Path) -> bool:
    """Whether this process has the file mapped."""
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


needs_runtime = pytest.mark.skipif(not runtime.is_available(), reason="no sparse runtime here")
needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what is mapped")


@needs_maps
@needs_runtime
@pytest.mark.parametrize("name", ["packed", "older packed"])
def test_a_packed_file_is_mapped_and_computes_the_same_bits(
    files: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        session = mfcompile.load_session(files[name], threads=1, runtime=True)
    assert "its tensors are mapped" in caplog.text
    assert is_mapped(files[name])
    assert run(session).tobytes() == plain(files[name], library=True).tobytes()


@needs_maps
def test_a_dense_file_is_mapped_and_an_unaligned_one_is_read(files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        sessions = {name: mfcompile.load_session(files[name], threads=1) for name in ("dense", "older dense")}
    assert caplog.text.count("its tensors are mapped") == 1
    assert is_mapped(files["dense"])
    assert not is_mapped(files["older dense"])
    expected = toy_session.run(files["dense"], FEEDS)
    for session in sessions.values():
        assert run(session).tobytes() == next(iter(expected.values())).tobytes()


def test_the_head_says_where_every_tensor_lies(files: dict[str, Path]) -> None:
    path = files["packed"]
    head = mapped_model(path)
    assert head is not None
    assert len(head) < 100_000
    model, whole, data = onnx.ModelProto.FromString(head), onnx.load(path), path.read_bytes()
    outside = 0
    for old, new in zip(whole.graph.initializer, model.graph.initializer, strict=True):
        place = {item.key: item.value for item in new.external_data}
        if place:
            start, length = int(place["offset"]), int(place["length"])
            assert place["location"] == path.name
            assert data[start : start + length] == onnx.numpy_helper.to_array(old).tobytes()
            assert start % ALIGNMENT == 0
            outside += length
    assert outside > 0.95 * len(data)


def test_tensors_of_other_writers_stay_in_the_model_but_for_those_that_are_read_from_anywhere(files: dict[str, Path]) -> None:
    path = files["older packed"]
    sparse = [f"{name}.weight.{kind}" for name in ("inner", "outer") for kind in ("gaps", "mask", "values")]
    record, head = read_file(path), mapped_model(path, sparse)
    assert head is not None
    mapped = {item.name for item in onnx.ModelProto.FromString(head).graph.initializer if item.external_data}
    assert {"inner.weight.values", "outer.weight.values"} <= mapped
    odd = [name for name, item in record.tensors.items() if item.values is not None and item.values[0] % ALIGNMENT]
    assert "words.weight" in odd  # or this test says nothing
    assert not [name for name in odd if name in mapped and not name.startswith(("inner.weight.", "outer.weight."))]
    dense = files["older dense"]
    assert mapped_model(dense) is None


def test_what_is_small_or_external_already_is_loaded_as_it_is(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(files["packed"]), outside, save_as_external_data=True, location="outside.data")
    monkeypatch.setattr(mapped_tensors, "MAPPED_BYTES", 1000)
    assert mapped_model(outside) is None
    monkeypatch.setattr(mapped_tensors, "MAPPED_BYTES", files["packed"].stat().st_size + 1)
    assert mapped_model(files["packed"]) is None


@needs_maps
@needs_runtime
def test_links_and_files_that_are_replaced_do_no_harm(files: dict[str, Path], tmp_path: Path) -> None:
    kept, link = tmp_path / "kept" / "model.onnx", tmp_path / "elsewhere" / "link.onnx"
    for path in (kept, link):
        path.parent.mkdir()
    kept.write_bytes(files["packed"].read_bytes())
    link.symlink_to(kept)
    session = mfcompile.load_session(link, threads=1, runtime=True)
    assert is_mapped(kept)
    other = tmp_path / "other.onnx"
    other.write_bytes(bytes(kept.stat().st_size))
    os.replace(other, kept)
    assert run(session).tobytes() == plain(files["packed"], library=True).tobytes()


@needs_runtime
def test_options_serve_several_files(files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(files["packed"].read_bytes())
    options = onnxruntime.SessionOptions()
    sessions = [mfcompile.load_session(path, runtime=True, session_options=options) for path in (files["packed"], copy)]
    assert run(sessions[0]).tobytes() == run(sessions[1]).tobytes()
    assert options.enable_mem_pattern


@pytest.mark.parametrize(
    ("name", "replacement", "said"),
    [
        ("mapped_tensors.mapped_model", lambda *_: b"no model", "are read, not mapped"),
        ("loading._maps_models", lambda: False, ""),
    ],
)
def test_where_nothing_can_be_mapped_the_file_is_read(
    files: dict[str, Path],
    name: str,
    replacement: Callable[..., Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, attribute = name.split(".")
    monkeypatch.setattr({"loading": loading, "mapped_tensors": mapped_tensors}[module], attribute, replacement)
    with caplog.at_level(logging.INFO, "mfcompile.loading"):
        session = mfcompile.load_session(files["dense"], threads=1)
    assert said in caplog.text
    assert "are mapped" not in caplog.text
    assert run(session).tobytes() == plain(files["dense"], library=False).tobytes()


@needs_runtime
def test_a_damaged_weight_is_refused_with_its_name(files: dict[str, Path], tmp_path: Path) -> None:
    damaged, record = bytearray(files["packed"].read_bytes()), read_file(files["packed"])
    found = next(item for name, item in record.tensors.items() if name.startswith("inner.weight.") and item.data_type == 2)
    assert found.values is not None
    start, stop = found.values
    damaged[start:stop] = b"\xff" * (stop - start)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        mfcompile.load_session(path, runtime=True)


@needs_runtime
def test_memory_behind_the_last_weight_can_be_given_back_while_others_are_made(files: dict[str, Path]) -> None:
    expected = plain(files["packed"], library=True)
    first = mfcompile.load_session(files["packed"], threads=1, runtime=True)
    runtime.release_unused_memory()
    second = mfcompile.load_session(files["packed"], threads=1, runtime=True)
    runtime.release_unused_memory()
    assert run(first).tobytes() == run(second).tobytes() == expected.tobytes()
