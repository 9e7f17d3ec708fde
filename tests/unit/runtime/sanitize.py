"""Build the C++ tests of the kernels with sanitizers, and run them (`make sanitize`).

Everything under AddressSanitizer and UndefinedBehaviorSanitizer; what runs in several threads under ThreadSanitizer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mfcompile.errors import RuntimeLibraryError
from mfcompile.runtime import building

TESTS = ("kernel_test.cc", "int8_kernel_test.cc")
MEMORY_FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREAD_FLAGS = ["-O1", "-g", "-fsanitize=thread"]


def main() -> int:
    """The largest exit status of the test programs; 0 with a message where there is no C++ compiler."""
    try:
        compiler = building.find_compiler()
    except RuntimeLibraryError as error:
        sys.stdout.write(f"not run: {error}\n")
        return 0
    return max(
        _build_and_run(compiler, MEMORY_FLAGS, TESTS, []),
        _build_and_run(compiler, THREAD_FLAGS, TESTS[:1], ["threads"]),
    )


def _build_and_run(compiler: str, flags: list[str], tests: Sequence[str], arguments: list[str]) -> int:
    """The largest exit status of the tests, each a program of its own."""
    sources = [building.SOURCE_DIR / name for name in building.KERNEL_SOURCES]
    sources += [Path(__file__).with_name(name) for name in tests]
    statuses = []
    with tempfile.TemporaryDirectory() as folder:
        objects = building.compile_objects(compiler, sources, flags, Path(folder))
        for test in objects[-len(tests) :]:
            program = Path(folder) / test.stem
            parts = [str(part) for part in (*objects[: -len(tests)], test)]
            building.run_compiler([compiler, *flags, *parts, "-o", str(program), "-pthread"])
            statuses.append(abs(subprocess.run([str(program), *arguments], check=False, timeout=600).returncode))
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
