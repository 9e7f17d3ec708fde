"""Scores: Eq. 4 to 6 held to loops, and what does not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes import pieces
from mfcompile.passes.scores import WeightScores, node_saliencies, score_scale, score_weights

# A product or two in float32, all sums in float64; against float64 loops.
RTOL = 2.5e-7


def draw(out_features: int, in_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight, torch.rand(in_features, generator=generator, dtype=torch.float64) * 5


def equations(weight: Tensor, norm: Tensor) -> tuple[list[float], list[float], NDArray[np.float64]]:
    """S(l), S(r) and S(l) |w_rl| S(r), one number at a time."""
    w, a = weight.double().numpy(), norm.double().numpy()
    height, width = w.shape
    inputs = [sum(abs(w[r, i]) * a[i] for r in range(height)) / height for i in range(width)]
    outputs = [sum(abs(w[r, i]) * a[i] for i in range(width)) / width for r in range(height)]
    scores = np.zeros((height, width))
    for r in range(height):
        for i in range(width):
            scores[r, i] = inputs[i] * abs(w[r, i]) * outputs[r]
    return inputs, outputs, scores


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 1), (3, 5), (16, 9)])
def test_saliencies_and_scores_are_those_of_the_equations(height: int, width: int) -> None:
    weight, norm = draw(height, width)
    inputs, outputs, scores = equations(weight, norm)
    found = node_saliencies(weight, norm)
    np.testing.assert_allclose(found[0].numpy(), inputs, rtol=RTOL)
    np.testing.assert_allclose(found[1].numpy(), outputs, rtol=RTOL)
    whole = score_weights(weight, norm).double() * score_scale(weight, norm)
    np.testing.assert_allclose(whole.numpy(), scores, rtol=RTOL)


def test_a_transposed_weight_is_another_layer() -> None:
    """The norm belongs to columns: a mix-up of rows and columns shows on a square weight."""
    weight, norm = draw(6, 6)
    assert not torch.allclose(score_weights(weight, norm), score_weights(weight.t(), norm).t())


@pytest.mark.parametrize("factor", [2.0**-40, 0.5, 4.0, 2.0**60])
def test_scores_do_not_depend_on_the_scale_of_the_norms(factor: float) -> None:
    weight, norm = draw(7, 5)
    assert torch.equal(score_weights(weight, norm * factor), score_weights(weight, norm))


@pytest.mark.parametrize("factor", [2.0**-20, 8.0, 2.0**30])
def test_scores_follow_the_scale_of_the_weight(factor: float) -> None:
    weight, norm = draw(7, 5)
    assert torch.equal(score_weights(weight * factor, norm), score_weights(weight, norm) * factor)


def test_signs_do_not_matter() -> None:
    weight, norm = draw(7, 5)
    assert torch.equal(score_weights(weight.abs(), norm), score_weights(weight, norm))


def test_scores_are_finite_where_the_plain_product_would_overflow() -> None:
    weight, norm = draw(4, 3)
    score = score_weights(weight * 1e15, norm * 1e30)
    assert bool(torch.isfinite(score).all())
    assert torch.equal(score.flatten().argsort(), score_weights(weight, norm).flatten().argsort())


def test_zero_weights_score_zero_and_only_they() -> None:
    weight, norm = draw(6, 4)
    weight[2, 3] = weight[0, 0] = 0.0
    assert torch.equal(score_weights(weight, norm) == 0, weight == 0)


def test_a_dead_input_scores_zero() -> None:
    weight, norm = draw(6, 4)
    norm[2] = 0.0
    score = score_weights(weight, norm)
    assert not score[:, 2].any()
    assert bool((score[:, [0, 1, 3]] > 0).all())


@pytest.mark.parametrize("zeros", ["weight", "norm"])
def test_all_zero_gives_zero_and_no_nan(zeros: str) -> None:
    weight, norm = draw(3, 4)
    score = score_weights(weight * (zeros == "norm"), norm * (zeros == "weight"))
    assert torch.equal(score, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_scores_as_its_float32_values(dtype: torch.dtype) -> None:
    weight, norm = draw(5, 8)
    stored = weight.to(dtype)
    score = score_weights(stored, norm)
    assert score.dtype == torch.float32
    assert torch.equal(score, score_weights(stored.float(), norm))


def test_the_weight_is_left_alone() -> None:
    weight, norm = draw(5, 8)
    before = weight.clone()
    score_weights(weight, norm)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1)])
def test_a_norm_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"shape \(6, 5\).*input_norm is of shape .*; expected \(5,\)"):
        score_weights(torch.ones(6, 5), torch.ones(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_refused_by_its_feature(value: float) -> None:
    norm = torch.ones(5)
    norm[3] = value
    with pytest.raises(InputError, match=rf"input_norm is {value} at feature 3"):
        score_weights(torch.ones(6, 5), norm)


def layouts(weight: Tensor) -> list[Tensor]:
    """The same numbers, lying otherwise in memory."""
    wide = torch.zeros(weight.shape[0], 2 * weight.shape[1])
    wide[:, ::2] = weight
    return [weight, weight.t().contiguous().t(), wide[:, ::2]]


@pytest.mark.parametrize("shape", [(41, 20), (7, 70), (300, 3), (1, 200), (200, 1)])
@pytest.mark.parametrize("size", [24, 1 << 18])
def test_sums_and_scores_depend_on_neither_threads_nor_memory_layout(
    shape: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", size)
    weight, norm = draw(*shape)
    weight *= torch.exp(4 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found += [(*node_saliencies(view, norm), score_weights(view, norm)) for view in layouts(weight)]
    torch.set_num_threads(before)
    for inputs, outputs, score in found:
        assert torch.equal(inputs, found[0][0])
        assert torch.equal(outputs, found[0][1])
        assert torch.equal(score, found[0][2])
    expected = equations(weight, norm)
    np.testing.assert_allclose(found[0][0].numpy(), expected[0], rtol=RTOL)
    np.testing.assert_allclose(found[0][1].numpy(), expected[1], rtol=RTOL)


@pytest.mark.parametrize("is_inverted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_in_pieces_and_one_by_one_are_those_of_the_whole(
    dtype: torch.dtype, is_inverted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 24)
    weight, norm = draw(13, 11)
    whole = score_weights(weight.to(dtype), norm).numpy().reshape(-1)
    scores = WeightScores(weight.to(dtype), norm, is_inverted=is_inverted)
    assert scores.is_finite
    assert scores.is_signed == is_inverted
    out = np.empty(24, np.float32)
    read = np.concatenate([scores.read(piece, out).copy() for piece in scores.pieces()])
    np.testing.assert_array_equal(read, -whole if is_inverted else whole)
    np.testing.assert_array_equal(scores.at(np.arange(143)), read)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_shows(value: float) -> None:
    weight, norm = draw(13, 11)
    norm[4] = 0.0
    weight[3, 4] = value
    assert not WeightScores(weight, norm).is_finite
