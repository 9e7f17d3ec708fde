"""Files that appear whole or not at all: written in a folder beside their place, renamed when they are complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mfcompile.errors import ExportError, InputError


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of a file that is to be written; it is gone afterwards.

    Args:
        path: the file to be written; folders above it are made.

    Raises:
        InputError: the folder of the file cannot be written to.
        ExportError: writing failed inside of the block (OSError), so that nothing was renamed, or not everything.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}. Choose another output path") from error
    try:
        yield staging
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or error}. Free space, or choose another path"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
