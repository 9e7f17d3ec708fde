"""The update ``gradual``: which weights of a layer stay is chosen anew, in steps, with the best values after each of them.

The masks that are given say how many weights every layer keeps, no more. A layer goes from dense to that number in steps
t = 1 .. T, of which each removes, at the values V that the step before it left,

    what is smallest of |v_ij| ||x_j||    until  s_t = s (1 - (1 - t / T)^3)  of the layer is gone,

and then solves for the values of what stays (``least_squares``). The score is Wanda's (Sun et al., ICLR 2024), the schedule
that of Zhu & Gupta, "To prune, or not to prune" (2017); choosing gradually, between updates, is from Boža, "Fast and
Effective Weight Update for Pruned Large Language Models" (TMLR 2024). Weights that carry the same information look equally
useful together, and one of them becomes precious once the others are gone: only values that were solved for tell.

Cost of a layer: that of ``least-squares`` at T sparsities, of which the first ones are the dearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mfcompile.passes.least_squares import LeastSquares
from mfcompile.passes.mask_selection import pruned_by_row
from mfcompile.passes.reconstruction import Reconstruction
from mfcompile.passes.selection import smallest
from mfcompile.passes.sparsity_patterns import NOfM, Pattern
from mfcompile.passes.weight_update import UpdateOptions


@dataclass(frozen=True)
class GradualOptions(UpdateOptions):
    """How weights are chosen and rewritten.

    Attributes:
        steps: T. With a pattern N:M there is one.
    """

    name: ClassVar[str] = "gradual"
    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("steps")

    def solver(self, gram: Tensor, pattern: Pattern) -> Gradual:
        """See UpdateOptions."""
        return Gradual(gram, pattern, self.damping, self.steps)


class Gradual(LeastSquares):
    """Chooses and solves for matrices that share one input.

    Args:
        gram: (in_features, in_features) X^T X, finite, not all zero.
        pattern: in which weights are removed.
        damping: as of LeastSquares.
        steps: T.
    """

    def __init__(self, gram: Tensor, pattern: Pattern, damping: float = 0.01, steps: int = 4) -> None:
        super().__init__(gram, damping)
        self._pattern, self._steps = pattern, steps
        self._norm = gram.double().diagonal().sqrt()

    def reconstruct(self, dense: Tensor, kept: Tensor, current: Tensor | None = None) -> Reconstruction:
        """Other kept weights, as many, with new values.

        A layer keeps as many of its weights, and where all rows of ``kept`` lose the same number, or the pattern says what a
        group keeps, so does every row and group. Where the output would be farther from the dense one than with the best
        values for ``kept``, these are the result.

        Args:
            dense: (out_features, in_features) W, whose output is the aim; any float dtype.
            kept: bool, of its shape; a layer that loses nothing, or all, stays.
            current: V, the values that kept weights have now; None for the dense ones.
        """
        given = super().reconstruct(dense, kept, current)
        aim, chosen = dense.double(), torch.ones_like(kept)
        values = aim
        for removed in self._schedule(kept):
            score = (values.abs() * self._norm).float().masked_fill_(~chosen, -1.0)  # what is gone goes first
            chosen = ~self._removed(score, removed)
            values = self._update(aim, chosen)
        weight = values.to(dense.dtype)
        error = float(self._error(aim, weight).sum()) if bool(weight.isfinite().all()) else torch.inf
        if not error < given.error:
            return given
        return Reconstruction(weight, given.masked_error, error, len(weight), chosen)

    def _schedule(self, kept: Tensor) -> list[Tensor]:
        """Step by step, (unit rows,) how many units of each row of units are gone, or (1,) how many of all."""
        if isinstance(self._pattern, NOfM):
            return [torch.zeros(0)]
        gone = self._pattern.unit_scores((~kept).float()) >= self._pattern.unit_weights
        by_row = gone.sum(1)
        is_by_row = len(by_row) > 1 and int(by_row.max() - by_row.min()) <= 1
        last = by_row if is_by_row else gone.sum().reshape(1)
        shares = (1 - (1 - step / self._steps) ** 3 for step in range(1, self._steps))
        return [*((last * share).long() for share in shares), last]

    def _removed(self, score: Tensor, removed: Tensor) -> Tensor:
        """Bool of the matrix's shape: what is gone, the smallest scores of all or of every row; of equal ones the first."""
        if isinstance(self._pattern, NOfM):
            return self._pattern.smallest(score)
        units = self._pattern.unit_scores(score)
        own = units.cpu()
        marked = smallest(own, int(removed)) if len(removed) == 1 else pruned_by_row(own, removed.tolist())
        return self._pattern.pruned_weights(marked.to(units.device), (score.shape[0], score.shape[1]))
