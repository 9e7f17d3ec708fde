"""Patterns: the shape in which weights are removed. Budgets count units: single weights, or whole blocks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

from mfcompile.errors import InputError

UNSTRUCTURED = "unstructured"
BLOCK_PATTERNS = ("1x4", "4x1", "16x1")


class Pattern(ABC):
    """How weights of a site go together.

    Attributes:
        unit_weights: weights that are removed at once.
        fixed_sparsity: the sparsity that the pattern itself sets; None where it may be chosen.
    """

    unit_weights: int = 1
    fixed_sparsity: float | None = None

    def unit_grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(rows, columns) of the units of a site; weights outside of them stay."""
        return out_features, in_features

    @abstractmethod
    def unit_scores(self, scores: Tensor) -> Tensor:
        """(out_features, in_features) float32 -> one score per unit."""

    @abstractmethod
    def pruned_weights(self, units: Tensor, shape: tuple[int, int]) -> Tensor:
        """Units that are removed, bool, to the weights that are, bool of ``shape``."""

    def remainder(self, out_features: int, in_features: int) -> str | None:
        """What of a site does not fit the pattern, and what becomes of it, in words; None where all fits."""
        return None


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight on its own."""

    def unit_scores(self, scores: Tensor) -> Tensor:
        """The scores as they are."""
        return scores

    def pruned_weights(self, units: Tensor, shape: tuple[int, int]) -> Tensor:
        """The same."""
        return units


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of ``rows`` outputs by ``columns`` inputs, aligned to multiples of both; the last outputs and inputs of a
    site that fill none stay.

    A block is removed by the sum of its scores. Kernels read such weights a block at a time.
    """

    rows: int
    columns: int = 1

    @property
    def unit_weights(self) -> int:  # type: ignore[override]
        """Weights of a block."""
        return self.rows * self.columns

    def unit_grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Whole blocks along the outputs and the inputs."""
        return out_features // self.rows, in_features // self.columns

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Sums over whole blocks."""
        rows, columns = self.unit_grid(scores.shape[0], scores.shape[1])
        total = torch.zeros(rows, columns, dtype=torch.float32, device=scores.device)
        for row in range(self.rows):  # in a fixed order: the sum is the same for every layout and number of threads
            for column in range(self.columns):
                total += scores[row : rows * self.rows : self.rows, column : columns * self.columns : self.columns]
        return total

    def pruned_weights(self, units: Tensor, shape: tuple[int, int]) -> Tensor:
        """Every weight of a removed block."""
        pruned = torch.zeros(shape, dtype=torch.bool, device=units.device)
        rows, columns = units.shape[0] * self.rows, units.shape[1] * self.columns
        pruned[:rows, :columns] = units.repeat_interleave(self.rows, dim=0).repeat_interleave(self.columns, dim=1)
        return pruned

    def remainder(self, out_features: int, in_features: int) -> str | None:
        """The rows after the last whole block, or the inputs."""
        for name, size, block in (("rows", out_features, self.rows), ("inputs", in_features, self.columns)):
            if size % block:
                return f"its last {size % block} of {size} {name} fill no block of {block} and stay dense"
        return None


@dataclass(frozen=True)
class NOfM(Pattern):
    """Of every ``of`` consecutive inputs of an output row at most ``kept`` stay; the last inputs, if fewer, too."""

    kept: int
    of: int

    @property
    def fixed_sparsity(self) -> float | None:  # type: ignore[override]
        """The fraction that is removed."""
        return 1 - self.kept / self.of

    def unit_scores(self, scores: Tensor) -> Tensor:
        """The scores as they are."""
        return scores

    def pruned_weights(self, units: Tensor, shape: tuple[int, int]) -> Tensor:
        """The same."""
        return units

    def smallest(self, scores: Tensor) -> Tensor:
        """(out_features, in_features) bool: the ``of - kept`` smallest of every group; of equal scores the first."""
        out_features, in_features = scores.shape
        groups = ceil(in_features / self.of)
        padded = functional.pad(scores, (0, groups * self.of - in_features), value=float("-inf"))  # pruned, and cut off
        # Group by group it would be a sort of a few numbers; place by place it is a few comparisons of all groups.
        places = padded.reshape(out_features, groups, self.of).permute(2, 0, 1).contiguous()
        removed = torch.empty_like(places, dtype=torch.bool)
        for place in range(self.of):
            rank = torch.zeros_like(places[0], dtype=torch.uint8)
            for other in range(self.of):
                if other != place:
                    first = places[other] <= places[place] if other < place else places[other] < places[place]
                    rank += first
            removed[place] = rank < self.of - self.kept
        return removed.permute(1, 2, 0).reshape(out_features, -1)[:, :in_features]

    def remainder(self, out_features: int, in_features: int) -> str | None:
        """Inputs after the last whole group."""
        left = in_features % self.of
        return f"its last {left} of {in_features} inputs are no group of {self.of}: at most {self.kept} stay" if left else None


def parse_pattern(pattern: str) -> Pattern:
    """The pattern of that name.

    Args:
        pattern: "unstructured", "N:M" (N of M consecutive inputs stay, "2:4"), "1x4", "4x1" or "16x1" (outputs x inputs).

    Raises:
        InputError: it is none of these.
    """
    text = pattern.strip() if isinstance(pattern, str) else ""
    if text == UNSTRUCTURED:
        return Unstructured()
    if text in BLOCK_PATTERNS:
        rows, _, columns = text.partition("x")
        return Blocks(int(rows), int(columns))
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found:
        kept, of = int(found[1]), int(found[2])
        if 1 <= kept < of <= 64:
            return NOfM(kept, of)
        raise InputError(f"pattern={pattern!r}: N of M inputs stay, with 1 <= N < M <= 64; 2:4 keeps two of every four")
    hint = ". Blocks are outputs x inputs: did you mean 16x1?" if text == "1x16" else ""
    choices = f"{', '.join(BLOCK_PATTERNS[:-1])} or {BLOCK_PATTERNS[-1]}"
    raise InputError(f"pattern={pattern!r} is unknown; choose {UNSTRUCTURED}, N:M (2:4), {choices}{hint}")
