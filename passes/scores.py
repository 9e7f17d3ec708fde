"""Scores of weights: how much each one matters inside its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from mfcompile.errors import InputError


def node_saliencies(weight: Tensor, input_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Saliency of the input and output nodes of a linear layer, Eq. 4 and 5 of MULTIFLOW (CVPR 2024).

    S(l) = ||a_l|| * mean over outputs r of |w_rl|;  S(r) = mean over inputs l of ||a_l|| * |w_rl|.

    Args:
        weight: (out_features, in_features), any float dtype; not changed.
        input_norm: (in_features,) L2 norm of each input feature over all calibration tokens.

    Returns:
        (S of the inputs (in_features,), S of the outputs (out_features,)), both float64.
    """
    return _saliencies(weight.detach().abs().float(), input_norm)


def _saliencies(magnitude: Tensor, input_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 and 5 from the float32 magnitudes."""
    ones = torch.ones(magnitude.shape[0], dtype=torch.float32, device=magnitude.device)
    mean_magnitude = (ones @ magnitude).double() / magnitude.shape[0]
    norm = input_norm.double()
    # Scaled to one before the float32 product: a common factor changes no ranking, but could overflow.
    peak = float(norm.max()) or 1.0
    outputs = (magnitude @ (norm / peak).float()).double() * (peak / magnitude.shape[1])
    return norm * mean_magnitude, outputs


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
    _check(weight, input_norm)
    score = weight.detach().abs().float()
    inputs, outputs = (side / (float(side.max()) or 1.0) for side in _saliencies(score, input_norm))
    score *= outputs.float().unsqueeze(1)
    score *= inputs.float().unsqueeze(0)
    return score


def score_scale(weight: Tensor, input_norm: Tensor) -> float:
    """The factor that ``score_weights`` takes out of a layer, so that scores of different layers can be compared."""
    inputs, outputs = node_saliencies(weight, input_norm)
    return (float(inputs.max()) or 1.0) * (float(outputs.max()) or 1.0)


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
