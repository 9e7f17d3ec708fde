"""Layer-wise reconstruction: new values for the kept weights of one matrix, so that its output changes least.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", ICML 2023, Sec. 3, for a mask
that is given: H = X^T X + damping; columns go from left to right, and what a pruned weight took from the output is made up
for by the weights to the right of it. In the basis of the Cholesky factor of H^-1 all rows share one sequence of inverses
(the "Hessian synchronisation" of Sec. 3.2), although each row has a mask of its own.

Kept weights to the left of a pruned one are not moved: the result lies between the masked weights and the least-squares
optimum of every row, which takes a linear system per row: out_features * in_features^3 / 3 multiplications where this takes
in_features^3 + out_features * in_features^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_ROW_ELEMENTS = 1 << 24
"""Elements of a weight that are reconstructed at a time: 128 MiB in float64."""

_DAMPING_STEPS = 12
"""Times that the damping may grow tenfold before a matrix is given up."""


@dataclass(frozen=True)
class Reconstruction:
    """What became of one matrix.

    Attributes:
        weight: (out_features, in_features) in the dtype of the dense weight: zero where it is pruned.
        masked_error: squared error of the output over all tokens before, ||(W - M * V) X||^2.
        error: the same with the new values; never larger.
        rows: rows whose values changed.
        kept: bool, (out_features, in_features), where the update chose other weights to stay; None where it did not.
    """

    weight: Tensor
    masked_error: float
    error: float
    rows: int
    kept: Tensor | None = None


class RowReconstructor(ABC):
    """Reconstructs matrices that share one input, row by row.

    Args:
        gram: (in_features, in_features) X^T X, finite, not all zero.
    """

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram

    def reconstruct(self, dense: Tensor, kept: Tensor, current: Tensor | None = None) -> Reconstruction:
        """New values for the kept weights of a matrix.

        A row whose output would not come closer to the dense one, as stored, keeps its values.

        Args:
            dense: (out_features, in_features) W, whose output is the aim; any float dtype.
            kept: bool, of its shape.
            current: V, the values that kept weights have now; None for the dense ones.
        """
        result = torch.where(kept, dense if current is None else current, 0.0)
        rows = max(1, _ROW_ELEMENTS // dense.shape[1])
        before = after = 0.0
        changed = 0
        for start in range(0, dense.shape[0], rows):
            part = slice(start, start + rows)
            aim, mask = dense[part].double(), kept[part]
            new = self._update(aim, mask).to(dense.dtype)
            old_error, new_error = self._error(aim, result[part]), self._error(aim, new)
            better = (new_error < old_error) & new.isfinite().all(1)
            result[part] = torch.where(better.unsqueeze(1), new, result[part])
            before += float(old_error.sum())
            after += float(torch.where(better, new_error, old_error).sum())
            changed += int(better.sum())
        return Reconstruction(result, before, after, changed)

    def _error(self, aim: Tensor, weight: Tensor) -> Tensor:
        """(rows,) squared error of the output of every row over all tokens."""
        difference = aim - weight.double()
        return ((difference @ self._gram.double()) * difference).sum(1)

    @abstractmethod
    def _update(self, weight: Tensor, kept: Tensor) -> Tensor:
        """(rows, in_features) float64 values whose output is near that of ``weight``, float64; zero where not ``kept``."""


class Reconstructor(RowReconstructor):
    """SparseGPT's reconstruction.

    Args:
        gram: (in_features, in_features) X^T X, finite, not all zero.
        damping: what is added to its diagonal, as a fraction of the mean of the diagonal (0.01 in the paper).
        block_columns: columns whose errors are propagated together (B of the paper; it changes no value).

    Attributes:
        damping: what was used: grown until the matrix could be factored.

    Raises:
        ArithmeticError: no damping makes the matrix positive definite.
    """

    def __init__(self, gram: Tensor, damping: float = 0.01, block_columns: int = 128) -> None:
        super().__init__(gram)
        self._block_columns = block_columns
        self._factor, self.damping = _inverse_factor(gram, damping)

    def _update(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The columns from left to right; errors reach the columns of the same block at once, the others block by block.

        With H^-1 = U^T U, U upper triangular, removing weight j of a row changes the weights k > j of it by
        -w_j U_jk / U_jj (Eq. 3 of the paper on the remaining columns).
        """
        weight, factor = weight.clone(), self._factor
        pruned = (~kept).double()
        for start in range(0, weight.shape[1], self._block_columns):
            stop = min(start + self._block_columns, weight.shape[1])
            block, errors = weight[:, start:stop], torch.empty_like(weight[:, start:stop])
            for column in range(stop - start):
                along = factor[start + column, start + column : stop]
                error = block[:, column] * pruned[:, start + column] / along[0]
                block[:, column:].addr_(error, along, alpha=-1.0)
                errors[:, column] = error
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1.0)
        return weight.masked_fill_(~kept, 0.0)


def _inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """(in, in) float64 upper triangular U with U^T U = (gram + damping * mean diagonal)^-1, and the damping.

    With the order of the columns turned round, the Cholesky factor of H is upper triangular (H = R R^T), and U = R^-1: no
    inverse of H is formed, and an input that never moved (a row of zeros) reaches no other.
    """
    turned = gram.double().flip(0, 1)
    mean = float(turned.diagonal().mean())
    own = turned.diagonal().clone()
    for _ in range(_DAMPING_STEPS):
        turned.diagonal().copy_(own + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(turned)
        if not int(failed) and bool(factor.isfinite().all()):
            upper = factor.flip(0, 1)
            identity = torch.eye(len(own), dtype=upper.dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, identity, upper=True), damping
        damping = max(10 * damping, 1e-10)
    raise ArithmeticError(f"X^T X cannot be factored with a damping of {damping:g} times its mean diagonal")
