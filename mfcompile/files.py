"""Writing files so that they are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mfcompile.errors import InputError

_FOLDER_ATTEMPTS = 100
"""Another process that removes empty folders may take a folder between its making and the first file in it."""


def write_atomically(path: Path, data: bytes) -> Path:
    """Write bytes under a temporary name beside ``path``, then rename.

    Raises:
        InputError: the folder cannot be written to.
    """
    try:
        handle, temporary = _temporary_beside(path)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}. Choose another output path") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _temporary_beside(path: Path) -> tuple[int, str]:
    """An open file in the folder of ``path``, which is made where there is none."""
    for _ in range(_FOLDER_ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):  # mkdir raises the second where the folder goes as it looks at it
            path.parent.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")


def check_output_dir(path: Path) -> None:
    """Refuse an output directory that holds something already, or that cannot be created.

    Raises:
        InputError: the path is a file, is not empty, or is not writable.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"the output directory {path} is a file. Choose another directory")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"the output directory {path} is not empty. Nothing was written; choose another, or let this one be "
            f"replaced (overwrite=True; --overwrite on the command line)"
        )
    ancestor = path
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise InputError(
            f"the output directory {path} cannot be written: no permission in {ancestor}. Choose another directory"
        )


def publish_document(
    document: Mapping[str, Any], path: Path, stem: str, draw: Callable[[Mapping[str, Any], Path], object], *, overwrite: bool
) -> Path:
    """Write ``<stem>.json`` and what ``draw`` makes of it into a new directory, complete or not at all.

    Args:
        document: what JSON can hold, without NaN.
        path: the directory.
        stem: name of the file.
        draw: called with the document and the folder to write into.
        overwrite: replace a directory that is there.

    Raises:
        InputError: the directory is not empty (see ``overwrite``) or not writable.
    """
    with staged_directory(path, overwrite=overwrite) as staging:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(staging / f"{stem}.json", (text + "\n").encode())
        draw(document, staging)
    return path


@contextmanager
def staged_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes ``path`` when the block ends well, and vanishes when it does not.

    Args:
        path: the final directory.
        overwrite: replace what is there; the old content is removed only after the new one is in its place.

    Raises:
        InputError: see check_output_dir.
    """
    path = Path(os.path.abspath(path))  # a name of its own, also for "."
    if not (overwrite and path.is_dir()):
        check_output_dir(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}. Choose another output directory") from error
    try:
        yield staging
        staging.chmod(0o777 & ~umask())
        if path.is_dir():
            _exchange(staging, path)
        else:
            os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, path: Path) -> None:
    """Put ``staging`` in the place of ``path``; the old directory is back in its place when that fails half-way."""
    retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        os.replace(path, retired / "old")
        try:
            os.replace(staging, path)
        except BaseException:
            os.replace(retired / "old", path)
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def umask() -> int:
    """The process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
