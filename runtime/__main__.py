"""``python -m mfcompile.runtime``: build the sparse runtime now, and say where it is or why it is not."""

from __future__ import annotations

import sys

from mfcompile import runtime


def main() -> int:
    """0 where the library is available, 1 otherwise."""
    reason = runtime.why_unavailable()
    if reason is not None:
        sys.stderr.write(f"{reason}\n")
        return 1
    sys.stdout.write(f"{runtime.library_path()} ({runtime.instruction_set()})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
