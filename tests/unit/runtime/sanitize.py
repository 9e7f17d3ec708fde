"""Build the C++ tests of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run them (`make sanitize`)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from mfcompile.errors import RuntimeLibraryError
from mfcompile.runtime import building

TESTS = ("kernel_test.cc", "int8_kernel_test.cc")
FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def main() -> int:
    """The largest exit status of the test programs; 0 with a message where there is no C++ compiler."""
    try:
        compiler = building.find_compiler()
    except RuntimeLibraryError as error:
        sys.stdout.write(f"not run: {error}\n")
        return 0
    sources = [building.SOURCE_DIR / name for name in building.KERNEL_SOURCES]
    sources += [Path(__file__).with_name(name) for name in TESTS]
    with tempfile.TemporaryDirectory() as folder:
        objects = building.compile_objects(compiler, sources, FLAGS, Path(folder))
        kernels, tests = objects[: -len(TESTS)], objects[-len(TESTS) :]
        return max(_run(compiler, [*kernels, test], Path(folder) / test.stem) for test in tests)


def _run(compiler: str, objects: list[Path], program: Path) -> int:
    building.run_compiler([compiler, *FLAGS, *map(str, objects), "-o", str(program), "-pthread"])
    return subprocess.run([str(program)], check=False, timeout=600).returncode


if __name__ == "__main__":
    sys.exit(main())
