"""Reductions: sums of squares per feature, what padding leaves out, and which repeats count once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.passes import reduction
from mfcompile.passes.reduction import Reduction, distinct, reduce_activation

# Each sample is one float32 sum of at most 600 squares; samples are added in float64.
RTOL = 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(activation: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    values = activation.double().numpy()
    sums: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.square(values).reshape(-1, values.shape[-1]).sum(0)
    return sums


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 3, 4, 5), (1, 1, 1), (3, 0, 5)])
def test_sums_over_all_rows(shape: tuple[int, ...]) -> None:
    activation = draw(*shape)
    found = reduce_activation(activation)
    np.testing.assert_allclose(found.sum_of_squares.numpy(), squares(activation), rtol=RTOL)
    assert found.sum_of_squares.dtype == torch.float64
    assert (found.token_count, found.padding_count) == (int(np.prod(shape[:-1])), 0)


@pytest.mark.parametrize(
    ("shape", "batch_size", "samples"),
    [((6, 3, 5), None, 6), ((6, 5), None, 1), ((6, 5), 2, 2), ((6, 5), 4, 1), ((6, 3, 5), 2, 6), ((5,), 2, 1)],
)
def test_samples(shape: tuple[int, ...], batch_size: int | None, samples: int) -> None:
    found = reduce_activation(draw(*shape), batch_size=batch_size)
    assert found.sample_count == samples
    np.testing.assert_allclose(found.sum_of_squares.numpy(), squares(draw(*shape)), rtol=RTOL)


@pytest.mark.parametrize("feature_dim", [-2, -3])
def test_features_may_lie_in_another_dimension(feature_dim: int) -> None:
    activation = draw(2, 5, 3, 4)
    found = reduce_activation(activation, feature_dim)
    np.testing.assert_allclose(found.sum_of_squares.numpy(), squares(activation.movedim(feature_dim, -1)), rtol=RTOL)
    assert found.token_count == activation.numel() // activation.shape[feature_dim]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype(dtype: torch.dtype) -> None:
    activation = (draw(2, 3, 5) * 300).to(dtype)  # 300 squared overflows float16
    np.testing.assert_allclose(reduce_activation(activation).sum_of_squares.numpy(), squares(activation.float()), rtol=RTOL)


def test_padding_rows_are_left_out_and_counted() -> None:
    activation, keep = draw(2, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    found = reduce_activation(activation, keep=keep)
    np.testing.assert_allclose(found.sum_of_squares.numpy(), squares(activation[keep]), rtol=RTOL)
    assert (found.token_count, found.padding_count, found.sample_count) == (5, 3, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_lies_in_padding_does_not_leak(value: float) -> None:
    activation, keep = draw(2, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    clean = reduce_activation(activation, keep=keep, by_sample=True)
    activation[~keep] = value
    found = reduce_activation(activation, keep=keep, by_sample=True)
    assert torch.equal(found.sum_of_squares, clean.sum_of_squares)
    assert found.by_sample is not None
    assert clean.by_sample is not None
    assert torch.equal(found.by_sample.sums, clean.by_sample.sums)


def test_nan_in_a_token_shows() -> None:
    activation, keep = draw(2, 4, 5), torch.ones(2, 4, dtype=torch.bool)
    activation[1, 2, 3] = float("nan")
    for mask in (None, keep):
        found = reduce_activation(activation, keep=mask).sum_of_squares
        assert torch.isnan(found).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("flat", [False, True])
def test_how_samples_are_batched_changes_the_last_bits_of_float64_only(flat: bool) -> None:
    activation = draw(12, 50, 7)

    def reduce(part: Tensor) -> Tensor:
        given = part.flatten(0, 1) if flat else part
        return reduce_activation(given, batch_size=len(part)).sum_of_squares

    whole = reduce(activation)
    for size in (1, 5):
        parts = [reduce(activation[start : start + size]) for start in range(0, len(activation), size)]
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(reduce(activation.flip(0)), whole, rtol=1e-14, atol=0.0)


def test_long_sums_keep_their_digits() -> None:
    """A plain float32 accumulation of 2^22 equal numbers would be off by percents."""
    found = reduce_activation(torch.full((64, 1 << 16, 1), 0.1))
    np.testing.assert_allclose(found.sum_of_squares.numpy(), [(1 << 22) * np.float64(np.float32(0.1)) ** 2], rtol=1e-5)


@pytest.mark.parametrize("elements", [1, 600, 5000, 1 << 30])
@pytest.mark.parametrize("shape", [(5, 300, 7), (3, 2, 300, 7), (1, 1, 7), (9, 7)])
def test_the_pieces_that_are_squared_at_a_time_change_no_bit(
    shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does the number of samples in one of them."""
    activation, keep = draw(*shape), torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) > 0.3
    expected = [reduced(activation, mask) for mask in (None, keep)]
    monkeypatch.setattr(reduction, "_PIECE_ELEMENTS", elements)
    for mask, whole in zip((None, keep), expected, strict=True):
        found = reduced(activation, mask)
        assert torch.equal(found.sum_of_squares, whole.sum_of_squares)
        assert found.by_sample is not None
        assert whole.by_sample is not None
        assert torch.equal(found.by_sample.sums, whole.by_sample.sums)


