"""Sessions of stock onnxruntime, as exporters know them: of one file (see mfcompile.session), or of a split model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mfcompile import session
from mfcompile.exporters.split_session import SplitSession, load_parts
from mfcompile.exporters.stored_weights import INT8_KEY, read_weights
from mfcompile.session import TORCH_DTYPES, make_feeds, run_session

__all__ = ["TORCH_DTYPES", "make_feeds", "open_session", "reads_sparsely", "run_session"]


def open_session(path: Path | str, threads: int | None = None, library: str | None = None) -> Any:
    """An onnxruntime session on the CPU: an InferenceSession, or a SplitSession, which has its methods.

    Args:
        path: an .onnx file, or the manifest of a split model or its directory (the parts are run one after the other).
        threads: threads inside one operator; None leaves the choice to onnxruntime.
        library: path of a library of custom operators to register, None for stock onnxruntime.

    Raises:
        InputError: there is no such file, or onnxruntime cannot load it.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        return load_parts(path, threads=threads, library=library)
    return session.open_session(path, threads, library)


def reads_sparsely(session: Any) -> bool:
    """Whether any file of a session has layers that a registered library would compute, as the file says itself."""
    files = session.parts.values() if isinstance(session, SplitSession) else (session,)
    metadata = (file.get_modelmeta().custom_metadata_map for file in files)
    return any(INT8_KEY in item or any(weight.is_sparse for weight in read_weights(item).values()) for item in metadata)
