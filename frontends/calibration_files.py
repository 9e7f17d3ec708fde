"""Calibration data from files: ``.npz`` archives of arrays, a directory of them, or a Python file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.frontends.sources import find_calibration
from mfcompile.frontends.user_code import UserModule

DEFAULT_BATCH = 8
"""Samples to a batch; how samples are batched does not change statistics."""

_HELP = (
    "Name an .npz file with one array per input, a directory of such files, or a Python file that defines calibration_batches"
)


def load_calibration(path: Path, fixed_batch: int | None = None) -> Callable[[], Iterable[Any]]:
    """Batches from what a path names, read anew at every call.

    The arrays of an ``.npz`` file are named like the inputs. Where they agree in their first dimension they are cut into
    batches along it; otherwise the file is one batch.

    Args:
        path: an ``.npz`` file, a directory that holds some, or a Python file that defines ``calibration_batches``.
        fixed_batch: the only batch size that the model takes; samples that fill no batch are left out. None for a model
            that takes any.

    Raises:
        InputError: there is nothing of the kind, or an archive cannot be read.
    """
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise InputError(f"{path} holds no .npz file. {_HELP}")
    elif path.suffix == ".npz" and path.is_file():
        files = [path]
    elif path.suffix == ".py" and path.is_file():
        found = find_calibration(UserModule(path), [])
        if found is None:
            raise InputError(f"{path} defines no calibration_batches. {_HELP}")
        return found
    else:
        raise InputError(f"{path} is no calibration data{'' if path.exists() else ': it does not exist'}. {_HELP}")
    batches = _ArrayBatches(tuple(files), fixed_batch or DEFAULT_BATCH, fixed_batch is not None)
    len(batches)  # reads every header, so that a damaged file is found before the work begins
    return lambda: batches


@dataclass(frozen=True)
class _ArrayBatches:
    """The batches of some archives, in order; one archive is in memory at a time."""

    files: tuple[Path, ...]
    batch_size: int
    whole_only: bool

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for path in self.files:
            arrays = _read(path)
            samples = _samples({name: array.shape for name, array in arrays.items()})
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            if samples is None:
                yield tensors
                continue
            for start in range(0, self._used(samples), self.batch_size):
                rows = slice(start, start + self.batch_size)
                yield {name: tensor[rows] if tensor.ndim else tensor for name, tensor in tensors.items()}

    def __len__(self) -> int:
        total = 0
        for path in self.files:
            samples = _samples({name: array.shape for name, array in _read(path).items()})
            total += 1 if samples is None else -(-self._used(samples) // self.batch_size)
        return total

    def _used(self, samples: int) -> int:
        return samples - samples % self.batch_size if self.whole_only else samples


def _samples(shapes: dict[str, tuple[int, ...]]) -> int | None:
    sizes = {shape[0] for shape in shapes.values() if shape}
    return sizes.pop() if len(sizes) == 1 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} cannot be read as an .npz archive of arrays ({error}). Write it with numpy.savez") from error
    if not arrays:
        raise InputError(f"{path} holds no array. {_HELP}")
    return arrays
