"""Pruning in several steps: how sparsity grows from step to step, and which batches a step reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import Diagnostic

SCHEDULES = ("exp", "linear", "const")
"""Density falls by the same factor in every step; sparsity rises by the same amount; all of it in the first step."""


def sparsity_at(schedule: str, sparsity: float, step: int, steps: int) -> float:
    """The sparsity after a step.

    "exp" is 1 - (1 - s)^(t/T) (de Jorge et al., "Progressive Skeletonization", ICLR 2021), "const" is s. "linear" is s t/T: the
    published code has s + (1 - s) t/T, which overshoots s at once and ends with nothing, and is not reproduced.

    Args:
        schedule: one of SCHEDULES.
        sparsity: s, of the last step.
        step: t, 1 <= t <= T.
        steps: T.
    """
    if step == steps or schedule == "const":
        return sparsity  # not by way of the formula, which may round to one weight less
    if schedule == "linear":
        return sparsity * step / steps
    return 1.0 - float((1.0 - sparsity) ** (step / steps))


def check_schedule(schedule: str) -> None:
    """Refuse a schedule that is not known.

    Raises:
        InputError: it is none of SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")


def check_count(name: str, value: object) -> None:
    """Refuse an option that counts something and is no positive integer.

    Raises:
        InputError: names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a positive integer, got {value!r}")


class BatchCycle:
    """Reads calibration batches step by step, and from the start again when they are used up.

    In one step no batch is read twice: a step that asks for more batches than there are gets each of them once.

    Args:
        batches: gives the batches from the start at every call.
    """

    def __init__(self, batches: Callable[[], Iterable[Any]]) -> None:
        self._batches = batches
        self._running: Iterator[Any] | None = None
        self._read = 0
        self._starts = 0
        self._length: int | None = None
        self._most = 0

    def take(self, count: int) -> Iterator[Any]:
        """At most ``count`` batches.

        Raises:
            CalibrationError: there is no batch at all.
        """
        taken = 0
        while taken < count:
            if self._running is None:
                self._running, self._read, self._starts = iter(self._batches()), 0, self._starts + 1
            for batch in self._running:
                self._read += 1
                taken += 1
                self._most = max(self._most, taken)
                yield batch
                if taken == count:
                    return
            self._running, self._length = None, self._read
            if not self._read:
                again = " when it was read once more: give a list or a loader, not an iterator" if self._starts > 1 else ""
                raise CalibrationError(f"the calibration set gave no batch{again}")
            if taken >= self._length:
                return

    def diagnostics(self, subject: str, steps: int, count: int) -> Iterator[Diagnostic]:
        """That batches were read more than once, or that steps had fewer than they asked for."""
        if self._length is None or (self._starts == 1 and self._most >= count):
            return
        if self._most < count:
            yield Diagnostic(
                subject,
                f"{count} batches per step were asked for, calibration has {self._length}: a step reads each of them once",
            )
        if self._starts > 1:
            yield Diagnostic(
                subject,
                f"{steps} steps read {steps * self._most:,} batches, calibration has {self._length:,}: the set was read "
                f"{self._starts} times",
            )
