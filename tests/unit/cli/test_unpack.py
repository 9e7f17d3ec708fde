"""``mfcompile unpack``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mfcompile.exporters.stored_weights import WEIGHTS_KEY, StoredWeight, describe_weights
from tests.sparse_models import random_weight, sparse_model

Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Floats]:
    weight = random_weight(np.random.default_rng(0), 24, 16, 0.4)
    model = sparse_model(weight)
    stored = {"layer": StoredWeight("gap8", (24, 16), ("gaps", "values"), is_sparse=True)}
    model.metadata_props.add(key="mfcompile.format", value="packed")
    model.metadata_props.add(key=WEIGHTS_KEY, value=describe_weights(stored))
    onnx.save(model, tmp_path / "packed.onnx")
    return tmp_path / "packed.onnx", weight


def test_it_writes_the_dense_file_and_says_so(run: Any, packed: tuple[Path, Floats], tmp_path: Path) -> None:
    target = tmp_path / "dense.onnx"
    result = run("unpack", packed[0], "-o", target)
    assert (result.status, result.err) == (0, "")
    assert "wrote" in result.out
    assert "dense.onnx" in result.out
    tensors = {item.name: numpy_helper.to_array(item) for item in onnx.load(target).graph.initializer}
    np.testing.assert_array_equal(tensors["layer"], packed[1])


def test_mistakes_leave_nothing(run: Any, packed: tuple[Path, Floats], tmp_path: Path) -> None:
    (tmp_path / "taken.onnx").touch()
    for words, message in (
        ((packed[0], "-o", tmp_path / "taken.onnx"), "--overwrite"),
        ((packed[0], "-o", tmp_path / "missing" / "dense"), "does not end in .onnx"),
        ((tmp_path / "nothing.onnx", "-o", tmp_path / "dense.onnx"), "there is no ONNX file"),
    ):
        result = run("unpack", *words)
        assert result.status == 2
        assert message in " ".join(result.err.split())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["packed.onnx", "taken.onnx"]
    assert run("unpack", packed[0], "-o", tmp_path / "taken.onnx", "--overwrite").status == 0
