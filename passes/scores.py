"""Scores of weights: how much each one matters inside its layer."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes.pieces import Magnitudes, Piece, scratch, spread

_PARTS = 32
"""Sums over a weight are made of so many, each over some rows in their order, added up in order: the same for every number
of threads, and little memory even of the largest weight."""


class WeightScores(Magnitudes):
    """S(l) |w_rl| S(r) of a linear layer, Eq. 6 of MULTIFLOW (CVPR 2024), computed where they are read.

    Both saliencies are scaled to a maximum of one, so that no product leaves the range of float32: only the order inside
    the layer means something. For what a selection needs of a score see ``mfcompile.passes.pieces.Values``.

    Attributes:
        scale: the factor that was taken out, so that scores of different layers can be compared.
        is_finite: no weight is NaN or infinite; the scores of a layer with one mean nothing.
    """

    def __init__(self, weight: Tensor, input_norm: Tensor, *, is_inverted: bool = False) -> None:
        """Sum up the saliencies of a layer.

        Args:
            weight: (out_features, in_features), any float dtype; not changed, and read again with every score.
            input_norm: (in_features,) L2 norm of each input feature over all calibration tokens.
            is_inverted: give the negative scores.

        Raises:
            InputError: the shapes do not fit, or input_norm holds a NaN or an infinity (names the feature).
        """
        _check(weight, input_norm)
        super().__init__(weight, by_rows=True)
        inputs, outputs = (side.numpy() for side in _saliencies(self, input_norm))
        self.is_finite = bool(np.isfinite(inputs).all() and np.isfinite(outputs).all())
        self.is_signed = is_inverted
        peaks = [float(side.max(initial=0.0)) or 1.0 for side in (inputs, outputs)]
        self.scale = peaks[0] * peaks[1]
        with np.errstate(all="ignore"):
            self._inputs = (inputs / peaks[0]).astype(np.float32)
            self._outputs = (outputs / (-peaks[1] if is_inverted else peaks[1])).astype(np.float32)

    def read(self, piece: Piece, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores of a piece, in ``out``."""
        flat = super().read(piece, out)
        scores = flat.reshape(piece.rows.stop - piece.rows.start, -1)
        scores *= self._outputs[piece.rows, None]
        scores *= self._inputs[piece.columns]
        return flat

    def at(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The scores at these flat indices."""
        rows, columns = np.divmod(places, self.shape[1])
        scores = super().at(places)
        scores *= self._outputs[rows]
        scores *= self._inputs[columns]
        return scores

    def whole(self) -> Tensor:
        """(out_features, in_features) float32: all scores at once."""
        scores = np.empty(self.shape, np.float32)

        def fill(queue: Iterator[Piece]) -> None:
            for piece in queue:
                self.read(piece, scores.reshape(-1)[piece.start : piece.stop])

        spread(fill, self.pieces())
        return torch.from_numpy(scores)


def score_weights(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score every weight of a linear layer by the information that flows through it.

    S(l) |w_rl| S(r), Eq. 6 of MULTIFLOW (CVPR 2024). Only the order inside the layer means something: both saliencies
    are scaled to a maximum of one, so that no product leaves the range of float32.

    Args:
        weight: (out_features, in_features), any float dtype; not changed.
        input_norm: (in_features,) L2 norm of each input feature over all calibration tokens.

    Returns:
        (out_features, in_features) float32, non-negative; zero where the weight is zero.

    Raises:
        InputError: the shapes do not fit, or input_norm holds a NaN or an infinity (names the feature).
    """
    return WeightScores(weight, input_norm).whole()


def score_scale(weight: Tensor, input_norm: Tensor) -> float:
    """The factor that ``score_weights`` takes out of a layer, so that scores of different layers can be compared."""
    return WeightScores(weight, input_norm).scale


def node_saliencies(weight: Tensor, input_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Saliency of the input and output nodes of a linear layer, Eq. 4 and 5 of MULTIFLOW (CVPR 2024).

    S(l) = ||a_l|| * mean over outputs r of |w_rl|;  S(r) = mean over inputs l of ||a_l|| * |w_rl|.

    Args:
        weight: (out_features, in_features), any float dtype; not changed.
        input_norm: (in_features,) L2 norm of each input feature over all calibration tokens.

    Returns:
        (S of the inputs (in_features,), S of the outputs (out_features,)), both float64: the same for every number of
        threads and every memory layout of the weight.
    """
    return _saliencies(Magnitudes(weight, by_rows=True), input_norm)


def _saliencies(magnitudes: Magnitudes, input_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 and 5, added up in float64."""
    height, width = magnitudes.shape
    norm: NDArray[np.float64] = input_norm.detach().cpu().double().numpy()
    # Scaled to one before the float32 product: a common factor changes no ranking, but could overflow.
    peak = float(norm.max(initial=0.0)) or 1.0
    scaled = (norm / peak).astype(np.float32)
    outputs = np.zeros(height)
    parts = _parts(magnitudes.pieces(), height)
    columns = np.zeros((len(parts), width))

    def add(queue: Iterator[tuple[int, list[Piece]]]) -> None:
        for index, pieces in queue:
            for piece in pieces:
                part = Magnitudes.read(magnitudes, piece, scratch.numbers).reshape(piece.rows.stop - piece.rows.start, -1)
                columns[index, piece.columns] += np.add.reduce(part, axis=0, dtype=np.float64)
                part *= scaled[piece.columns]
                outputs[piece.rows] += np.add.reduce(part, axis=1, dtype=np.float64)

    spread(add, list(enumerate(parts)))
    with np.errstate(all="ignore"):
        inputs = norm * (np.add.reduce(columns, axis=0) / max(height, 1))
        return torch.from_numpy(inputs), torch.from_numpy(outputs * (peak / max(width, 1)))


def _parts(pieces: list[Piece], height: int) -> list[list[Piece]]:
    """The pieces by ranges of rows, at most ``_PARTS`` of them."""
    rows = ceil(height / min(_PARTS, len(pieces) or 1)) or 1
    parts: dict[int, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(piece.rows.start // rows, []).append(piece)
    return list(parts.values())


def _check(weight: Tensor, input_norm: Tensor) -> None:
    if weight.ndim != 2 or input_norm.shape != (weight.shape[1],):
        raise InputError(
            f"a weight of shape {tuple(weight.shape)} takes a norm per input feature, but input_norm is of shape "
            f"{tuple(input_norm.shape)}; expected ({weight.shape[-1]},)"
        )
    finite = torch.isfinite(input_norm)
    if not bool(finite.all()):
        feature = int((~finite).nonzero()[0])
        raise InputError(f"input_norm is {float(input_norm[feature])} at feature {feature}: a norm must be finite")
