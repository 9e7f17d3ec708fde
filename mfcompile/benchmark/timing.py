"""Sessions of several files, run in turns in one process: the ratio of two runs that stood side by side is the figure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mfcompile.benchmark.result import Failure, Timing, summarize
from mfcompile.benchmark.sizes import SizedInputs
from mfcompile.errors import InputError
from mfcompile.session import make_feeds
from mfcompile.session_options import session_options

SECONDS = 6.0
"""About how long one input size and number of threads is measured where the number of rounds is left open."""

LEAST_ROUNDS, MOST_ROUNDS = 7, 200

TURN_SECONDS = 0.002
"""A turn repeats its run until it takes about this long, so that the clock is fine enough."""

MOST_REPEATS = 50

CPU_CLOCK_IS_FINE = time.get_clock_info("thread_time").resolution <= 1e-5
"""Where the CPU clock of a thread ticks in milliseconds, time on the clock is taken for one thread too."""


@dataclass(frozen=True)
class SessionFile:
    """A file and how it is loaded.

    Attributes:
        name: of the form.
        path: the .onnx file.
        library: a library of custom operators to register; None for stock onnxruntime.
        is_decoded: packed weights are decoded by ``mfcompile.load_session`` instead of by onnxruntime.
    """

    name: str
    path: Path
    library: str | None = None
    is_decoded: bool = False

    def open(self, threads: int) -> Any:
        """A session on the CPU whose threads stop when a run ends, so that they take nothing from the next session's.

        Raises:
            InputError: onnxruntime refuses the file.
        """
        options = session_options(threads)
        options.log_severity_level = 4  # what is refused is raised, and said once
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            if self.library is not None:
                options.register_custom_ops_library(self.library)
            if self.is_decoded:
                from mfcompile.loading import load_session

                return load_session(self.path, runtime=False, session_options=options)
            return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"onnxruntime {onnxruntime.__version__} cannot load it: {first_line(error)}") from error


@dataclass
class Clock:
    """Time of the runs on one thread, on the clock and on the CPU, to tell whether others took their share."""

    wall: float = 0.0
    cpu: float = 0.0

    @property
    def stretch(self) -> float | None:
        """Wall-clock time over CPU time; None before the first run."""
        return self.wall / self.cpu if self.cpu > 0 else None


@dataclass(frozen=True)
class Measured:
    """What was timed, and what failed."""

    timings: list[Timing] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def first_line(error: BaseException) -> str:
    """The first line of an error, without a full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def measure(
    files: Sequence[SessionFile],
    sizes: Sequence[SizedInputs],
    *,
    baseline: str,
    threads: int,
    rounds: int | None,
    clock: Clock,
    progress: Callable[[], None] = lambda: None,
) -> Measured:
    """Time every file at every size, on one number of threads.

    With one thread the figure is CPU time of the calling thread, which does all the work; with more it is time on the clock.

    Args:
        files: the forms; one that does not load or run is reported and the others are measured.
        sizes: inputs.
        baseline: name of the form that the others are compared with.
        threads: threads inside one operator.
        rounds: how often every form has its turn; None for what fits into ``SECONDS``.
        clock: adds up the times of runs on one thread.
        progress: called after every size.
    """
    found = Measured()
    sessions: dict[str, Any] = {}
    for file in files:
        try:
            sessions[file.name] = file.open(threads)
        except InputError as error:
            found.failures.extend(Failure(file.name, index, threads, str(error)) for index in range(len(sizes)))
    for index, sized in enumerate(sizes):
        runs, errors = _prepare(sessions, sized, baseline, index, threads, found.failures)
        if runs:
            seconds = _take_turns(runs, rounds, threads, clock)
            found.timings.extend(summarize(seconds, baseline, size=index, threads=threads, errors=errors))
        progress()
    return found


Run = Callable[[], Any]


def _prepare(
    sessions: Mapping[str, Any], sized: SizedInputs, baseline: str, size: int, threads: int, failures: list[Failure]
) -> tuple[dict[str, Run], dict[str, float | None]]:
    """A function that runs each form, warmed up, and how far its outputs are from the baseline's."""
    runs: dict[str, Run] = {}
    outputs: dict[str, list[Any]] = {}
    for name, session in sessions.items():
        try:
            feeds, _ = make_feeds(session, sized.inputs)
            names = [node.name for node in session.get_outputs()]
            run = _runner(session, names, feeds)
            outputs[name] = [value.numpy() for value in run()]
            runs[name] = run
        except Exception as error:
            failures.append(Failure(name, size, threads, f"it does not run: {first_line(error)}"))
    errors: dict[str, float | None] = {}
    for name in tuple(runs):
        difference = output_error(outputs[name], outputs[baseline]) if baseline in outputs else None
        errors[name] = difference
        if difference is not None and not math.isfinite(difference):
            failures.append(Failure(name, size, threads, "its outputs hold NaN or infinity where the baseline's do not"))
            del runs[name]
    return runs, errors


def _runner(session: Any, names: list[str], feeds: dict[str, Any]) -> Run:
    return lambda: session.run_with_ort_values(names, feeds)


def output_error(own: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Largest difference of any output, divided by the largest value of that output of the baseline; NaN equals NaN.

    Infinite where shapes differ, or where one is finite and the other is not.
    """
    worst = 0.0
    for first, second in zip(own, wanted, strict=True):
        left, right = (np.asarray(item, np.float64) for item in (first, second))
        if left.shape != right.shape or not np.array_equal(np.isfinite(left), np.isfinite(right)):
            return math.inf
        finite = np.isfinite(right)
        if finite.any():
            scale = float(np.abs(right[finite]).max())
            difference = float(np.abs(left[finite] - right[finite]).max())
            worst = max(worst, difference / scale if scale else difference)
    return worst


def _take_turns(runs: Mapping[str, Run], rounds: int | None, threads: int, clock: Clock) -> dict[str, tuple[float, ...]]:
    """Run every form in turn (a b c, c b a, a b c, ...): seconds of one run in every round."""
    pilot = {name: min(_time(run, 1, threads, None) for _ in range(2)) for name, run in runs.items()}
    repeats = min(MOST_REPEATS, max(1, math.ceil(TURN_SECONDS / max(min(pilot.values()), 1e-7))))
    if rounds is None:
        rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(SECONDS / (repeats * sum(pilot.values())))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = tuple(runs)
    for turn in range(rounds):
        order = names if turn % 2 == 0 else names[::-1]
        for name in order:
            seconds[name].append(_time(runs[name], repeats, threads, clock))
    return {name: tuple(times) for name, times in seconds.items()}


def _time(run: Run, repeats: int, threads: int, clock: Clock | None) -> float:
    """Seconds of one run, the mean of several."""
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        run()
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    if threads != 1 or not CPU_CLOCK_IS_FINE:
        return wall / repeats
    if clock is not None:
        clock.wall += wall
        clock.cpu += cpu
    return cpu / repeats
