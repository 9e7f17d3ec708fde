"""A directory of calibration statistics: one entry per model and data, found again by what it was made from.

::

    <cache directory>/statistics/<key of the model>/<key of the data>.safetensors
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs
from mfcompile.statistics import CalibrationStatistics

ENTRIES_PER_MODEL = 16
"""Entries that are kept of a model: those that were written or used last."""

TOTAL_BYTES = 2 << 30
"""Bytes that all entries together may take; those that were written or used last stay. An entry takes 8 bytes per input
feature of every site: 1.5 MiB for a model of 184 M prunable weights."""

CACHE_VARIABLE = "MFCOMPILE_CACHE"
"""The environment variable that names the cache directory."""

_STALE_S = 24 * 3600
"""A temporary file as old as this belongs to a writer that is gone."""


def default_cache_dir() -> Path:
    """The directory that MFCOMPILE_CACHE names, or the user's cache directory of this platform."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("mfcompile", appauthor=False)


class StatisticsCache:
    """Entries under a cache directory. Several processes may use one directory: entries appear complete, by rename.

    Args:
        cache_dir: the cache directory; None takes ``default_cache_dir()``.

    Attributes:
        directory: where the entries lie.
    """

    def __init__(self, cache_dir: Path | str | None = None) -> None:
        self.directory = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "statistics"

    def path(self, model_key: str, data_key: str) -> Path:
        """The file of an entry."""
        return self.directory / model_key / f"{data_key}.safetensors"

    def has_model(self, model_key: str) -> bool:
        """There is some entry of this model: it is worth to find out the key of the data."""
        return any(map(_is_entry, _files(self.directory / model_key)))

    def find(self, model_key: str, data_key: str) -> CalibrationStatistics | None:
        """The entry, or None.

        Raises:
            InputError: there is one, and it is damaged or of another format.
        """
        path = self.path(model_key, data_key)
        try:
            found = CalibrationStatistics.load(path)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        with suppress(OSError):  # somebody else's directory: the entry is as good, its age is wrong
            os.utime(path)
        return found

    def store(self, model_key: str, data_key: str, statistics: CalibrationStatistics) -> Path:
        """Write an entry, and remove those that have not been used for longest, of this model and of all.

        Raises:
            InputError: the directory cannot be written to.
        """
        path = self.path(model_key, data_key)
        statistics.save(path)
        self._shrink(path)
        return path

    def _shrink(self, newest: Path) -> None:
        kept_of_model, total = 1, _size_bytes(newest)
        for _, size_bytes, path in sorted(self._entries(newest), reverse=True):
            is_of_model = path.parent == newest.parent
            if (is_of_model and kept_of_model >= ENTRIES_PER_MODEL) or total + size_bytes > TOTAL_BYTES:
                _remove(path)
                continue
            kept_of_model += is_of_model
            total += size_bytes

    def _entries(self, newest: Path) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, size, path) of every entry but the newest."""
        for path in chain.from_iterable(map(_files, _files(self.directory))):
            with suppress(OSError):  # removed by another process
                status = path.stat()
                if _is_entry(path):
                    if path != newest:
                        yield status.st_mtime, status.st_size, path
                elif status.st_mtime < newest.stat().st_mtime - _STALE_S:
                    _remove(path)


def _files(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where another process removed it, or where it may not be read."""
    with suppress(OSError):
        return [folder / name for name in os.listdir(folder)]
    return []


def _is_entry(path: Path) -> bool:
    """No temporary file of a writer."""
    return path.suffix == ".safetensors" and not path.name.startswith(".")


def _remove(path: Path) -> None:
    """Remove an entry, and the directory of its model with the last one."""
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()


def _size_bytes(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


class BatchHasher:
    """sha256 over batches, one after another, as the model receives them.

    Args:
        head: what else tells these data from others.
    """

    def __init__(self, head: str = "") -> None:
        self._state = hashlib.sha256(f"{head};".encode())

    def add(self, inputs: ExampleInputs) -> None:
        """Take names, dtypes, shapes and bytes of every tensor in, and the arguments that are no tensors."""
        leaves, structure = pytree.tree_flatten((inputs.args, inputs.kwargs))
        self._state.update(f"batch {structure};".encode())
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                self._state.update(_value_bytes(leaf))
        for name, tensor in inputs.tensors().items():
            self._state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            self._state.update(tensor_bytes(tensor))

    def hexdigest(self) -> str:
        """The key of the batches so far."""
        return self._state.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor, row by row, as bytes; copied only where they lie otherwise, or on another device."""
    flat = tensor.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _value_bytes(value: Any) -> bytes:
    """A value that tells it from others; one that cannot be written down is like no other."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{value!r};".encode()
    try:
        return pickle.dumps(value)
    except Exception:  # whatever its class raises
        return os.urandom(16)
