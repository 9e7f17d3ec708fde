"""Sessions of stock onnxruntime, as exporters know them; see mfcompile.session."""

from __future__ import annotations

from mfcompile.session import TORCH_DTYPES, make_feeds, open_session, run_session

__all__ = ["TORCH_DTYPES", "make_feeds", "open_session", "run_session"]
