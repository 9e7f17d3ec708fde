"""MULTIFLOW and its data-free baselines in plain NumPy, one function per equation. Slow, obvious, and its own.

Equations are those of MULTIFLOW (CVPR 2024). Shapes: W is (out, in); an activation is (B, T, in) with B samples of T
tokens; a mask is (out, in), True = kept; sparsity s is the fraction removed.

Two ways of turning s into counts:

* exact: a group of N weights keeps N - int(s N), ties are broken by position (the lower flat index goes first), and
  Eq. 7 gives every layer an integer count;
* official: what the authors' published code does. Everything at or below the threshold goes, and a layer's count is
  int(f n) of a rounded quotient f, which removes one weight too few in about one layer out of six.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Rounding = Literal["exact", "official"]


def mean_square(activations: Sequence[Array], token_masks: Sequence[Array | None]) -> tuple[NDArray[np.float64], int]:
    """v_j = (1/N) sum over counted tokens of x_tj^2, and the number N of samples.

    Args:
        activations: (B, T, in) per call of the layer.
        token_masks: (B, T) per call, 1 = counted; None counts every token.

    Returns:
        (in,) and N. Samples whose tokens are all left out still count in N.
    """
    total = np.zeros(activations[0].shape[-1], dtype=np.float64)
    samples = 0
    for activation, token_mask in zip(activations, token_masks, strict=True):
        rows = activation.reshape(-1, activation.shape[-1]).astype(np.float64)
        if token_mask is not None:
            rows = rows[token_mask.reshape(-1) != 0]
        for row in rows:
            total += row * row
        samples += activation.shape[0]
    result: NDArray[np.float64] = total / samples
    return result, samples


def score_multiflow(weight: Array, norm: Array) -> NDArray[np.float64]:
    """Eq. 6: S(i, j) = S_out(i) S_in(j) |W_ij|, with the node saliencies of Eq. 4 and 5.

    Args:
        weight: (out, in).
        norm: (in,) l2 norm of every input feature.
    """
    magnitude = np.abs(weight).astype(np.float64)
    flow = magnitude * norm[None, :].astype(np.float64)
    saliency_in = flow.sum(axis=0) / flow.shape[0]
    saliency_out = flow.sum(axis=1) / flow.shape[1]
    score: NDArray[np.float64] = saliency_out[:, None] * saliency_in[None, :] * magnitude
    return score


def score_lamp(weight: Array) -> NDArray[np.float64]:
    """LAMP: w^2 divided by the sum of the squares of itself and of all larger weights of the layer."""
    squares = weight.reshape(-1).astype(np.float64) ** 2
    order = np.argsort(squares, kind="stable")
    remaining = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = squares[order] / remaining
    return scores.reshape(weight.shape)


def score_l2(weight: Array) -> NDArray[np.float64]:
    """|w| divided by the Frobenius norm of the layer."""
    magnitude = np.abs(weight).astype(np.float64)
    result: NDArray[np.float64] = magnitude / np.sqrt((magnitude**2).sum())
    return result


def invert(score: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / S: the weights with the lowest score are kept. A score of zero becomes infinite."""
    with np.errstate(divide="ignore"):
        return 1.0 / score


def remove_lowest(scores: Array, count: int, rounding: Rounding) -> Mask:
    """Mask that removes the ``count`` lowest scores, among any shape.

    Exact removes exactly ``count``, the earlier of two equal scores first. Official removes everything at or below the
    ``count``-th smallest score, so that all ties at the threshold go.
    """
    flat = scores.reshape(-1)
    kept = np.ones(flat.size, dtype=np.bool_)
    if count >= 1:
        order = np.argsort(flat, kind="stable")
        if rounding == "exact":
            kept[order[:count]] = False
        else:
            kept = flat > flat[order[count - 1]]
    return kept.reshape(scores.shape)


def threshold_group(scores: Mapping[str, Array], sparsity: float, rounding: Rounding) -> dict[str, Mask]:
    """One threshold over all given layers; int(s N) of their N weights are removed."""
    joined = np.concatenate([score.reshape(-1) for score in scores.values()])
    kept = remove_lowest(joined, int(sparsity * joined.size), rounding)
    masks: dict[str, Mask] = {}
    start = 0
    for name, score in scores.items():
        masks[name] = kept[start : start + score.size].reshape(score.shape)
        start += score.size
    return masks


def layer_budgets(
    weights: Mapping[str, Array], group_of: Mapping[str, str], sparsity: float, rounding: Rounding
) -> dict[str, int]:
    """Eq. 7: how many weights every layer loses, as magnitude pruning of each group at ``sparsity`` would have it."""
    removed: dict[str, int] = {}
    for group in dict.fromkeys(group_of[name] for name in weights):
        members = {name: np.abs(weight) for name, weight in weights.items() if group_of[name] == group}
        for name, mask in threshold_group(members, sparsity, rounding).items():
            kept, size = int(mask.sum()), mask.size
            removed[name] = size - kept if rounding == "exact" else int((1.0 - kept / size) * size)
    return removed


def multiflow(
    weights: Mapping[str, Array],
    norms: Mapping[str, Array],
    group_of: Mapping[str, str],
    sparsity: float,
    rounding: Rounding,
    *,
    inverted: bool = False,
) -> dict[str, Mask]:
    """Eq. 8: every layer keeps its best-scored weights, as many as Eq. 7 allows it."""
    removed = layer_budgets(weights, group_of, sparsity, rounding)
    masks: dict[str, Mask] = {}
    for name, weight in weights.items():
        score = score_multiflow(weight, norms[name])
        masks[name] = remove_lowest(invert(score) if inverted else score, removed[name], rounding)
    return masks


def multiflow_without_distribution(
    weights: Mapping[str, Array], norms: Mapping[str, Array], sparsity: float, rounding: Rounding
) -> dict[str, Mask]:
    """Ablation: one threshold over the scores of all layers, no Eq. 7."""
    scores = {name: score_multiflow(weight, norms[name]) for name, weight in weights.items()}
    return threshold_group(scores, sparsity, rounding)
