"""Inputs of models that take images of several sizes packed into one list of patches, with a grid for each image."""

from __future__ import annotations

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
    mask: bool = True,
) -> dict[str, Spec]:
    """``input_ids`` with a run of image tokens for each image, its patches, grids, and whatever steers.

    Args:
        patch: sizes of one row of ``pixel_values``.
        grids: per sample, the grid of each of its images.
        merge: patches along each side that become one token.
        places: grid -> places that an image takes among the tokens, where it is not its merged patches.
        types: with ``mm_token_type_ids``, 1 at image tokens.
        mask: with ``attention_mask``, 0 at padding (which the shorter sample has).
    """
    count = places or (lambda grid: math.prod(grid) // merge**2)
    rows = token_rows([[count(grid) for grid in images] for images in grids])
    flat = [grid for images in grids for grid in images]
    sizes = (patch,) if isinstance(patch, int) else tuple(patch)
    found: dict[str, Spec] = {"input_ids": Values(rows)}
    if mask:
        found["attention_mask"] = Values([[int(token != PADDING) for token in row] for row in rows])
    found["pixel_values"] = Noise((sum(map(math.prod, flat)), *sizes))
    found["image_grid_thw"] = Values(flat)
    if types:
        found["mm_token_type_ids"] = Values([[int(token == IMAGE) for token in row] for row in rows])
    return found


def token_rows(counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids of samples of equal length: words, then for each image a start, its places and an end, words, padding.

    Args:
        counts: per sample, the places of each of its images.
    """
    rows: list[list[int]] = []
    for number, places in enumerate(counts):
        row = [_word(number, 0), _word(number, 1)]
        for count in places:
            row += [START, *[IMAGE] * count, END]
        rows.append([*row, *(_word(number, place) for place in range(2, 6))])
    length = max(map(len, rows))
    return [[*row, *[PADDING] * (length - len(row))] for row in rows]


def _word(sample: int, place: int) -> int:
    """Some word; different ones follow each other."""
    return FIRST_WORD + (17 * sample + 11 * place) % (VOCABULARY - FIRST_WORD)
