"""A low-rank addition to a weight: what LoRA trains in the place of the weight itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A parametrization W -> W + scale * up @ down, of rank ``down.shape[0]`` (Hu et al., "LoRA", ICLR 2022, section 4.1).

    It starts as the identity: ``up`` is zero. Standing before a mask it gives mask * (W + scale * up @ down).

    Attributes:
        down: (rank, in_features).
        up: (out_features, rank).
        scale: what the product is multiplied by.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.down = nn.Parameter(torch.empty(rank, in_features, dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, dtype=weight.dtype, device=weight.device))
        self.scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, in the weight's shape and dtype."""
        return weight + self.scale * (self.up @ self.down)
