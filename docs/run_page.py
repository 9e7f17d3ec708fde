"""Run the Python blocks of a page one after the other, in one namespace, as a reader would who types them.

    python docs/run_page.py docs/walkthrough.md            # from the root of a clone
    python docs/run_page.py docs/walkthrough.md --write    # and write what every block printed into the page

What a block printed stands under it, in a block of ``text``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", flags=re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(code, what the page says that it prints) of every Python block of a page."""
    return [(found["code"], found["output"] or "") for found in _BLOCK.finditer(page)]


def run_blocks(
    codes: Sequence[str],
    *,
    settings: Mapping[str, object] | None = None,
    printed: Callable[[str], object] | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Run blocks of code in one namespace.

    Args:
        codes: the blocks.
        settings: name -> value in the place of the one that a block gives it, in a line ``name = ...`` of its own.
        printed: called with what every block printed, when it is through.

    Returns:
        What each block printed, and the namespace.

    Raises:
        ValueError: no block, or several, give a name of ``settings`` its value.
    """
    text = "\0\n".join(codes)
    for name, value in (settings or {}).items():
        text, count = re.subn(rf"^{re.escape(name)} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{name} is given a value in {count} lines of the page, not in one")
    namespace: dict[str, Any] = {"__name__": "page"}
    outputs = []
    for number, code in enumerate(text.split("\0\n"), start=1):
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            exec(compile(code, f"block {number}", "exec"), namespace)
        outputs.append(stream.getvalue())
        if printed is not None:
            printed(outputs[-1])
    return outputs, namespace


def with_outputs(page: str, outputs: Sequence[str]) -> str:
    """The page with other outputs under its Python blocks; none under a block that prints nothing."""
    given = iter(outputs)

    def replaced(found: re.Match[str]) -> str:
        output = next(given)
        return f"```python\n{found['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return _BLOCK.sub(replaced, page)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    """Run the page that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true", help="write what the blocks printed into the page")
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    started, computed = time.monotonic(), time.process_time()
    outputs, _ = run_blocks([code for code, _ in blocks(page)], printed=_show)
    elapsed, computed = time.monotonic() - started, time.process_time() - computed
    sys.stdout.write(f"{len(outputs)} blocks in {elapsed:.0f} s, {computed:.0f} s of processor time\n")
    if arguments.write:
        arguments.page.write_text(with_outputs(page, outputs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
