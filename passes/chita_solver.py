"""CHITA's sparse least squares: which weights stay, and the values that make up for those that go.

Benbaki et al., "Fast as CHITA: Neural Network Pruning with Combinatorial Optimization" (ICML 2023): the blockwise heuristic
with the first-order term. For n gradient rows A (n, p) and dense weights w (p,)::

    F(beta) = 1/2 |A w - A beta|^2 + alpha.beta + l2 |beta - w|^2,    at most k weights of beta not zero,

with alpha = (1/b) sum of the rows, b samples behind a row, l2 = n ridge / 2. One threshold step over all weights gives every
block its number of weights, one step and an exact solve in every block give the weights.

Two defects of the published code are not reproduced: a block whose first candidate is no better than what it started from
came back empty, all its weights pruned (here it keeps what it started from), and a block of which nothing is pruned raised
an error. Survivors are counted by the support, so that a survivor whose value is exactly zero still counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfcompile.passes.selection import smallest

_SLACK = 1e-10
"""How far the largest survivor may lie below the largest other before a step counts as leaving the support."""

_HALVINGS, _CANDIDATES = 100, 10
_NO_SLOPE = 1e-8
"""Norm of alpha up to which nothing pulls the weights, and magnitude alone decides."""

_CHUNK = 1 << 16
"""Columns that are added up at a time in float64, so that decisions do not hang on the last bits, or on the threads."""

_LARGE = 1 << 20
"""Weights from which on ranking is shared out among threads."""


@dataclass(frozen=True)
class SparseLeastSquares:
    """The problem of some weights: all of them, or those of a block.

    Attributes:
        rows: A, (n, p) gradients of n batches.
        weights: w, (p,), of the dtype of the rows.
        ridge: l2.
        samples: b.
        alive: (p,) bool, weights that may stay; None for all.
    """

    rows: Tensor
    weights: Tensor
    ridge: float
    samples: float
    alive: Tensor | None = None

    @property
    def slope(self) -> Tensor:
        """Alpha, (p,): the mean gradient of one sample."""
        return self.rows.sum(0) / self.samples

    def value(self, beta: Tensor, slope: Tensor) -> float:
        """F(beta)."""
        moved = self.weights - beta
        residual = _times(self.rows, moved)
        return 0.5 * float(residual @ residual) + _dot(slope, beta) + self.ridge * _dot(moved, moved)

    def gradient(self, beta: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of F, (p,), and the residual A w - A beta, (n,) float64."""
        moved = self.weights - beta
        residual = _times(self.rows, moved)
        return slope - self.rows.T @ residual.to(self.rows) - 2 * self.ridge * moved, residual

    def block(self, start: int, stop: int) -> SparseLeastSquares:
        """The problem of a range of weights alone, in float64."""
        alive = None if self.alive is None else self.alive[start:stop]
        rows, weights = self.rows[:, start:stop].double(), self.weights[start:stop].double()
        return SparseLeastSquares(rows, weights, self.ridge, self.samples, alive)


@dataclass(frozen=True)
class Solution:
    """What stays.

    Attributes:
        support: (p,) bool, exactly the number of weights that was asked for.
        weights: (p,) their values; zero elsewhere.
    """

    support: Tensor
    weights: Tensor


