"""The weight update ``sparsegpt``: what a pruned weight took from the output is made up for by the weights to its right.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", ICML 2023; see
``reconstruction`` for the mathematics and ``weight_update`` for the order of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mfcompile.passes.reconstruction import Reconstructor
from mfcompile.passes.sparsity_patterns import Pattern
from mfcompile.passes.weight_update import UpdateOptions


@dataclass(frozen=True)
class SparseGptOptions(UpdateOptions):
    """How kept weights are rewritten; a damping of 0.01 is the paper's.

    Attributes:
        block_columns: columns whose errors are propagated together.
    """

    name: ClassVar[str] = "sparsegpt"
    block_columns: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("block_columns")

    def solver(self, gram: Tensor, pattern: Pattern) -> Reconstructor:
        """See UpdateOptions."""
        return Reconstructor(gram, self.damping, self.block_columns)
