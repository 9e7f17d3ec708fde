"""What error messages of the exporters have in common."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
