"""Calibration in float64: what runs, what it costs the user's model (nothing), and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from mfcompile.masks import fingerprint
from mfcompile.passes.calibration import calibrate
from tests.models import Mlp, TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions

LENGTHS = (6, 3, 5, 2)

# Products and sums of float64; a model's activations amplify their rounding a little.
RTOL = 1e-11
# The same of float32.
RTOL_OF_FLOAT32 = 1e-4


def statistics(sizes: list[int], precision: str, threads: int = 1) -> mfcompile.CalibrationStatistics:
    """Statistics of the same four samples, in batches of these sizes."""
    whole, batches, start = vlm_batch(LENGTHS), [], 0
    for size in sizes:
        batches.append({name: tensor[start : start + size] for name, tensor in whole.items()})
        start += size
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return calibrate(vlm_captured(), vlm_regions(), batches, precision=precision)
    finally:
        torch.set_num_threads(before)


def largest_difference(one: mfcompile.CalibrationStatistics, other: mfcompile.CalibrationStatistics) -> float:
    return max(
        float(((site.sum_of_squares - other.sites[name].sum_of_squares) / site.sum_of_squares).abs().nan_to_num().max())
        for name, site in one.sites.items()
    )


def test_sums_do_not_feel_how_batches_are_cut() -> None:
    expected = statistics([4], "float64")
    for sizes, threads in (([1, 1, 1, 1], 1), ([3, 1], 2), ([2, 2], 1)):
        assert largest_difference(expected, statistics(sizes, "float64", threads)) < RTOL
    assert expected.observed_by == "module"
    # What the model's own precision gives is the same, but for its rounding, which is no better than float32's.
    own = statistics([4], "model")
    assert 1e-9 < largest_difference(expected, own) < RTOL_OF_FLOAT32
    assert [site.token_count for site in own.sites.values()] == [site.token_count for site in expected.sites.values()]


def test_the_users_model_stays_as_it_is() -> None:
    model = tiny_vlm()
    captured = mfcompile.capture(model, vlm_batch())
    before, pointers = fingerprint(model), [item.data_ptr() for item in model.parameters()]
    calibrate(captured, mfcompile.infer_regions(captured), [vlm_batch(LENGTHS)], precision="float64")
    assert fingerprint(model) == before
    assert [item.data_ptr() for item in model.parameters()] == pointers
    assert torch.get_default_dtype() == torch.float32


class Odd(nn.Module):
    """Does something to its input on the way."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.change = TwoLayers(), change

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.layers(self.change(image))
        return result


def run(change: Callable[[Tensor], Tensor], **options: Any) -> mfcompile.CalibrationStatistics:
    captured = mfcompile.capture(Odd(change).eval(), torch.ones(2, 3, 4))
    return calibrate(captured, mfcompile.infer_regions(captured), [torch.ones(2, 3, 4)], **options)


def test_tensors_that_the_model_makes_are_float64_too() -> None:
    run(lambda image: image @ torch.eye(4), precision="float64")


def test_a_model_that_insists_on_float32_is_told_so() -> None:
    run(lambda image: image.float())
    with pytest.raises(CalibrationError, match=r"It ran in float64, .* calibrate with precision='model'"):
        run(lambda image: image.float(), precision="float64")
    assert torch.get_default_dtype() == torch.float32


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])
        self.places = (place for place in range(3))

    def forward(self, image: Tensor) -> Tensor:
        for block in self.blocks:
            image = block(image)
        return image


def test_a_module_that_cannot_be_copied_is_told_so() -> None:
    captured = mfcompile.capture(Uncopyable().eval(), torch.ones(2, 3, 4))
    with pytest.raises(CalibrationError, match=r"Uncopyable cannot be copied in float64 \(TypeError: .*precision='model'"):
        calibrate(captured, mfcompile.infer_regions(captured), [torch.ones(2, 3, 4)], precision="float64")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float32"}, "precision='float32' is unknown; choose model or float64"),
        ({"precision": "float64", "observe": "graph"}, "precision='float64' runs the module"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(vlm_captured(), vlm_regions(), [vlm_batch()], **options)  # type: ignore[arg-type]


def test_each_precision_has_an_entry_of_its_own(tmp_path: Path) -> None:
    from mfcompile.passes.cached_calibration import calibrate_cached

    def run(precision: str) -> bool:
        given = [vlm_batch(LENGTHS)]
        return calibrate_cached(vlm_captured(), vlm_regions(), given, precision=precision, cache_dir=tmp_path).is_reused

    assert [run(name) for name in ("model", "float64", "float64", "model")] == [False, False, True, True]
