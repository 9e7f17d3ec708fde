"""The machine that a benchmark ran on, and whether it was busy."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import onnxruntime

from mfcompile._version import __version__

BUSY_LOAD = 0.5
"""Runnable processes per core, before anything is measured, above which a machine is called busy."""

BUSY_STRETCH = 1.1
"""Wall-clock time over CPU time of runs on one thread above which other processes took part of the time."""

_FLAGS = ("avx512f", "avx512_vnni", "avx512_bf16", "avx2", "fma", "avx_vnni", "amx_tile", "amx_int8", "asimd", "i8mm", "sve")


def describe_machine(runtime: str | None) -> dict[str, Any]:
    """Processor, instruction sets, cores, memory, load average and versions.

    Args:
        runtime: the instruction set that the sparse runtime uses; None where there is no runtime.
    """
    processor, flags = _processor()
    return {
        "processor": processor,
        "instruction_sets": flags,
        "sparse_runtime": runtime,
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "mfcompile": __version__,
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy_notes(machine: dict[str, Any], stretch: float | None) -> list[str]:
    """Warnings where other processes used the machine.

    Args:
        machine: what ``describe_machine`` gave before the measurement.
        stretch: wall-clock time over CPU time of the runs on one thread; None where there were none.
    """
    load, cores = machine["load_average"], machine["cores"]
    notes = []
    if load is not None and load > BUSY_LOAD * cores:
        notes.append(
            f"the machine was busy: load average {load:g} on {cores} cores before anything was measured. Times on several "
            f"threads say little; ratios of runs that took turns say more, but scatter. Measure again on a quiet machine"
        )
    if stretch is not None and stretch > BUSY_STRETCH:
        notes.append(
            f"other processes took CPU time: runs on one thread took {stretch:.2f}x as long on the clock as on the CPU. "
            f"Figures of one thread are CPU time; those of several threads are too long by what others took"
        )
    return notes


def _processor() -> tuple[str, list[str]]:
    """Name of the processor, and those of its instruction sets that matter here."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), []
    fields: dict[str, str] = {}
    for line in info.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    known = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), [flag for flag in _FLAGS if flag in known]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
