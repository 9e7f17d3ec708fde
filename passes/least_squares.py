"""The weight update ``least-squares``: the best values of the kept weights of every row, for a mask that is given.

The layer-wise problem of SparseGPT (Frantar & Alistarh, ICML 2023, Eq. 1), solved instead of approximated: for one row w of a
weight, with the set K of places that its mask keeps and H = X^T X + damping,

    v_K = argmin (w - v) H (w - v)^T  over v that are zero outside K  =  w_K + H_KK^-1 H_KR w_R^T,   R the pruned places,

one positive definite system per row. The damping draws v to w, not to zero, so that directions in which no calibration token
says anything stay as they were trained. That solving for a fixed support is what is left to gain at high sparsity is what
ALPS (Meng et al., NeurIPS 2024), which ends with conjugate gradients on the support, and Boža, "Fast and Effective Weight
Update for Pruned Large Language Models" (TMLR 2024), which iterates with ADMM, found on language models. Few weights stay in
a row when much is removed, so the systems are small here, and a Cholesky factor of each gives the optimum itself.

Cost of a layer: out_features * k^3 / 3 multiplications for k kept weights a row (SparseGPT: in_features^3 +
out_features * in_features^2). Where all rows keep the same places, as after structured removal, they share one system:
k^3 / 3 + out_features * k^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mfcompile.passes.reconstruction import RowReconstructor
from mfcompile.passes.sparsity_patterns import Pattern
from mfcompile.passes.weight_update import UpdateOptions

_SYSTEM_ELEMENTS = 1 << 22
"""Elements of the systems that are solved at a time: some 100 MiB in float64 with factors and gathered copies."""

_DAMPING_STEPS = 12
"""Times that the damping of a row's system may grow tenfold before the row is left as it is."""


@dataclass(frozen=True)
class LeastSquaresOptions(UpdateOptions):
    """How kept weights are rewritten; see UpdateOptions."""

    name: ClassVar[str] = "least-squares"

    def solver(self, gram: Tensor, pattern: Pattern) -> LeastSquares:
        """See UpdateOptions."""
        return LeastSquares(gram, self.damping)


class LeastSquares(RowReconstructor):
    """Least squares of every row over the places that its mask keeps.

    Args:
        gram: (in_features, in_features) X^T X, finite, not all zero.
        damping: what is added to its diagonal, as a fraction of the mean of the diagonal. Rows whose system cannot be
            factored get more; without any, an input that never moved leaves its weights undetermined.
        has_bias: the last input is 1 for every token, and the last weight of a row its bias. It is not damped, and does not
            count in the mean: the other weights are then those for inputs and outputs without their means.
    """

    def __init__(self, gram: Tensor, damping: float = 0.01, *, has_bias: bool = False) -> None:
        super().__init__(gram)
        self._hessian = gram.double().clone()
        diagonal = self._hessian.diagonal()[: -1 if has_bias else None]
        self._mean = float(diagonal.mean())
        diagonal.add_(damping * self._mean)

    def _update(self, weight: Tensor, kept: Tensor) -> Tensor:
        """Rows with about as many kept weights are solved together: shorter ones are filled up with rows of the identity."""
        if bool((kept == kept[:1]).all()):
            return self._update_together(weight, kept[0])
        counts = kept.sum(1)
        order = counts.argsort(descending=True, stable=True)
        lost = torch.where(kept, 0.0, weight) @ self._hessian  # H_KR w_R of every row, at all places
        result = torch.where(kept, weight, 0.0)
        start = 0
        while start < len(order) and (longest := int(counts[order[start]])):
            rows = order[start : start + max(1, _SYSTEM_ELEMENTS // longest**2)]
            start += len(rows)
            # The places of the kept weights of each row, first to last, then some that are not kept.
            places = kept[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
            is_there = torch.arange(longest, device=kept.device) < counts[rows].unsqueeze(1)
            system = self._hessian[places.unsqueeze(2), places.unsqueeze(1)]
            system.masked_fill_(~(is_there.unsqueeze(2) & is_there.unsqueeze(1)), 0.0)
            system.diagonal(dim1=1, dim2=2).masked_fill_(~is_there, 1.0)
            moved = self._solved(system, lost[rows].gather(1, places).masked_fill(~is_there, 0.0).unsqueeze(2)).squeeze(2)
            change = torch.zeros_like(result[rows]).scatter_(1, places, moved)
            result[rows] += change.masked_fill_(~kept[rows], 0.0)
        return result

    def _update_together(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The same where all rows keep the same places, (in_features,) bool: one system with a right-hand side for each."""
        places, gone = kept.nonzero().squeeze(1), (~kept).nonzero().squeeze(1)
        result = torch.where(kept, weight, 0.0)
        if len(places) and len(gone):
            lost = self._hessian[places.unsqueeze(1), gone] @ weight[:, gone].mT
            system = self._hessian[places.unsqueeze(1), places]
            result[:, places] += self._solved(system.unsqueeze(0), lost.unsqueeze(0)).squeeze(0).mT
        return result

    def _solved(self, system: Tensor, right: Tensor) -> Tensor:
        """(systems, k, n) solutions of (systems, k, k) systems; NaN where no damping makes a system positive definite."""
        factor, failed = torch.linalg.cholesky_ex(system)
        damping = 1e-10
        for _ in range(_DAMPING_STEPS):
            bad = failed != 0
            if not bool(bad.any()):
                break
            own = system[bad]
            own.diagonal(dim1=1, dim2=2).add_(damping * self._mean)
            factor[bad], failed[bad] = torch.linalg.cholesky_ex(own)
            damping *= 10
        solution = torch.cholesky_solve(right, factor)
        return solution.masked_fill_((failed != 0).view(-1, 1, 1), torch.nan)
