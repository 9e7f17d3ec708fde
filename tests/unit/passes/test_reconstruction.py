"""Layer-wise reconstruction, against the update written out with inverses, and against the least squares of every row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.passes.reconstruction import Reconstructor

# A float64 result cast to float32.
RTOL = 1e-6


WIDTH = 48


def correlated(tokens: int = 300, features: int = WIDTH, seed: int = 0) -> Tensor:
    """(tokens, features) inputs that lie near a few directions, as activations do; float64."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, features, generator=generator) / 12**0.5
    return (low + 0.5 * torch.randn(tokens, features, generator=generator)).double()


def layer(kept: float = 0.5, outputs: int = 12, features: int = WIDTH, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A weight and the mask of its largest magnitudes."""
    weight = torch.randn(outputs, features, generator=torch.Generator().manual_seed(seed))
    threshold = weight.abs().flatten().kthvalue(int((1 - kept) * weight.numel())).values
    return weight, weight.abs() > threshold


def step_by_step(gram: Tensor, weight: Tensor, kept: Tensor, damping: float) -> NDArray[np.float64]:
    """Eq. 3 of the paper, one weight after the other, with the inverse of what is left of H at every step."""
    hessian = gram.double().numpy() + damping * float(gram.diagonal().double().mean()) * np.eye(len(gram))
    rows = weight.double().numpy().copy()
    for row, mask in zip(rows, kept.numpy(), strict=True):
        for column in range(len(row)):
            if not mask[column]:
                inverse = np.linalg.inv(hessian[column:, column:])
                row[column:] -= row[column] / inverse[0, 0] * inverse[0]
    return np.where(kept.numpy(), rows, 0.0)


def error_of(inputs: Tensor, dense: Tensor, weight: Tensor) -> float:
    return float(((inputs @ (dense.double() - weight.double()).mT) ** 2).sum())


def least_squares_error(inputs: Tensor, dense: Tensor, kept: Tensor) -> float:
    """The least that any values of the kept weights can reach: one linear system per row."""
    total = 0.0
    for row, mask in zip(dense.double(), kept, strict=True):
        aim = inputs @ row
        solution = torch.linalg.lstsq(inputs[:, mask], aim.unsqueeze(1)).solution
        total += float(((inputs[:, mask] @ solution).squeeze(1) - aim).square().sum())
    return total


@pytest.mark.parametrize(("block_columns", "damping"), [(1, 0.01), (7, 0.01), (48, 0.01), (128, 0.01), (128, 0.0), (128, 0.3)])
def test_the_values_are_those_of_the_paper(block_columns: int, damping: float) -> None:
    inputs, (weight, kept) = correlated(), layer()
    gram = inputs.mT @ inputs
    result = Reconstructor(gram, damping, block_columns).reconstruct(weight, kept)
    rows = (result.weight != torch.where(kept, weight, 0.0)).any(1).numpy()
    assert rows.sum() == result.rows >= 10
    expected = step_by_step(gram, weight, kept, damping)
    np.testing.assert_allclose(result.weight.numpy()[rows], expected[rows], rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("kept_share", [0.75, 0.5, 0.37])
def test_the_error_lies_between_masking_and_least_squares(kept_share: float) -> None:
    inputs, (weight, kept) = correlated(), layer(kept_share)
    result = Reconstructor(inputs.mT @ inputs).reconstruct(weight, kept)
    masked = error_of(inputs, weight, torch.where(kept, weight, 0.0))
    best = least_squares_error(inputs, weight, kept)
    assert result.masked_error == pytest.approx(masked, rel=1e-9)
    assert result.error == pytest.approx(error_of(inputs, weight, result.weight), rel=1e-6)
    assert best < result.error < masked
    assert (masked - result.error) / (masked - best) > 0.45  # of what any values could win


def test_pruned_places_are_zero_and_a_full_mask_changes_nothing() -> None:
    inputs, (weight, kept) = correlated(), layer()
    solver = Reconstructor(inputs.mT @ inputs)
    assert not solver.reconstruct(weight, kept).weight[~kept].any()
    whole = solver.reconstruct(weight, torch.ones_like(kept))
    assert torch.equal(whole.weight, weight)
    assert (whole.rows, whole.error) == (0, 0.0)


def test_rows_and_columns_without_a_weight() -> None:
    inputs, (weight, kept) = correlated(), layer()
    kept = kept.clone()
    kept[3] = False
    kept[:, [0, 11, 47]] = False
    result = Reconstructor(inputs.mT @ inputs).reconstruct(weight, kept)
    assert not result.weight[3].any()
    assert not result.weight[:, [0, 11, 47]].any()
    assert result.error < result.masked_error
    nothing = Reconstructor(inputs.mT @ inputs).reconstruct(weight, torch.zeros_like(kept))
    assert not nothing.weight.any()
    assert nothing.rows == 0


def test_an_input_that_never_moves_leaves_its_weights_and_reaches_no_other() -> None:
    inputs, (weight, kept) = correlated(), layer()
    inputs[:, 5] = 0.0
    result = Reconstructor(inputs.mT @ inputs).reconstruct(weight, kept)
    assert torch.equal(result.weight[:, 5], torch.where(kept, weight, 0.0)[:, 5])
    others = [index for index in range(WIDTH) if index != 5]
    alone = Reconstructor(
        inputs[:, others].mT @ inputs[:, others], 0.01 * (WIDTH - 1) / WIDTH
    )  # the same damping, from another mean
    torch.testing.assert_close(result.weight[:, others], alone.reconstruct(weight[:, others], kept[:, others]).weight)


def test_fewer_tokens_than_features() -> None:
    """X^T X is singular: without damping it has no Cholesky factor, and the damping grows until it has one."""
    inputs, (weight, kept) = correlated(tokens=5), layer()
    gram = inputs.mT @ inputs
    assert Reconstructor(gram).damping == 0.01
    solver = Reconstructor(gram, damping=0.0)
    assert solver.damping > 0.0
    result = solver.reconstruct(weight, kept)
    assert result.weight.isfinite().all()
    assert result.error < result.masked_error


def test_a_matrix_that_is_no_gram_matrix_is_given_up() -> None:
    with pytest.raises(ArithmeticError, match="cannot be factored"):
        Reconstructor(torch.full((3, 3), -1.0))


def test_a_row_that_comes_no_closer_keeps_its_values() -> None:
    """Values that are the best already: the update would only lose them again."""
    inputs, (weight, kept) = correlated(), layer()
    best = torch.zeros_like(weight)
    for row, mask, values in zip(weight.double(), kept, best, strict=True):
        values[mask] = torch.linalg.lstsq(inputs[:, mask], (inputs @ row).unsqueeze(1)).solution.squeeze(1).float()
    current = torch.where(torch.arange(12).unsqueeze(1) < 4, best, weight)
    result = Reconstructor(inputs.mT @ inputs).reconstruct(weight, kept, current)
    assert torch.equal(result.weight[:4], best[:4])
    assert 0 < result.rows <= 8
    assert result.error < result.masked_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_what_is_stored_and_what_is_judged(dtype: torch.dtype) -> None:
    inputs, (weight, kept) = correlated(), layer()
    weight = weight.to(dtype)
    result = Reconstructor((inputs.mT @ inputs).float()).reconstruct(weight, kept)
    assert result.weight.dtype == dtype
    assert result.error == pytest.approx(error_of(inputs, weight, result.weight), rel=1e-5)
    assert result.error < result.masked_error


def test_values_that_half_precision_cannot_hold_are_not_used() -> None:
    """A pruned weight that lies beside a tiny input of the same direction asks for values beyond float16."""
    inputs = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs[:, 1] = 1e-6 * inputs[:, 0] + 1e-8 * inputs[:, 1]
    weight = torch.tensor([[1.0, 1.0]], dtype=torch.float16)
    result = Reconstructor(inputs.mT @ inputs, damping=0.0).reconstruct(weight, torch.tensor([[False, True]]))
    assert torch.equal(result.weight, torch.tensor([[0.0, 1.0]], dtype=torch.float16))
    assert result.rows == 0


def test_many_rows_are_handled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, (weight, kept) = correlated(), layer()
    solver = Reconstructor(inputs.mT @ inputs)
    whole = solver.reconstruct(weight, kept)
    monkeypatch.setattr("mfcompile.passes.reconstruction._ROW_ELEMENTS", WIDTH * 5)
    parts = solver.reconstruct(weight, kept)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=RTOL, atol=0.0)
    assert parts.error == pytest.approx(whole.error, rel=1e-9)
    assert parts.rows == whole.rows
