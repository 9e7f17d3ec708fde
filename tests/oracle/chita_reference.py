"""CHITA in plain NumPy and float64, written from its equations, with and without the published code's defect.

Benbaki et al., "Fast as CHITA" (ICML 2023). n gradient rows A (n, p), dense weights w (p,), F(beta) = 1/2 |A w - A beta|^2
+ alpha.beta + l2 |beta - w|^2, alpha = (1/b) sum of the rows, l2 = n ridge / 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """F for some of the weights."""

    rows: Array
    weights: Array
    ridge: float
    samples: float

    @property
    def slope(self) -> Array:
        result: Array = self.rows.sum(axis=0) / self.samples
        return result

    def value(self, beta: Array) -> float:
        residual = self.rows @ self.weights - self.rows @ beta
        moved = beta - self.weights
        return float(0.5 * residual @ residual + self.slope @ beta + self.ridge * moved @ moved)

    def part(self, places: slice) -> Problem:
        return Problem(self.rows[:, places], self.weights[places], self.ridge, self.samples)


def problem(rows: NDArray[Any], weights: NDArray[Any], ridge: float, samples: float) -> Problem:
    l2 = float(np.float32(rows.shape[0] * ridge / 2))
    return Problem(rows.astype(np.float64), weights.astype(np.float64), l2, samples)


def largest(values: Array, count: int) -> Mask:
    """The ``count`` largest magnitudes; of equal ones the last."""
    chosen = np.zeros(values.size, np.bool_)
    chosen[np.argsort(np.abs(values), kind="stable")[values.size - count :]] = True
    return chosen


def threshold_step(this: Problem, beta: Array, kept: int, *, loses_blocks: bool) -> tuple[Array, Mask]:
    """T(y, A, beta, k): values and support."""
    support = largest(beta, kept)
    moved = this.weights - beta
    residual = this.rows @ this.weights - this.rows @ beta
    gradient = -this.rows.T @ residual + this.slope - 2 * this.ridge * moved
    direction = np.where(support, gradient, 0.0)
    along = this.rows @ direction
    step = float(direction @ this.slope - residual @ along - 2 * this.ridge * moved @ direction) / float(
        along @ along + 2 * this.ridge * direction @ direction
    )

    def stays(length: float) -> bool:
        size = np.abs(beta - length * gradient)
        return bool(support.all()) or float(size[support].max()) >= float(size[~support].max()) - 1e-10

    if stays(step):
        return np.where(support, beta - step * gradient, 0.0), support
    step /= 2
    halvings = 0
    while not stays(step) and halvings < 100:
        step /= 2
        halvings += 1
    best = np.where(support, beta, 0.0)
    lowest = this.value(best)
    for index in range(10):
        candidate = beta - step * gradient
        chosen = largest(candidate, kept)
        candidate = np.where(chosen, candidate, 0.0)
        if not this.value(candidate) < lowest:
            if index == 0 and loses_blocks:
                return np.zeros_like(best), np.zeros_like(support)
            break
        best, support, lowest = candidate, chosen, this.value(candidate)
        step *= 2
    return best, support


def refit(this: Problem, support: Mask) -> Array:
    """The normal equations of F on the support, as they stand."""
    rows = this.rows[:, support]
    matrix = rows.T @ rows + 2 * this.ridge * np.eye(rows.shape[1])
    right = rows.T @ (this.rows @ this.weights) + 2 * this.ridge * this.weights[support] - this.slope[support]
    values = np.zeros_like(this.weights)
    values[support] = np.linalg.solve(matrix, right)
    return values


def blocks(layers: Sequence[int], block_size: int) -> Iterator[slice]:
    """Blocks of every layer: at least ``block_size`` weights each where the layer has as many."""
    start = 0
    for size in layers:
        count = 1 if size < block_size else int(size / block_size)
        step = int(size / count)
        for index in range(count - 1):
            yield slice(start + index * step, start + (index + 1) * step)
        yield slice(start + (count - 1) * step, start + size)
        start += size


def solve(
    whole: Problem, layers: Sequence[int], kept: int, block_size: int, *, loses_blocks: bool, refits: bool = True
) -> tuple[Mask, Array]:
    """Mask and new values of all weights (the values of the steps alone where ``refits`` is off)."""
    beta, support = threshold_step(whole, whole.weights, kept, loses_blocks=loses_blocks)
    mask, values = np.zeros_like(support), np.zeros_like(beta)
    for places in blocks(layers, block_size):
        count = int(support[places].sum())
        if not count:
            continue
        this = whole.part(places)
        values[places], mask[places] = threshold_step(this, beta[places], count, loses_blocks=loses_blocks)
        if refits and mask[places].any():
            values[places] = refit(this, mask[places])
    return mask, values