def solve(
    rows: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    kept: int,
    *,
    samples: float,
    ridge: float = 1e-5,
    block_size: int = 10_000,
    alive: Tensor | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Solution:
    """Choose ``kept`` weights and their values.

    Memory beside the arguments: six vectors of the size of ``weights``, and one block's rows in float64.

    Args:
        rows: A, (n, p) float32.
        weights: w, (p,) float32: layer after layer.
        layers: number of weights of every layer; a block lies in one layer. They sum to p.
        kept: k, 0 <= k <= p (and <= the number of ``alive``).
        samples: b, samples behind one row.
        ridge: lambda; positive.
        block_size: a layer with fewer weights is one block; others are cut into equal blocks of at least so many.
        alive: (p,) bool, weights that may stay; None for all.
        progress: called with (blocks done, blocks in all).
    """
    l2 = float(np.float32(rows.shape[0] * ridge / 2))
    whole = SparseLeastSquares(rows, weights, l2, samples, alive)
    beta, chosen = threshold_step(whole, weights, kept)
    parts = list(blocks(layers, block_size))
    support, values = torch.zeros_like(chosen), torch.zeros_like(weights)
    for done, (start, stop) in enumerate(parts):
        count = int(chosen[start:stop].sum())
        if count:
            problem = whole.block(start, stop)
            _, support[start:stop] = threshold_step(problem, beta[start:stop].double(), count)
            values[start:stop] = refit(problem, support[start:stop])
        if progress is not None:
            progress(done + 1, len(parts))
    return Solution(support, values)


def blocks(layers: Sequence[int], block_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every block; a layer's last block takes what is left over."""
    start = 0
    for size in layers:
        count = max(size // block_size, 1)
        step = size // count
        for index in range(count):
            yield start + index * step, start + (size if index == count - 1 else (index + 1) * step)
        start += size


def threshold_step(problem: SparseLeastSquares, beta: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """One step of gradient descent on the support of ``beta``, or a line search over supports where that step leaves it.

    Args:
        problem: the problem.
        beta: (p,) where to start, of the dtype of the problem.
        kept: how many weights stay.

    Returns:
        (p,) values, zero outside the support, and the support, (p,) bool with exactly ``kept`` set.
    """
    support = _largest(beta, kept, problem.alive)
    slope = problem.slope
    if float(torch.linalg.vector_norm(slope)) <= _NO_SLOPE:
        return beta * support, support
    gradient, residual = problem.gradient(beta, slope)
    step = _step_length(problem, beta, slope, gradient * support, residual)
    if _stays(beta, gradient, step, support):
        return (beta - step * gradient).mul_(support), support
    return _search(problem, beta, slope, gradient, step / 2, support)


def _step_length(problem: SparseLeastSquares, beta: Tensor, slope: Tensor, direction: Tensor, residual: Tensor) -> float:
    """The minimum of F along a direction, in closed form."""
    along = _times(problem.rows, direction)
    curvature = float(along @ along) + 2 * problem.ridge * _dot(direction, direction)
    pull = _dot(problem.weights - beta, direction)
    descent = _dot(direction, slope) - float(residual @ along) - 2 * problem.ridge * pull
    return descent / curvature if curvature else 0.0


def _stays(beta: Tensor, gradient: Tensor, step: float, support: Tensor) -> bool:
    """After the step, the largest weight of the support is still as large as the largest of the others.

    The largest, not the smallest, of the support: as published.
    """
    moved = (beta - step * gradient).abs_()
    inside, outside = moved[support], moved[~support]
    if not inside.numel() or not outside.numel():
        return True
    return float(inside.max()) >= float(outside.max()) - _SLACK


def _search(
    problem: SparseLeastSquares, beta: Tensor, slope: Tensor, gradient: Tensor, step: float, support: Tensor
) -> tuple[Tensor, Tensor]:
    """From a step that stays on, ever longer steps as long as F falls, each with the support of its own largest weights."""
    kept = int(support.sum())
    for _ in range(_HALVINGS):
        if _stays(beta, gradient, step, support):
            break
        step /= 2
    best = beta * support  # the published code has nothing here, and loses the block when no candidate is better
    lowest = problem.value(best, slope)
    for _ in range(_CANDIDATES):
        candidate = beta - step * gradient
        chosen = _largest(candidate, kept, problem.alive)
        candidate.mul_(chosen)
        value = problem.value(candidate, slope)
        if not value < lowest:
            break
        best, support, lowest = candidate, chosen, value
        step *= 2
    return best, support


def refit(problem: SparseLeastSquares, support: Tensor) -> Tensor:
    """The minimum of F over the weights of a support.

    The normal equations (A_S^T A_S + 2 l2) beta_S = A_S^T A w + 2 l2 w_S - alpha_S, solved for beta_S - w_S: since alpha is a
    combination of the rows too, beta_S - w_S = A_S^T (A_S A_S^T + 2 l2)^-1 (A w - A_S w_S - 1/b), by the identity of Woodbury a
    system of n unknowns. Nothing is divided by l2, which is tiny: the published form loses three digits by that.

    Args:
        problem: the problem, in float64.
        support: (p,) bool.

    Returns:
        (p,) values, zero outside the support.
    """
    rows, weights = problem.rows[:, support], problem.weights[support]
    values = torch.zeros_like(problem.weights)
    target = problem.rows @ problem.weights - rows @ weights - 1.0 / problem.samples
    if rows.shape[0] <= rows.shape[1]:
        values[support] = weights + rows.T @ _solve(rows @ rows.T, 2 * problem.ridge, target)
    else:
        values[support] = weights + _solve(rows.T @ rows, 2 * problem.ridge, rows.T @ target)
    return values


def _solve(gram: Tensor, shift: float, target: Tensor) -> Tensor:
    """(gram + shift)^-1 target. By eigenvalues: rounding makes those of a Gram matrix negative, and the shift is tiny."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    solution: Tensor = vectors @ ((vectors.T @ target) / (eigenvalues.clamp(min=0) + shift))
    return solution


def _times(rows: Tensor, vector: Tensor) -> Tensor:
    """A v, (n,) float64."""
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for part, numbers in zip(torch.split(rows, _CHUNK, dim=1), torch.split(vector, _CHUNK), strict=True):
        total += part.double() @ numbers.double()
    return total


def _dot(one: Tensor, two: Tensor) -> float:
    """u.v in float64."""
    parts = zip(torch.split(one, _CHUNK), torch.split(two, _CHUNK), strict=True)
    return float(sum(float(left.double() @ right.double()) for left, right in parts))


def _largest(values: Tensor, count: int, alive: Tensor | None) -> Tensor:
    """Mark the ``count`` largest magnitudes among the weights that may stay; of equal ones the last."""
    ranked = values.abs()
    if alive is not None:
        ranked.masked_fill_(~alive, -1.0)
    pruned = ranked.numel() - count
    if pruned <= 0 or count <= 0:
        return torch.full_like(ranked, count > 0, dtype=torch.bool)
    if ranked.numel() >= _LARGE:
        return ~smallest(ranked, pruned)
    array = ranked.numpy()
    limit = np.partition(array, pruned - 1)[pruned - 1]
    chosen = array > limit
    missing = count - int(np.count_nonzero(chosen))
    if missing:
        chosen[np.flatnonzero(array == limit)[-missing:]] = True
    return torch.from_numpy(chosen)