def test_no_temporary_is_of_the_size_of_the_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "_PIECE_ELEMENTS", 1 << 10)
    largest = 0

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and all(result.untyped_storage()._cdata != one for one in known):
                largest = max(largest, result.untyped_storage().nbytes() // result.element_size())
            return result

    for dtype in (torch.float32, torch.bfloat16):
        activation = draw(64, 50, 16).to(dtype)
        known = {activation.untyped_storage()._cdata}
        with Sizes():  # type: ignore[no-untyped-call]
            reduce_activation(activation)
    assert 0 < largest <= 1 << 11


@pytest.mark.parametrize("shape", [(8, 197, 96), (2, 600, 40), (5, 3, 7)])
def test_threads_change_no_bit(shape: tuple[int, ...]) -> None:
    activation, before, found = draw(*shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(reduced(activation))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].sum_of_squares, found[1].sum_of_squares)


def test_what_is_float64_is_summed_in_float64() -> None:
    activation = draw(4, 300, 5).double() * (1 + 2.0**-40)
    keep = torch.ones(4, 300, dtype=torch.bool)
    for mask in (None, keep):
        found = reduce_activation(activation, keep=mask).sum_of_squares
        np.testing.assert_allclose(found.numpy(), activation.square().sum((0, 1)).numpy(), rtol=1e-14)
    wide = torch.tensor([[1e30], [1e-30]], dtype=torch.float64)  # neither fits into float32 once squared
    np.testing.assert_allclose(reduce_activation(wide[:1]).sum_of_squares.numpy(), [1e60], rtol=1e-14)
    np.testing.assert_allclose(reduce_activation(wide[1:]).sum_of_squares.numpy(), [1e-60], rtol=1e-14)


def reduced(activation: Tensor, keep: Tensor | None = None, by_sample: bool = True) -> Reduction:
    return reduce_activation(activation, keep=keep, by_sample=by_sample)


def total(reductions: list[Reduction]) -> tuple[Tensor, int, int]:
    sums = torch.stack([item.sum_of_squares for item in reductions]).sum(0)
    return sums, sum(item.token_count for item in reductions), sum(item.sample_count for item in reductions)


@pytest.mark.parametrize("by_sample", [True, False])
def test_a_repeated_call_counts_once_and_different_calls_both(by_sample: bool) -> None:
    one, other = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    found = distinct([reduced(item, by_sample=by_sample) for item in (one, other, one.clone(), one)])
    np.testing.assert_allclose(total(found)[0].numpy(), squares(torch.cat([one, other])), rtol=RTOL)
    assert total(found)[1:] == (12, 4)


def test_a_sample_that_repeats_is_left_out_on_its_own() -> None:
    """So that it does not matter with which samples it shares a batch."""
    one, other = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    other[1] = one[1]
    together = total(distinct([reduced(one), reduced(other)]))
    apart = [total(distinct([reduced(one[i : i + 1]), reduced(other[i : i + 1])])) for i in range(3)]
    torch.testing.assert_close(together[0], torch.stack([item[0] for item in apart]).sum(0), rtol=1e-14, atol=0.0)
    assert together[1:] == (5 * 4, 5)
    assert [item[2] for item in apart] == [2, 1, 2]


def test_samples_that_swap_places_are_no_repeat() -> None:
    """Hard negatives: the same images in another order meet other texts."""
    images = draw(4, 3, 5)
    assert total(distinct([reduced(images), reduced(images.roll(1, 0))]))[1:] == (24, 8)


def test_rows_that_swap_places_are_no_repeat() -> None:
    tokens = draw(2, 3, 5)
    assert total(distinct([reduced(tokens), reduced(tokens.flip(1))]))[1:] == (12, 4)


def test_another_padding_is_no_repeat() -> None:
    tokens, keep = draw(1, 3, 5), torch.tensor([[True, True, False]])
    tokens[:, 2] = 0.0
    assert total(distinct([reduced(tokens, keep), reduced(tokens)]))[1:] == (5, 2)


def test_padding_is_counted_for_the_samples_that_are_left() -> None:
    keep = torch.tensor([[True, False, False], [True, True, False]])
    one, other = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    other[0] = one[0]
    (first, second) = distinct([reduced(one, keep), reduced(other, keep)])
    assert (first.token_count, first.padding_count, first.sample_count) == (3, 3, 2)
    assert (second.token_count, second.padding_count, second.sample_count) == (2, 1, 1)
