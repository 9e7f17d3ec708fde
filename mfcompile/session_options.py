"""Options of every onnxruntime session; apart from ``mfcompile.session``, so that loading a file needs no torch."""

from __future__ import annotations

import onnxruntime


def session_options(threads: int | None = None, library: str | None = None) -> onnxruntime.SessionOptions:
    """Options of every session: quiet; ``threads`` of None leaves their number to onnxruntime; ``library`` is registered."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings about initializers that were folded away are no news
    if threads is not None:
        options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(library)
    return options
