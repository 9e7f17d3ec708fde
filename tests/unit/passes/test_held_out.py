"""Which batches calibrate and which are held out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mfcompile.errors import CalibrationError, InputError
from mfcompile.inputs import as_function
from mfcompile.passes.held_out import split_batches
from tests.models import Batch, vlm_batch, vlm_captured


def many(count: int) -> list[Batch]:
    """Batches of three samples, each known by the first id of its text."""
    return [vlm_batch((6, 3, 5), seed=seed) for seed in range(count)]


def split(count: int, **options: Any) -> tuple[list[int], list[int], Any]:
    """(seeds of what calibrates, seeds of what is compared on, the whole result)."""
    batches = many(count)
    found = split_batches(vlm_captured(), lambda: iter(batches), **options)

    def seeds(given: Any) -> list[int]:
        pixels = [item["pixel_values"] if isinstance(item, dict) else item.tensors()["pixel_values"] for item in given]
        return [next(i for i, batch in enumerate(batches) if torch.equal(batch["pixel_values"], one)) for one in pixels]

    assert found.calibration is not None
    assert len(found.calibration) == len(list(found.calibration)) == len(list(found.calibration))
    return seeds(found.calibration), seeds(found.compared), found


@pytest.mark.parametrize(
    ("count", "options", "calibrate", "compared"),
    [
        (7, {}, range(7), range(7)),
        (8, {}, range(7), [7]),
        (17, {}, range(15), [15, 16]),
        (12, {"held_out": 0}, range(12), range(4, 12)),
        (4, {"held_out": 1}, range(3), [3]),
        (12, {"held_out": 10}, range(2), range(2, 12)),
        (9, {"num_samples": 7}, range(3), [3]),
        (20, {"num_samples": 48}, range(16), [16, 17]),
        (9, {"num_samples": 6, "held_out": 3}, range(2), [2, 3, 4]),
        (9, {"num_samples": 6, "held_out": 0}, range(2), range(2)),
        (4, {"num_samples": 12}, range(4), range(4)),
        (9, {"num_samples": 27}, range(8), [8]),
    ],
)
def test_the_last_batches_are_held_out(count: int, options: dict[str, Any], calibrate: Any, compared: Any) -> None:
    first, last, found = split(count, **options)
    assert (first, last) == (list(calibrate), list(compared))
    assert found.is_held_out == (not set(first) & set(last))
    assert found.samples == (3 * len(first), 3 * len(last))
    assert ("held-out" in found.source) == found.is_held_out


def test_an_endless_set_is_read_as_far_as_it_is_needed() -> None:
    drawn = []

    def endless() -> Iterator[Batch]:
        while True:
            drawn.append(1)
            yield vlm_batch((6, 3, 5))

    found = split_batches(vlm_captured(), endless, num_samples=30)
    assert (found.calibration is not None and len(found.calibration), len(found.compared), len(drawn)) == (10, 1, 12)


def test_a_loader_that_shuffles_holds_out_what_did_not_calibrate() -> None:
    loader: Any = DataLoader(many(16), shuffle=True, collate_fn=lambda items: items[0])  # type: ignore[arg-type]
    found = split_batches(vlm_captured(), as_function(loader), seed=4)
    assert found.calibration is not None
    torch.manual_seed(4)  # as calibration is seeded
    used = {float(batch["pixel_values"].sum()) for batch in found.calibration}
    held = {float(item.tensors()["pixel_values"].sum()) for item in found.compared}
    assert (len(used), len(held), used & held) == (14, 2, set())


def test_without_batches_the_example_stands_in() -> None:
    found = split_batches(vlm_captured(), None)
    assert (found.calibration, found.is_held_out, found.source) == (None, False, "example inputs")
    assert found.compared == (vlm_captured().example_inputs,)


@pytest.mark.parametrize(
    ("count", "options", "error", "message"),
    [
        (4, {"held_out": 4}, CalibrationError, "none is left to calibrate"),
        (0, {}, CalibrationError, "the calibration set is empty"),
        (4, {"held_out": -1}, InputError, "held_out must be a number of batches"),
        (4, {"held_out": 1.5}, InputError, "held_out must be a number of batches"),
        (4, {"num_samples": 0}, InputError, "num_samples must be a positive integer"),
    ],
)
def test_what_cannot_be_divided(count: int, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split(count, **options)
    with pytest.raises(InputError, match="no calibration batches to hold out"):
        split_batches(vlm_captured(), None, held_out=2)
