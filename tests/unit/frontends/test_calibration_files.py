"""Calibration data from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfcompile.errors import InputError
from mfcompile.frontends.calibration_files import load_calibration


def arrays(samples: int) -> dict[str, Any]:
    return {"image": np.arange(samples * 3, dtype=np.float32).reshape(samples, 3), "ids": np.arange(samples)}


def test_an_archive_is_cut_into_batches(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays(19))
    batches = load_calibration(tmp_path / "a.npz")()
    assert [len(batch["ids"]) for batch in batches] == [8, 8, 3]
    assert len(batches) == 3  # type: ignore[arg-type]
    assert np.concatenate([batch["ids"].numpy() for batch in batches]).tolist() == list(range(19))


def test_a_fixed_batch_leaves_the_rest_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays(19))
    batches = load_calibration(tmp_path / "a.npz", 4)()
    assert [len(batch["ids"]) for batch in batches] == [4] * 4


def test_a_directory_gives_its_archives_in_order(tmp_path: Path) -> None:
    for name, samples in (("b", 2), ("a", 9)):
        np.savez(tmp_path / f"{name}.npz", **arrays(samples))
    assert [len(batch["ids"]) for batch in load_calibration(tmp_path)()] == [8, 1, 2]


def test_arrays_of_different_length_are_one_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", patches=np.zeros((40, 3)), ids=np.zeros((2, 5)), scale=np.array(1.0))
    (batch,) = load_calibration(tmp_path / "a.npz")()
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {"patches": (40, 3), "ids": (2, 5), "scale": ()}


def test_a_python_file_gives_its_batches(tmp_path: Path) -> None:
    path = tmp_path / "data.py"
    path.write_text("calibration_batches = [{'x': 1}, {'x': 2}]\n")
    assert list(load_calibration(path)()) == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"no archive", "cannot be read as an .npz archive"),
        ("a.py", b"x = 1", "defines no calibration_batches"),
        ("a.csv", b"1,2", "is no calibration data. Name an .npz file"),
        ("none.npz", None, "it does not exist"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_calibration(tmp_path / name)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.npz file"):
        load_calibration(tmp_path)
