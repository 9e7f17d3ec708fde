"""What a benchmark of one model in several forms found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfcompile.files import publish_document

FORMAT_VERSION = 1

LEAST_DIFFERENCE = 0.03
"""A form is called faster or slower where three quarters of its rounds differ from the baseline by at least this fraction."""


@dataclass(frozen=True)
class InputSize:
    """One size of the inputs.

    Attributes:
        batch: samples; None where the inputs have no free batch dimension.
        tokens: length of the free sequence dimensions; None where there is none.
        shapes: input name -> shape.
    """

    batch: int | None
    tokens: int | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def label(self) -> str:
        """The size as people read it."""
        parts = [] if self.batch is None else [f"batch {self.batch}"]
        if self.tokens is not None:
            parts.append(f"{self.tokens} token{'' if self.tokens == 1 else 's'}")
        return ", ".join(parts) or "fixed size"


@dataclass(frozen=True)
class SessionCost:
    """What one session costs in a process of its own; medians over several processes.

    Seconds are CPU time of the process where the session has one thread, and time on the clock where it has more.

    Attributes:
        creation_seconds: to create the session, the file in the page cache.
        first_run_seconds: of the first run, in which the sparse runtime converts its weights.
        second_run_seconds: of the run after that.
        resident_bytes: memory that session and runs hold: resident set after the runs, less that of the process before it
            opened the file, onnxruntime and a session of a trivial graph in it. None where the system does not tell.
        run_bytes: how much came with the runs, mapped files apart: buffers of activations, and what the runtime converts.
        peak_bytes: highest resident set while the session was created and run, less the same start. None as above.
    """

    creation_seconds: float
    first_run_seconds: float
    second_run_seconds: float
    resident_bytes: int | None
    run_bytes: int | None
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON knows them."""
        return {
            "creation_ms": round(1e3 * self.creation_seconds, 2),
            "first_run_ms": round(1e3 * self.first_run_seconds, 3),
            "second_run_ms": round(1e3 * self.second_run_seconds, 3),
            "resident_bytes": self.resident_bytes,
            "run_bytes": self.run_bytes,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class MeasuredVariant:
    """One form of the model.

    Attributes:
        name: "dense", "packed", "runtime", ...
        description: what it is, in words.
        size_bytes: all its files together; None where there is none.
        cost: of its session; None where that was not measured.
        reason: why it could not be measured; None where it was.
    """

    name: str
    description: str
    size_bytes: int | None = None
    cost: SessionCost | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The form as JSON knows it."""
        return {
            "name": self.name,
            "description": self.description,
            "size_bytes": self.size_bytes,
            **({} if self.cost is None else self.cost.as_dict()),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Timing:
    """One form at one input size and number of threads.

    Attributes:
        variant: its name.
        size: index into ``Benchmark.sizes``.
        threads: threads inside one operator.
        seconds: median of one run over the rounds.
        seconds_low, seconds_high: its quartiles.
        speedup: median over the rounds of the baseline's time divided by this one's; above 1 is faster. None without baseline.
        speedup_low, speedup_high: its quartiles.
        rounds: rounds that were measured.
        max_error: largest difference from the outputs of the baseline, divided by the largest output; None without baseline.
    """

    variant: str
    size: int
    threads: int
    seconds: float
    seconds_low: float
    seconds_high: float
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    rounds: int
    max_error: float | None = None

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" than the baseline, or "same" where the spread or the difference says neither."""
        if self.speedup_low is not None and self.speedup_low > 1 + LEAST_DIFFERENCE:
            return "faster"
        if self.speedup_high is not None and self.speedup_high < 1 - LEAST_DIFFERENCE:
            return "slower"
        return "same"

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON knows them."""
        ratios = {"speedup": self.speedup, "speedup_low": self.speedup_low, "speedup_high": self.speedup_high}
        return {
            "variant": self.variant,
            "size": self.size,
            "threads": self.threads,
            "ms": round(1e3 * self.seconds, 4),
            "ms_low": round(1e3 * self.seconds_low, 4),
            "ms_high": round(1e3 * self.seconds_high, 4),
            **{name: None if value is None else round(value, 4) for name, value in ratios.items()},
            "verdict": self.verdict,
            "rounds": self.rounds,
            "max_error": self.max_error,
        }


@dataclass(frozen=True)
class Failure:
    """What could not be run: a form at a size and number of threads, and why."""

    variant: str
    size: int
    threads: int
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """One model in several forms, measured in turns in one process.

    Attributes:
        model: file or class, and what is known of it.
        variants: every form that was asked for, the ones that are missing too.
        baseline: what the others are compared with: "dense", or the first form there is.
        sizes: the input sizes.
        timings: one per form, size and number of threads.
        failures: what could not be run.
        machine: processor, instruction set, cores, load, versions.
        notes: what the reader should know: dimensions that are fixed, sizes that do not run, a busy machine.
    """

    model: Mapping[str, Any]
    variants: tuple[MeasuredVariant, ...]
    baseline: str
    sizes: tuple[InputSize, ...]
    timings: tuple[Timing, ...]
    machine: Mapping[str, Any]
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    def timing(self, variant: str, size: int = 0, threads: int | None = None) -> Timing:
        """The figures of one form.

        Args:
            variant: its name.
            size: index into ``sizes``.
            threads: None for the first that was measured.

        Raises:
            KeyError: it was not measured there.
        """
        for item in self.timings:
            if item.variant == variant and item.size == size and threads in (None, item.threads):
                return item
        raise KeyError((variant, size, threads))

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it."""
        return {
            "format": "mfcompile.benchmark",
            "format_version": FORMAT_VERSION,
            "model": dict(self.model),
            "machine": dict(self.machine),
            "baseline": self.baseline,
            "variants": [variant.as_dict() for variant in self.variants],
            "sizes": [
                {
                    "label": size.label,
                    "batch": size.batch,
                    "tokens": size.tokens,
                    "shapes": {name: list(shape) for name, shape in size.shapes.items()},
                }
                for size in self.sizes
            ],
            "timings": [timing.as_dict() for timing in self.timings],
            "failures": [
                {"variant": item.variant, "size": item.size, "threads": item.threads, "reason": item.reason}
                for item in self.failures
            ],
            "notes": list(self.notes),
        }

    def save(self, output_dir: Path | str, *, overwrite: bool = False) -> Path:
        """Write bench.json, bench.png and bench.svg into a new directory, complete or not at all.

        Raises:
            InputError: the directory is not empty (see ``overwrite``) or not writable.
        """
        from mfcompile.benchmark.plot import plot_benchmark

        return publish_document(self.as_dict(), Path(output_dir), "bench", plot_benchmark, overwrite=overwrite)


def summarize(
    seconds: Mapping[str, Sequence[float]],
    baseline: str,
    *,
    size: int,
    threads: int,
    errors: Mapping[str, float | None] | None = None,
) -> list[Timing]:
    """Medians and quartiles of every form, and of its ratios to the baseline in the same round.

    Args:
        seconds: name -> seconds of one run in every round; round i of one form was next to round i of the others.
        baseline: name of the form that others are compared with; where it has no times, there are no ratios.
        size, threads: of these rounds.
        errors: name -> largest difference of outputs.
    """
    against = seconds.get(baseline)
    found = []
    for name, own in seconds.items():
        low, middle, high = quartiles(own)
        ratios = quartiles([first / second for first, second in zip(against, own, strict=True)]) if against else (None,) * 3
        found.append(
            Timing(name, size, threads, middle, low, high, ratios[1], ratios[0], ratios[2], len(own), (errors or {}).get(name))
        )
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated between the values there are (inclusive)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
