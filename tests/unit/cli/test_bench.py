"""``mfcompile bench``: what it prints and writes, how it ends, and what it says of requests that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.unit.cli.conftest import Run


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A dense file with three quarters of its one weight zero."""
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((32, 48)) < 0.25, rng.standard_normal((32, 48)), 0).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="layer")], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 48])],
        [numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_tables_sentences_and_files(run: Run, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    done = run("bench", pruned, "--variants", "dense", "--tokens", "1,4", "--threads", "1", "--rounds", "2", "-o", out)
    assert done.status == 0, done.err
    assert "batch 1, 4 tokens" in done.out
    assert "Nothing is faster than dense at every size" in done.out
    assert "Machine: " in done.out
    document = json.loads((out / "bench.json").read_text())
    assert [size["shapes"] for size in document["sizes"]] == [{"x": [1, 1, 32]}, {"x": [1, 4, 32]}]
    assert document["variants"][0]["creation_ms"] > 0
    assert {row["rounds"] for row in document["timings"]} == {2}


def test_json_alone_goes_to_stdout(run: Run, pruned: Path) -> None:
    done = run(
        "bench", pruned, "--variants", "dense", "--tokens", "inputs", "--threads", "1", "--rounds", "1", "--no-cost", "--json"
    )
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert document["format"] == "mfcompile.benchmark"
    assert "creation_ms" not in document["variants"][0]


def test_given_inputs_are_used(run: Run, pruned: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "given.npz", x=np.zeros((1, 7, 32), np.float32))
    words = ("--variants", "dense", "--tokens", "inputs", "--threads", "1", "--rounds", "1", "--no-cost", "--json")
    done = run("bench", pruned, "--inputs", tmp_path / "given.npz", *words)
    assert [size["tokens"] for size in json.loads(done.out)["sizes"]] == [7]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("absent.onnx",), "there is no ONNX file absent.onnx"),
        (("model.py",), "Give its masks, --masks DIR/masks.safetensors"),
        (("{file}", "--masks", "m.safetensors"), "leave out --masks"),
        (("{file}", "--variants", "dens"), "dens is not known; choose from dense, packed, decoded, runtime, int8"),
        (("{file}", "--threads", "0"), "threads must be whole numbers from 1"),
        (("{file}", "--rounds", "0"), "rounds must be a whole number from 1"),
        (("{file}", "--batch", "2,x"), "'x' is not a whole number"),
        (("{file}", "--variants", "dense", "--tokens", "0"), "tokens: sizes must be whole numbers from 1"),
        (("{file}", "--inputs", "absent.npz"), "absent.npz is no calibration data"),
        (("{file}", "-o", "{folder}"), "is not empty"),
    ],
)
def test_what_cannot_be_measured_ends_with_2(run: Run, pruned: Path, words: tuple[str, ...], told: str) -> None:
    done = run("bench", *(word.format(file=pruned, folder=pruned.parent) for word in words))
    assert done.status == 2
    assert told in done.err


def test_a_file_that_is_no_model_ends_with_2(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    done = run("bench", path)
    assert done.status == 2
    assert "cannot be read as an ONNX file" in done.err
