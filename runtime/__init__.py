"""The sparse runtime: kernels for pruned weights, as a library of custom operators for onnxruntime.

::

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(mfcompile.runtime.library_path())
    session = onnxruntime.InferenceSession("model.onnx", options)

The library is compiled from ``csrc`` with the system's C++ compiler when it is first asked for, and kept in the user's
cache directory (see ``mfcompile.runtime.building``). Where it cannot be, ``why_unavailable`` says why; a file with
SparseLinear nodes then still loads in onnxruntime by the function it holds, and runs as a dense model.

``MFCOMPILE_RUNTIME_CPU`` (``portable``, ``avx2`` or ``avx512``) forces an instruction set for sessions created after it
is set; without it the best one of the machine is used.
"""

from __future__ import annotations

import ctypes
import functools
import os

from mfcompile.errors import RuntimeLibraryError
from mfcompile.runtime.building import build_library

__all__ = ["INSTRUCTION_SETS", "instruction_set", "is_available", "library_path", "release_unused_memory", "why_unavailable"]

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
"""Instruction sets that have kernels, slowest first."""

LIBRARY_VARIABLE = "MFCOMPILE_RUNTIME_LIBRARY"
"""The environment variable that names a library built elsewhere, to be used instead of one built here."""


def library_path() -> str:
    """The library's path, for ``onnxruntime.SessionOptions.register_custom_ops_library``; builds it on first use.

    Raises:
        RuntimeLibraryError: it cannot be built or loaded here; the message is that of ``why_unavailable``.
    """
    path, reason = _find_library(os.environ.get(LIBRARY_VARIABLE))
    if path is None:
        raise RuntimeLibraryError(reason)
    return path


def is_available() -> bool:
    """Whether ``library_path`` gives a library; builds it on first use, which takes some seconds."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Why there is no library on this machine and what to do about it; None where there is one."""
    path, reason = _find_library(os.environ.get(LIBRARY_VARIABLE))
    return None if path is not None else reason


def instruction_set(cap: str | None = None) -> str | None:
    """The instruction set that kernels use on this machine.

    Args:
        cap: one of ``INSTRUCTION_SETS`` to ask for that one; None for the best.

    Returns:
        Its name, or None where this machine, or the compiler that built the library, does not have ``cap``.

    Raises:
        RuntimeLibraryError: there is no library.
    """
    function = ctypes.CDLL(library_path()).mfcompile_instruction_set
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    name: bytes = function(None if cap is None else cap.encode())
    return name.decode() or None


def release_unused_memory() -> None:
    """Give back memory that the weights of the sessions so far do not fill: at most 2 MB, the rest of their last huge page.

    Raises:
        RuntimeLibraryError: there is no library.
    """
    function = getattr(ctypes.CDLL(library_path()), "mfcompile_release_unused_memory", None)
    if function is not None:  # a library that was built elsewhere may be older
        function.restype = None
        function()


@functools.cache
def _find_library(given: str | None) -> tuple[str | None, str]:
    """Path and "", or None and the reason; looked for once in a process."""
    try:
        path = given or str(build_library())
    except RuntimeLibraryError as error:
        return None, str(error)
    try:
        ctypes.CDLL(path).RegisterCustomOps  # noqa: B018 - looks the symbol up
    except (OSError, AttributeError) as error:
        return (
            None,
            f"the sparse runtime {path} does not load: {error}. Delete it, or unset {LIBRARY_VARIABLE} where that names it",
        )
    return path, ""
