"""Options of every onnxruntime session, and errors of loading; apart from ``mfcompile.session``, to need no torch."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import onnxruntime

from mfcompile.errors import InputError


def session_options(threads: int | None = None, library: str | None = None) -> onnxruntime.SessionOptions:
    """Options of every session: quiet; ``threads`` of None leaves their number to onnxruntime; ``library`` is registered."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings about initializers that were folded away are no news
    if threads is not None:
        options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(library)
    return options


def release_free_memory() -> None:
    """Give memory that the process has freed back to the system: glibc keeps what lies between blocks that are in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def load_error(path: Path, error: Exception) -> InputError:
    """What to raise where onnxruntime refuses the model of this file."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return InputError(
        f"onnxruntime {onnxruntime.__version__} cannot load {path}: {reason}. The file is damaged, its external data is not "
        f"beside it, or it needs a newer onnxruntime; export it again"
    )
