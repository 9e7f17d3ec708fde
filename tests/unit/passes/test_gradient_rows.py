"""Gradients of single batches as the rows of one matrix: their order, their number, and what they take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mfcompile.errors import CalibrationError
from mfcompile.passes.gradient_rows import Columns, gradient_rows, rows_size_bytes
from mfcompile.passes.gradients import LossRunner
from tests.losses import BATCHES, PAIR, Pair, assert_close, by_autograd, chosen, loss_of, pair_batches, square
from tests.models import TinyVlm, tiny_vlm


def test_rows_are_the_gradients_of_single_batches() -> None:
    module: TinyVlm = tiny_vlm()
    fqns = chosen(module)[:4]
    columns = [Columns(fqn, module.get_parameter(fqn).numel()) for fqn in fqns]
    rows = gradient_rows(LossRunner(module, loss_of, fqns), BATCHES, columns, 5)
    assert rows.shape == (3, sum(item.size for item in columns))
    assert rows.dtype == torch.float32
    assert rows_size_bytes(3, columns) == rows.numel() * rows.element_size()
    for row, batch in zip(rows, BATCHES, strict=True):
        expected = by_autograd(module, [batch], fqns)
        assert_close(row, torch.cat([expected[fqn].reshape(-1) for fqn in fqns]))


def test_rows_hold_parts_in_the_order_that_is_asked_for() -> None:
    module, batches = Pair(), pair_batches()
    columns = [
        Columns("second.weight", 10, lambda item: item[3:].T),
        Columns("first.weight", 25),
        Columns("second.weight", 15, lambda item: item[:3]),
    ]
    runner = LossRunner(module, square, PAIR)
    runner.set_weights(None, {"first.weight": torch.eye(5) == 0})
    rows = gradient_rows(runner, batches, columns, 2)
    assert rows.shape == (2, 50), "batches after the count are not read"
    for row, batch in zip(rows, batches, strict=False):
        runner.clear()
        found = runner.accumulate([batch]).gradients
        second = found["second.weight"]
        assert torch.equal(
            row, torch.cat([second[3:].T.reshape(-1), found["first.weight"].reshape(-1), second[:3].reshape(-1)])
        )
        assert not found["first.weight"].diagonal().any()


def test_only_as_many_batches_are_read_as_there_are_rows() -> None:
    read: list[int] = []

    def stream() -> Iterator[Tensor]:
        for index, batch in enumerate(pair_batches(5)):
            read.append(index)
            yield batch

    gradient_rows(LossRunner(Pair(), square, PAIR), stream(), [Columns(PAIR[0], 25)], 2)
    assert read == [0, 1]


def test_rows_that_do_not_fit_into_memory_say_how_much_they_need() -> None:
    runner = LossRunner(Pair(), square, PAIR)
    huge = [Columns("first.weight", 10**15)]
    with pytest.raises(
        CalibrationError, match=r"50 gradients of 1,000,000,000,000,000 weights need 200000000\.0 GB, this machine has"
    ):
        gradient_rows(runner, pair_batches(), huge, 50)
    with pytest.raises(CalibrationError, match="no batch"):
        gradient_rows(runner, [], [Columns("first.weight", 25)], 1)
