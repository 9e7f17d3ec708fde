"""Compile the sparse runtime with the system's C++ compiler, once for each state of its sources.

The library links to no Python and to no onnxruntime, so it does not belong to an interpreter or a version. It is built
when first used rather than when mfcompile is installed: one wheel serves every platform, installing never needs a
compiler, a changed source is never run from an old library, and an installation that may not be written to works.
``python -m mfcompile.runtime`` builds it ahead of time, for an image that has no compiler later on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mfcompile.errors import RuntimeLibraryError

__all__ = ["CACHE_VARIABLE", "build_library", "compile_objects", "find_compiler", "run_compiler"]

CACHE_VARIABLE = "MFCOMPILE_RUNTIME_CACHE"
"""The environment variable that names the directory of built libraries, instead of the user's cache directory."""

SOURCE_DIR = Path(__file__).parent / "csrc"
KERNEL_SOURCES = (
    "packed.cc", "file_pages.cc", "weight_memory.cc", "layouts.cc", "sparse_linear.cc",
    "kernels_portable.cc", "kernels_avx2.cc", "kernels_avx512.cc", "kernels_avx512_narrow.cc",
    "int8_packed.cc", "int8_layouts.cc", "int8_linear.cc",
    "int8_portable.cc", "int8_avx2.cc", "int8_avxvnni.cc", "int8_avx512.cc",
)  # fmt: skip
LIBRARY_SOURCES = (*KERNEL_SOURCES, "int8_op.cc", "custom_op.cc")

# Products and sums may be fused: kernels are held to a tolerance, not to bits. Those for int8 are held to the bits of the
# operators of ONNX (EXACT_FLAGS).
FLAGS = ("-std=c++17", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")
# The intrinsics of GCC read a variable on purpose before it is set.
AVX512_FLAGS = (
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2_FLAGS, "-Wno-uninitialized", "-Wno-maybe-uninitialized",
)  # fmt: skip
X86_FLAGS = {
    "kernels_avx2.cc": AVX2_FLAGS,
    "kernels_avx512.cc": AVX512_FLAGS,
    "kernels_avx512_narrow.cc": AVX512_FLAGS,
    "int8_avx2.cc": AVX2_FLAGS,
    "int8_avxvnni.cc": AVX2_FLAGS,
    "int8_avx512.cc": ("-mavx512vnni", *AVX512_FLAGS),
}
EXACT_FLAGS = ("-ffp-contract=off",)
TIMEOUT_S = 600


def build_library() -> Path:
    """The built library of the present sources, compiled if it is not in the cache.

    Raises:
        RuntimeLibraryError: there is no compiler, it fails, or the cache directory cannot be written.
    """
    if sys.platform == "win32":
        raise RuntimeLibraryError(
            "the sparse runtime is not built on Windows: its sources need GCC or Clang. Models run as dense ones; use WSL"
        )
    cache = _cache_dir()
    path = cache / f"libmfcompile_sparse-{_source_digest()}.so"
    if path.is_file():
        return path
    compiler = find_compiler()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as folder:
            objects = compile_objects(compiler, [SOURCE_DIR / name for name in LIBRARY_SOURCES], ["-O3"], Path(folder))
            built = Path(folder) / "library.so"
            run_compiler([compiler, "-shared", *map(str, objects), "-o", str(built), "-pthread"])
            os.replace(built, path)  # complete or absent, whoever else builds it at the same time
    except OSError as error:
        raise RuntimeLibraryError(
            f"the sparse runtime could not be written to {cache}: {error}. "
            f"Name a directory that can be written in {CACHE_VARIABLE}"
        ) from error
    return path


def compile_objects(compiler: str, sources: Sequence[Path], flags: Sequence[str], folder: Path) -> list[Path]:
    """Object files of C++ sources, compiled side by side.

    Args:
        compiler: path of the compiler.
        sources: paths; they may include what lies in ``csrc``.
        flags: what is added to the flags that every file gets, such as ``-O3``.
        folder: where the object files go.

    Raises:
        RuntimeLibraryError: the compiler refuses a file; the message has its first error.
    """

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        own = X86_FLAGS.get(source.name, ()) if _is_x86() else ()
        own = (*own, *EXACT_FLAGS) if source.name.startswith("int8_") else own
        run_compiler([compiler, *FLAGS, *flags, *own, "-I", str(SOURCE_DIR), "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_one, sources))


def find_compiler() -> str:
    """Path of the C++ compiler: the one that CXX names, otherwise c++, g++ or clang++.

    Raises:
        RuntimeLibraryError: there is none.
    """
    given = os.environ.get("CXX")
    for name in (given,) if given else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    looked = f"CXX names {given!r}, which is no program" if given else "neither c++ nor g++ nor clang++ is on the PATH"
    raise RuntimeLibraryError(
        f"the sparse runtime needs a C++ compiler to be built once: {looked}. Models run as dense ones without it; "
        "install g++ or clang++, or name one in CXX"
    )


def run_compiler(command: list[str]) -> None:
    """Run a compiler or linker.

    Raises:
        RuntimeLibraryError: it fails; the message has its first error.
    """
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeLibraryError(f"the C++ compiler did not finish in {TIMEOUT_S} s: {' '.join(command)}") from error
    except subprocess.CalledProcessError as error:
        lines: list[str] = error.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {error.returncode}")
        raise RuntimeLibraryError(
            f"the C++ compiler could not build the sparse runtime: {first.strip()} (command: {' '.join(command)}). "
            "Models run as dense ones without it; name another compiler in CXX"
        ) from error


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _source_digest() -> str:
    """Changes with every source, flag and kind of machine."""
    digest = hashlib.sha256(repr((FLAGS, X86_FLAGS, EXACT_FLAGS, LIBRARY_SOURCES, sys.platform, platform.machine())).encode())
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_dir() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("mfcompile", appauthor=False) / "runtime"
