"""Inputs of models that take images of several sizes packed into one list of patches, with a grid for each image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.zoo.row import FIRST_WORD, VOCABULARY, Noise, Spec, Values

IMAGE, VIDEO, START, END, PADDING = 4, 5, 6, 7, 0
"""Tokens: a place for an image's feature, for a video's, before an image, after it, and padding."""

TOKENS: Mapping[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
STARTS: Mapping[str, Any] = {"vision_start_token_id": START, "vision_end_token_id": END}
IMAGE_STARTS: Mapping[str, Any] = {"image_start_token_id": START, "image_end_token_id": END}

Grid = tuple[int, int, int]
GRIDS: tuple[tuple[Grid, ...], ...] = (((1, 4, 4), (1, 2, 4)), ((1, 2, 2),))
"""Two samples; the first has two images. Each image is (frames, rows of patches, columns of patches)."""


def packed(
    patch: Sequence[int] | int,
    *,
    grids: tuple[tuple[Grid, ...], ...] = GRIDS,
    merge: int = 2,
    places: Callable[[Grid], int] | None = None,
    types: bool = True,
) -> dict[str, Spec]:
    """Text with a run of image tokens for each image, the patches of all images, and a grid for each.

    Args:
        patch: sizes of one row of ``pixel_values``.
        grids: per sample, the grid of each of its images.
        merge: patches along each side that become one token.
        places: grid -> places that an image takes among the tokens, where it is not its merged patches.
        types: with ``mm_token_type_ids``, 1 at image tokens.
    """
    count = places or (lambda grid: math.prod(grid) // merge**2)
    flat = [grid for images in grids for grid in images]
    sizes = (patch,) if isinstance(patch, int) else tuple(patch)
    found = placed_text([[image_run(count(grid)) for grid in images] for images in grids])
    found["pixel_values"] = Noise((sum(map(math.prod, flat)), *sizes))
    found["image_grid_thw"] = Values(flat)
    if types:
        found |= token_types(found, {IMAGE: 1})
    return found


def token_rows(runs: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Token ids of samples of equal length: two words, the runs, four words, padding.

    Args:
        runs: per sample, the tokens of each of its images or recordings.
    """
    rows = [
        [_word(number, 0), _word(number, 1), *itertools.chain(*own), *(_word(number, place) for place in range(2, 6))]
        for number, own in enumerate(runs)
    ]
    length = max(map(len, rows))
    return [[*row, *[PADDING] * (length - len(row))] for row in rows]


def image_run(places: int) -> list[int]:
    """The tokens of an image: a start, its places, an end."""
    return [START, *[IMAGE] * places, END]


def placed_text(runs: Sequence[Sequence[Sequence[int]]]) -> dict[str, Spec]:
    """``input_ids`` (see ``token_rows``) and ``attention_mask``, 0 at padding."""
    rows = token_rows(runs)
    return {"input_ids": Values(rows), "attention_mask": Values([[int(token != PADDING) for token in row] for row in rows])}


def token_types(inputs: Mapping[str, Any], types: Mapping[int, int]) -> dict[str, Spec]:
    """``mm_token_type_ids`` of the tokens in ``inputs``: the type of each placeholder, 0 of others."""
    rows = inputs["input_ids"].values
    return {"mm_token_type_ids": Values([[types.get(token, 0) for token in row] for row in rows])}


def _word(sample: int, place: int) -> int:
    """Some word; different ones follow each other."""
    return FIRST_WORD + (17 * sample + 11 * place) % (VOCABULARY - FIRST_WORD)
