"""Describe the machine and measure on it."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch


def describe() -> dict[str, Any]:
    """Processor, cores, memory and versions, for the head of every result."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return {
        "processor": name,
        "cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Run two functions in turns; the median of the ratios of each round is the figure (second over first)."""
    first(), second()
    pairs = []
    for index in range(rounds):
        order = (first, second) if index % 2 == 0 else (second, first)
        times = {}
        for function in order:
            started = time.perf_counter()
            function()
            times[function] = time.perf_counter() - started
        pairs.append((times[first], times[second]))
    ratios = [second_s / first_s for first_s, second_s in pairs]
    return {
        "first_s": statistics.median(first_s for first_s, _ in pairs),
        "second_s": statistics.median(second_s for _, second_s in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "rounds": rounds,
    }


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure by how much the resident memory rises over its level at the start of the block, in MiB (sampled every 2 ms)."""
    process = psutil.Process()
    start = process.memory_info().rss
    result = {"rise_mib": 0.0}
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            result["rise_mib"] = max(result["rise_mib"], (process.memory_info().rss - start) / 2**20)
            finished.wait(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield result
    finally:
        finished.set()
        watcher.join()
