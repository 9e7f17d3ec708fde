"""Build the C++ test of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run it (`make sanitize`)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from mfcompile.errors import RuntimeLibraryError
from mfcompile.runtime import building

FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def main() -> int:
    """The test program's exit status; 0 with a message where there is no C++ compiler."""
    try:
        compiler = building.find_compiler()
    except RuntimeLibraryError as error:
        sys.stdout.write(f"not run: {error}\n")
        return 0
    sources = [building.SOURCE_DIR / name for name in building.KERNEL_SOURCES] + [Path(__file__).with_name("kernel_test.cc")]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernel_test"
        objects = building.compile_objects(compiler, sources, FLAGS, Path(folder))
        building.run_compiler([compiler, *FLAGS, *map(str, objects), "-o", str(program), "-pthread"])
        return subprocess.run([str(program)], check=False, timeout=600).returncode


if __name__ == "__main__":
    sys.exit(main())
