"""Benchmarks with made-up times, for tests of tables, sentences and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mfcompile.benchmark.result import Benchmark, Failure, InputSize, MeasuredVariant, SessionCost, summarize

MACHINE = {
    "processor": "Abacus 9000", "instruction_sets": ["beads"], "sparse_runtime": "avx512", "cores": 2, "memory_gib": 4.0,
    "load_average": 0.25, "system": "Linux", "python": "3.11", "onnxruntime": "1.31.1", "mfcompile": "0", "stretch": 1.0,
}  # fmt: skip

SECONDS: Mapping[tuple[int, int], Mapping[str, Sequence[float]]] = {
    (0, 1): {"dense": (0.010, 0.012, 0.011), "packed": (0.010, 0.0121, 0.0109), "runtime": (0.020, 0.024, 0.022)},
    (1, 1): {"dense": (0.100, 0.120, 0.110), "packed": (0.101, 0.119, 0.110), "runtime": (0.050, 0.048, 0.110 / 1.9)},
}
"""(size, threads) -> form -> seconds of three rounds: the runtime is half as fast at one token, twice as fast at 32."""


def cost(scale: float) -> SessionCost:
    return SessionCost(0.1 * scale, 0.02 * scale, 0.01 * scale, int(4e8 * scale), int(1e7 * scale), int(5e8 * scale))


def benchmark(**given: Any) -> Benchmark:
    timings = [
        timing
        for (size, threads), seconds in SECONDS.items()
        for timing in summarize(seconds, "dense", size=size, threads=threads, errors={"runtime": 2e-6, "packed": 0.0})
    ]
    plain: dict[str, Any] = {
        "model": {"name": "Net", "pruned_weights": 1000, "sparsity": 0.75},
        "variants": (
            MeasuredVariant("dense", "dense file", 400_000_000, cost(1.0)),
            MeasuredVariant("packed", "packed file", 160_000_000, cost(2.0)),
            MeasuredVariant("runtime", "packed file, sparse runtime", 160_000_000, cost(0.4)),
            MeasuredVariant("int8", "dense int8 file", reason="there is no int8 file"),
        ),
        "baseline": "dense",
        "sizes": (InputSize(1, 1, {"ids": (1, 1)}), InputSize(1, 32, {"ids": (1, 32)})),
        "timings": tuple(timings),
        "machine": MACHINE,
        "failures": (Failure("packed", 1, 2, "out of beads"),),
        "notes": ("a note",),
    }
    return Benchmark(**{**plain, **given})
