"""One gradient per batch as the rows of a matrix: what CHITA's Fisher information is made of."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mfcompile.errors import CalibrationError
from mfcompile.passes.gradients import LossRunner, Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Where the gradient of a weight, or of a part of it, goes in a row.

    Attributes:
        fqn: the weight.
        size: how many columns.
        part: gives these ``size`` numbers of a tensor in the layout of the parameter (a site's matrix, say); None for all.
    """

    fqn: str
    size: int
    part: Callable[[Tensor], Tensor] | None = None


def rows_size_bytes(count: int, columns: Sequence[Columns]) -> int:
    """Memory of ``gradient_rows``: 4 bytes for every weight and row."""
    return 4 * count * sum(item.size for item in columns)


def memory_size_bytes() -> int | None:
    """Memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def gradient_rows(
    runner: LossRunner, batches: Iterable[Any], columns: Sequence[Columns], count: int, *, progress: Progress | None = None
) -> Tensor:
    """The matrix A of CHITA (Benbaki et al., ICML 2023): row i is the gradient of the loss of batch i.

    A layer's gradient is moved into its row as soon as the backward pass has it, and let go: beside the matrix there is never
    more than the gradient of one layer. Say ``rows_size_bytes`` beforehand: the matrix is by far the largest thing.

    Args:
        runner: the model, with the weights and masks in force; call this inside ``runner.seeded``.
        batches: at least one batch; those after ``count`` are not read.
        columns: what a row holds, in order; a weight may give several parts.
        count: rows to make room for.
        progress: called with (rows done, ``count``) after every row.

    Returns:
        (n, p) float32 on the CPU: n = min(count, number of batches), p = sum of the sizes.

    Raises:
        CalibrationError: there is not enough memory (says how much is needed), there is no batch, or the loss of a batch is
            unusable.
    """
    width = sum(item.size for item in columns)
    needed, there = rows_size_bytes(count, columns), memory_size_bytes()
    if there is not None and needed > there:
        raise CalibrationError(
            f"{count} gradients of {width:,} weights need {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB. "
            f"Take fewer gradients (at most {max(there // rows_size_bytes(1, columns) - 1, 0)}), or prune fewer weights"
        )
    logger.info("%d gradients of %d weights: %.1f GB", count, width, needed / 1e9)
    with torch.inference_mode(False):  # else the backward pass, which never is in that mode, could not write into them
        rows = torch.zeros(count, width, dtype=torch.float32, device="cpu")
    places: dict[Tensor, list[tuple[Columns, int]]] = {}
    for item, start in zip(columns, accumulate((item.size for item in columns), initial=0), strict=False):
        places.setdefault(runner.leaves[item.fqn], []).append((item, start))
    done = 0

    def move(leaf: Tensor, gradient: Tensor) -> None:
        kept = runner.masked(leaf, gradient)
        for item, start in places.get(leaf, ()):
            part = kept if item.part is None else item.part(kept)
            rows[done, start : start + item.size] += part.reshape(-1).to(rows)

    with runner.sending(move):
        for batch in batches:
            runner.backward(batch, done)
            if not bool(torch.isfinite(rows[done]).all()):
                raise CalibrationError(f"the gradient of batch {done} holds NaN or infinity. Check this batch and the loss")
            done += 1
            if progress is not None:
                progress(done, count)
            if done == count:
                break
    if not done:
        raise CalibrationError("there is no batch to take gradients of: pass at least one batch")
    return rows[:done]
