"""Pruning in steps: how sparsity grows, and which batches a step reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes.iteration import SCHEDULES, BatchCycle, check_count, check_schedule, sparsity_at


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.63, 0.75, 0.9, 0.99])
def test_sparsity_rises_and_ends_where_it_was_asked_to(schedule: str, sparsity: float) -> None:
    for steps in (1, 2, 3, 7, 60):
        found = [sparsity_at(schedule, sparsity, step, steps) for step in range(1, steps + 1)]
        assert found == sorted(found)
        assert found[-1] == sparsity, "exactly: a count is made of it"
        assert found[0] >= 0


def test_exponential_steps_keep_the_same_fraction_and_linear_ones_remove_the_same_number() -> None:
    density = [1 - sparsity_at("exp", 0.9, step, 5) for step in range(1, 6)]
    assert [two / one for one, two in zip([1.0, *density], density, strict=False)] == pytest.approx([0.1**0.2] * 5)
    linear = [sparsity_at("linear", 0.9, step, 5) for step in range(1, 6)]
    assert linear == pytest.approx([0.18, 0.36, 0.54, 0.72, 0.9])
    assert [sparsity_at("const", 0.9, step, 5) for step in range(1, 6)] == [0.9] * 5


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_counts_are_positive_integers(value: object) -> None:
    with pytest.raises(InputError, match=r"steps must be a positive integer, got"):
        check_count("steps", value)


def test_an_unknown_schedule_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="schedule='cubic' is unknown; choose one of exp, linear, const"):
        check_schedule("cubic")


def read(length: int, steps: int, count: int) -> tuple[list[list[int]], BatchCycle]:
    cycle = BatchCycle(lambda: range(length))
    return [list(cycle.take(count)) for _ in range(steps)], cycle


@pytest.mark.parametrize(
    ("length", "steps", "count", "expected"),
    [
        (6, 3, 2, [[0, 1], [2, 3], [4, 5]]),  # as many as are needed
        (7, 3, 2, [[0, 1], [2, 3], [4, 5]]),  # more
        (3, 3, 2, [[0, 1], [2, 0], [1, 2]]),  # again from the start
        (2, 3, 5, [[0, 1], [0, 1], [0, 1]]),  # never one twice in a step
        (3, 3, 3, [[0, 1, 2], [0, 1, 2], [0, 1, 2]]),
        (1, 2, 1, [[0], [0]]),
    ],
)
def test_batches_are_read_in_turn(length: int, steps: int, count: int, expected: list[list[int]]) -> None:
    assert read(length, steps, count)[0] == expected


def test_what_calibration_was_short_of_is_said() -> None:
    _, enough = read(6, 3, 2)
    assert list(enough.diagnostics("itersnip", 3, 2)) == []
    _, again = read(4, 3, 2)
    assert [str(item) for item in again.diagnostics("itersnip", 3, 2)] == [
        "itersnip: 3 steps read 6 batches, calibration has 4: the set was read 2 times"
    ]
    _, few = read(2, 1, 5)
    assert [str(item) for item in few.diagnostics("chita", 1, 5)] == [
        "chita: 5 batches per step were asked for, calibration has 2: a step reads each of them once"
    ]
    _, both = read(2, 3, 5)
    assert len(list(both.diagnostics("chita++", 3, 5))) == 2


def test_no_batch_is_refused_and_so_is_an_iterator_that_is_used_up() -> None:
    with pytest.raises(CalibrationError, match=r"the calibration set gave no batch$"):
        list(BatchCycle(list).take(1))
    numbers: Iterator[int] = iter(range(2))
    cycle = BatchCycle(lambda: numbers)
    with pytest.raises(CalibrationError, match="gave no batch when it was read once more: give a list or a loader"):
        [list(cycle.take(2)) for _ in range(2)]
