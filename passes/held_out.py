"""Which batches calibrate, and which ones pruned models are compared on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.calibration import check_arguments, normalize_batch, sample_count, source_of
from mfcompile.passes.random_numbers import seeded

SHARE = 8
"""One batch of so many is held out; fewer batches than this are all needed to calibrate."""

MOST = 8
"""Batches that are compared on, at most, where nobody asks for more."""


class FirstBatches:
    """The first batches of a set, read anew in every loop.

    Args:
        batches: gives the set.
        count: how many of it.
    """

    def __init__(self, batches: Callable[[], Iterable[Any]], count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._batches()), self._count)


@dataclass(frozen=True)
class SplitData:
    """Calibration data in two parts.

    Attributes:
        calibration: batches to calibrate with; None where the example inputs stand in.
        compared: batches to compare outputs on.
        is_held_out: no batch is in both parts.
        source: where they come from, in words.
        samples: how many samples calibrate, and how many are compared on.
    """

    calibration: FirstBatches | None
    compared: tuple[ExampleInputs, ...]
    is_held_out: bool
    source: str
    samples: tuple[int, int]


def split_batches(
    captured: CapturedGraph,
    batches: Callable[[], Iterable[Any]] | None,
    *,
    num_samples: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
) -> SplitData:
    """Divide calibration data: the last batches are held out to compare outputs on, where there are enough.

    One batch in eight is held out, eight at most. Where calibration stops at ``num_samples``, the batches after that are
    used. With fewer than eight batches, all of them calibrate, and outputs are compared on the last of them.

    Args:
        captured: the model.
        batches: gives all batches, from the start at every call; None for the example inputs.
        num_samples: calibrate with the batches up to the one that reaches this many samples; None for no limit.
        held_out: hold out this many batches; 0 for none; None decides as said.
        seed: seeds torch while the batches are read, as it is seeded for calibration: a loader that shuffles gives the same.

    Raises:
        InputError: an argument is not valid.
        CalibrationError: there is no batch, none is left to calibrate with, or one does not fit the model.
    """
    if held_out is not None and (isinstance(held_out, bool) or not isinstance(held_out, Integral) or held_out < 0):
        raise InputError(f"held_out must be a number of batches, or None; got {held_out!r}")
    if batches is None:
        if held_out:
            raise InputError(f"held_out={held_out}: there are no calibration batches to hold out. Give some, or leave it out")
        example = captured.example_inputs
        return SplitData(None, (example,), False, source_of(captured, None), (sample_count(example),) * 2)
    check_arguments([], num_samples, "auto")
    with seeded(seed, captured.module):
        read = _Reading(captured, batches, num_samples, held_out)
    count, held = read.divide()
    if count < 1:
        raise CalibrationError(
            f"there are {read.count} calibration batches, and {held} of them are to be held out: none is left to calibrate "
            f"with. Hold out fewer, or give more batches"
        )
    last = list(read.last)
    compared = last[len(last) - held :] if held else last[-MOST:]
    source = f"{held} held-out calibration {'batch' if held == 1 else 'batches'}" if held else "calibration data, none held out"
    samples = (sum(read.sizes[:count]), sum(sample_count(item) for item in compared))
    return SplitData(FirstBatches(batches, count), tuple(compared), held > 0, source, samples)


class _Reading:
    """All batches, read once; only the last of them are kept.

    Attributes:
        sizes: samples of every batch.
        last: the last batches.
    """

    def __init__(
        self, captured: CapturedGraph, batches: Callable[[], Iterable[Any]], num_samples: int | None, held_out: int | None
    ) -> None:
        self._held_out = held_out
        self.last: deque[ExampleInputs] = deque(maxlen=max(MOST, held_out or 0))
        self.sizes: list[int] = []
        self._enough: int | None = None
        for index, batch in enumerate(batches()):
            if self._enough is not None and index - self._enough >= self._wanted_after:
                break
            inputs = normalize_batch(captured, batch, index)
            self.last.append(inputs)
            self.sizes.append(sample_count(inputs))
            if num_samples is not None and self._enough is None and sum(self.sizes) >= num_samples:
                self._enough = index + 1
        if not self.sizes:
            raise CalibrationError("the calibration set is empty: give at least one batch")

    @property
    def count(self) -> int:
        """How many batches were read."""
        return len(self.sizes)

    @property
    def _wanted_after(self) -> int:
        """Batches to read after those that calibrate."""
        assert self._enough is not None
        return self._held_out if self._held_out is not None else min(MOST, max(1, self._enough // SHARE))

    def divide(self) -> tuple[int, int]:
        """(batches that calibrate, batches that are held out)."""
        if self._enough is not None and self.count > self._enough:
            return self._enough, self.count - self._enough
        held = self._held_out if self._held_out is not None else min(MOST, self.count // SHARE)
        return self.count - held, held
