"""How the calibration set is cut, ordered and padded changes no mask bit of the recorded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch

import mfcompile
from tests.oracle import recorded
from tests.oracle.recorded import Batch

IMAGE_TOKENS = 17
GENERAL = "multiflow_general@0.63"
REGION = "multiflow_regionfix@0.63"


@cache
def captured() -> mfcompile.CapturedGraph:
    return mfcompile.capture(recorded.model(), recorded.general_batches()[0])


def assert_recorded(masks: mfcompile.MaskSet, key: str) -> None:
    found, expected = {name: mask.numpy() for name, mask in masks.items()}, recorded.masks(key)
    assert found.keys() == expected.keys()
    assert recorded.differing_bits(found, expected) == {}


def assert_gives(batches: Iterable[object], key: str) -> None:
    regions = mfcompile.infer_regions(captured())
    statistics = mfcompile.calibrate(captured(), batches, regions=regions)
    assert_recorded(mfcompile.select_masks(captured(), regions, statistics, rounding="official"), key)


def rows(batch: Batch, chosen: torch.Tensor) -> Batch:
    return {name: tensor[chosen] for name, tensor in batch.items()}


def split(batches: list[Batch], size: int) -> list[Batch]:
    parts = []
    for batch in batches:
        order = torch.arange(len(batch["text_ids"]))
        parts += [rows(batch, order[start : start + size]) for start in range(0, len(order), size)]
    return parts


def split_by_image(batch: Batch) -> list[Batch]:
    """One region batch per image, with all texts of that image."""
    parts = []
    for image in range(len(batch["image"])):
        texts = (batch["idx_to_group_img"] == image).nonzero()[:, 0]
        part = {name: batch[name][texts] for name in ("text_ids", "text_atts", "image_atts")}
        parts.append({"image": batch["image"][image : image + 1], **part, "idx_to_group_img": torch.zeros_like(texts)})
    return parts


def pad_right(batch: Batch, count: int) -> Batch:
    grown = {name: torch.nn.functional.pad(batch[name], (0, count)) for name in ("text_ids", "text_atts")}
    return {**batch, **grown}


def pad_left(batch: Batch) -> Batch:
    """The same tokens, flush right."""
    lengths = batch["text_atts"].sum(1)
    moved = dict(batch)
    for name in ("text_ids", "text_atts"):
        total = batch[name].shape[1]
        moved[name] = torch.stack([row.roll(total - int(length)) for row, length in zip(batch[name], lengths, strict=True)])
    return moved


def trim(batch: Batch) -> Batch:
    """Without the columns that are padding in every row."""
    length = int(batch["text_atts"].sum(1).max())
    return {**batch, "text_ids": batch["text_ids"][:, :length], "text_atts": batch["text_atts"][:, :length]}


REBATCHED: dict[str, Callable[[list[Batch]], list[Batch]]] = {
    "ones": lambda batches: split(batches, 1),
    "ones, without their padding": lambda batches: [trim(batch) for batch in split(batches, 1)],
    "twos": lambda batches: split(batches, 2),
    "threes and ones": lambda batches: split(batches, 3),
    "one batch": lambda batches: [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}],
    "reversed batches": lambda batches: batches[::-1],
    "reversed rows": lambda batches: [rows(batch, torch.arange(3, -1, -1)) for batch in batches],
    "twice": lambda batches: batches + batches,
}


@pytest.mark.parametrize("how", REBATCHED)
def test_rebatching_general_batches(how: str) -> None:
    assert_gives(REBATCHED[how](recorded.general_batches()), GENERAL)


def test_batches_may_come_from_a_generator_of_tuples() -> None:
    assert_gives((tuple(batch.values()) for batch in recorded.general_batches()), GENERAL)


def test_region_batches_may_follow_the_general_ones() -> None:
    assert_gives(recorded.region_batches() + recorded.general_batches()[::-1], REGION)


def test_region_batches_may_be_cut_by_image() -> None:
    parts = [part for batch in recorded.region_batches() for part in split_by_image(batch)]
    assert sum(len(part["text_ids"]) for part in parts) == 12
    assert_gives([*split(recorded.general_batches(), 1), *parts], REGION)


def test_statistics_of_two_runs_add_up() -> None:
    regions = mfcompile.infer_regions(captured())
    general = mfcompile.calibrate(captured(), recorded.general_batches(), regions=regions)
    region = mfcompile.calibrate(captured(), recorded.region_batches(), regions=regions)
    for merged in (general.merge(region), region.merge(general)):
        assert_recorded(mfcompile.select_masks(captured(), regions, merged, rounding="official"), REGION)


@pytest.mark.parametrize("count", [1, IMAGE_TOKENS - 12], ids=["one", "as long as the image"])
def test_more_padding(count: int) -> None:
    """The padding mask must not speak of image tokens, also where there are as many of them as of text tokens."""
    assert_gives([pad_right(batch, count) for batch in recorded.general_batches()], GENERAL)
    assert_gives([pad_right(batch, count) for batch in recorded.interleaved_batches()], REGION)


@pytest.mark.parametrize("key", [GENERAL, REGION])
def test_an_example_as_long_as_the_image(key: str) -> None:
    batches = recorded.general_batches() if key == GENERAL else recorded.interleaved_batches()
    padded = [pad_right(batch, IMAGE_TOKENS - 12) for batch in batches]
    compiled = mfcompile.compile_pruned(recorded.model(), padded[0], calibration=padded, rounding="official")
    assert_recorded(compiled.masks, key)


def test_an_example_without_padding() -> None:
    batch = recorded.general_batches()[0]
    example = {**batch, "text_atts": torch.ones_like(batch["text_atts"])}
    calibration = recorded.interleaved_batches()
    compiled = mfcompile.compile_pruned(recorded.model(), example, calibration=calibration, rounding="official")
    assert_recorded(compiled.masks, REGION)


def test_padding_on_the_left() -> None:
    batches = [pad_left(batch) for batch in recorded.interleaved_batches()]
    assert not bool(batches[0]["text_atts"][:, 0].all()), "some row must begin with padding"
    model = recorded.model(positions_from_mask=True)
    compiled = mfcompile.compile_pruned(model, batches[0], calibration=batches, rounding="official")
    assert_recorded(compiled.masks, REGION)


def test_padding_by_the_name_of_its_mask() -> None:
    compiled = mfcompile.compile_pruned(
        recorded.model(),
        recorded.general_batches()[0],
        calibration=recorded.general_batches(),
        padding_mask="text_atts",
        rounding="official",
    )
    assert_recorded(compiled.masks, GENERAL)
