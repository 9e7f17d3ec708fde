"""Reductions: an activation becomes one sum of squares per feature, and repeats of it are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mfcompile.region import Reading

_CHUNK_ROWS = 256
"""Rows that are summed in float32."""

_PIECE_ELEMENTS = 1 << 19
"""Elements that are squared at a time: 2 MiB in float32, about what a core's second-level cache holds. Squares of a whole
activation would be written to memory and read back, which takes longer than the sum itself."""

_REPEAT_RTOL = 1e-6
"""Sums of the same activation are equal to the last bit or two of float32."""


@dataclass(frozen=True)
class Reduction:
    """One activation, reduced.

    Attributes:
        sum_of_squares: (in_features,) float64, over all counted rows.
        token_count: rows that were counted.
        padding_count: rows that were left out.
        sample_count: samples that the rows belong to.
        by_sample: where asked for, what tells repeats of a sample from one another.
        weighted: where tokens are weighed, the norms of every sample.
    """

    sum_of_squares: Tensor
    token_count: int
    padding_count: int
    sample_count: int
    by_sample: SampleSums | None = None
    weighted: WeightedNorms | None = None


@dataclass(frozen=True)
class WeightedNorms:
    """Norms of one activation whose tokens are weighed, sample by sample.

    Attributes:
        norms: (samples, in_features) float64, (sum_n w_n x_n^2)^(1/2).
        counted: (samples,) bool, False where all tokens are padding.
    """

    norms: Tensor
    counted: Tensor

    def of(self, samples: Tensor) -> WeightedNorms:
        """Of some samples: (samples,) bool. All of them where samples are told apart in another way here."""
        if samples.shape != self.counted.shape:
            return self
        return WeightedNorms(self.norms[samples.to(self.norms.device)], self.counted[samples.to(self.counted.device)])


@dataclass(frozen=True)
class SampleSums:
    """Sums of one activation, sample by sample.

    Attributes:
        sums: (samples, 2, in_features) float64 sums of squares, plain and weighted by the place of the row.
        tokens: (samples,) rows that were counted.
        rows: rows of every sample, counted or not.
    """

    sums: Tensor
    tokens: Tensor
    rows: int


def read(activation: Tensor, reading: Reading) -> Tensor:
    """The activation that the dimensions of a reading count in: cut into patches where a convolution reads it.

    Args:
        activation: any; (..., in, *places) for a convolution.
        reading: how it is read.

    Returns:
        The activation itself, or (..., in, *patches, *kernel): a view, unless zeros are padded.
    """
    patches = reading.patches
    if patches is None:
        return activation
    if any(patches.padding):
        activation = functional.pad(activation, [side for size in reversed(patches.padding) for side in (size, size)])
    for size, step in zip(patches.kernel, patches.stride, strict=True):
        activation = activation.unfold(-len(patches.kernel), size, step)
    return activation


def reduce_activation(
    activation: Tensor,
    feature_dim: int | tuple[int, ...] = -1,
    keep: Tensor | None = None,
    *,
    batch_size: int | None = None,
    by_sample: bool = False,
) -> Reduction:
    """Sum of squares of every feature over all kept rows (the inner sum of ||a||_2, Eq. 4 and 5).

    Rows of a sample are summed in float32, a few hundred at a time; the rest is added in float64: the result depends
    neither on how samples are batched nor on their order beyond the last bit of float64. An activation that is float64
    itself is summed in float64 throughout.

    Args:
        activation: (..., in_features), or (..., in_features, n) with feature_dim=-2; any float dtype.
        feature_dim: dimension of the features, counted from the end; several are read as one, in their order.
        keep: bool, sizes of the activation without the feature dimensions; False rows are padding.
        batch_size: samples in the batch, for an activation whose rows are all in one dimension.
        by_sample: also give the sums of every sample.

    Returns:
        The reduction; a row that is left out cannot spread NaN.
    """
    rows = features_last(activation, (feature_dim,) if isinstance(feature_dim, int) else feature_dim)
    leading = rows.shape[:-1]
    samples = int(leading[0]) if len(leading) > 1 else 1
    if len(leading) == 1 and batch_size and leading[0] % batch_size == 0:
        samples = batch_size
    matrix = rows.reshape(samples, -1, rows.shape[-1])
    count = int(matrix.shape[1])
    kind = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    if keep is None and not by_sample:
        sums = _weighted_squares(torch.ones((), dtype=kind, device=matrix.device).expand(samples, 1, count), matrix)
        return Reduction(sums[:, 0].sum(0), samples * count, 0, samples)
    weights = torch.ones((), dtype=kind, device=matrix.device).expand(samples, 1, count)
    tokens = torch.full((samples,), count, device="cpu")
    if keep is not None:
        kept = keep.reshape(samples, 1, count)
        weights, tokens = kept.to(kind), kept.sum(dim=(1, 2)).cpu()
    if by_sample:
        weights = torch.cat([weights, weights * torch.linspace(1.0, 2.0, count, dtype=kind, device=matrix.device)], dim=1)
    sums = _weighted_squares(weights, matrix)
    if keep is not None and not bool(torch.isfinite(sums).all()):
        sums = _weighted_squares(weights, torch.where(kept.mT, matrix, 0.0))
    counted = int(tokens.sum())
    return Reduction(
        sums[:, 0].sum(0),
        counted,
        samples * count - counted,
        samples,
        SampleSums(sums, tokens, count) if by_sample else None,
    )


def weighted_norms(rows: Tensor, weights: Tensor, counted: Tensor) -> WeightedNorms:
    """(sum_n w_n x_n^2)^(1/2) of every sample and feature: the norm of Eq. 4 of CoMP (CVPR 2026).

    Args:
        rows: (samples, tokens, in_features), any float dtype.
        weights: (samples, tokens), not negative; zero for padding.
        counted: (samples,) bool, False where all tokens are padding.

    Returns:
        The norms; a token of weight zero cannot spread NaN.
    """
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    factors = weights.to(kind)[:, None, :]
    sums = _weighted_squares(factors, rows)
    if not bool(torch.isfinite(sums).all()):
        sums = _weighted_squares(factors, torch.where((weights > 0)[:, :, None], rows, 0.0))
    return WeightedNorms(sums[:, 0].sqrt(), counted)


def features_last(activation: Tensor, features: tuple[int, ...]) -> Tensor:
    """(..., in_features): the dimensions of the features moved to the end, as one."""
    if features == (-1,):
        return activation
    return activation.movedim(features, tuple(range(-len(features), 0))).flatten(-len(features))


def _weighted_squares(weights: Tensor, matrix: Tensor) -> Tensor:
    """(b, k, n) x (b, n, f) squared -> (b, k, f) float64.

    A matrix product in the dtype of the weights: five times faster than a norm over rows, and exact enough for as many rows
    as one chunk. Its sums depend neither on how many samples it is given at a time nor on the number of threads. A piece is
    squared into a buffer that stays in the cache; no temporary is of the size of the activation.
    """
    batch, count, features = matrix.shape
    total = torch.zeros(batch, weights.shape[1], features, dtype=torch.float64, device=matrix.device)
    rows = min(count, _CHUNK_ROWS)
    if not total.numel() or not rows:
        return total
    group = max(1, min(batch, _PIECE_ELEMENTS // (rows * features)))
    buffer = torch.empty(group * rows * features, dtype=weights.dtype, device=matrix.device)
    sums = torch.empty(total.shape, dtype=weights.dtype, device=matrix.device)
    for start in range(0, count, rows):
        chunk, factors = matrix[:, start : start + rows], weights[:, :, start : start + rows]
        for first in range(0, batch, group):
            part = chunk[first : first + group]
            squares = buffer[: part.numel()].view(part.shape)
            if part.dtype == buffer.dtype:
                torch.mul(part, part, out=squares)
            else:
                squares.copy_(part).square_()
            torch.bmm(factors[first : first + group], squares, out=sums[first : first + group])
        total += sums
    return total


def distinct(reductions: Sequence[Reduction]) -> list[Reduction]:
    """Without repeats of the same activation: a call on the same input adds no information.

    Where sums by sample are known, a sample that repeats the same sample of an earlier call is left out on its own, so
    that it does not matter with which others it was batched.
    """
    found: list[Reduction] = []
    earlier: list[SampleSums] = []
    for reduction in reductions:
        samples = reduction.by_sample
        if samples is None:
            if not any(is_repeat(reduction, other) for other in found):
                found.append(reduction)
            continue
        fresh = fresh_samples(samples, earlier)
        earlier.append(samples)
        if bool(fresh.any()):
            counted, taken = int(samples.tokens[fresh].sum()), int(fresh.sum())
            sums = samples.sums[fresh.to(samples.sums.device), 0].sum(0)
            weighted = None if reduction.weighted is None else reduction.weighted.of(fresh)
            found.append(Reduction(sums, counted, taken * samples.rows - counted, taken, weighted=weighted))
    return found


def fresh_samples(samples: SampleSums, earlier: Sequence[SampleSums]) -> Tensor:
    """(samples,) bool: which samples repeat none of the same place in an earlier call."""
    fresh = torch.ones_like(samples.tokens, dtype=torch.bool)
    for other in earlier:
        if other.sums.shape == samples.sums.shape and other.rows == samples.rows:
            same = torch.isclose(samples.sums, other.sums, rtol=_REPEAT_RTOL, atol=0.0).all(dim=(1, 2)).cpu()
            fresh &= ~(same & (samples.tokens == other.tokens))
    return fresh


def is_repeat(one: Reduction, other: Reduction) -> bool:
    """Two reductions of the same activation."""
    return one.token_count == other.token_count and torch.allclose(
        one.sum_of_squares, other.sum_of_squares, rtol=_REPEAT_RTOL, atol=0.0
    )
