"""What the benchmark of token scores is made of: chosen tokens, ranks, object pixels; and the tables of the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import token_attention_quality as quality

PAGE = Path(__file__).resolve().parents[3] / "docs" / "comp.md"


def test_the_best_of_every_picture() -> None:
    found = quality.best(np.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]]), 2)
    assert found.tolist() == [[False, True, False, True], [True, False, False, True]]


def test_rank_correlation_shares_ranks_among_equals() -> None:
    one = np.array([[1.0, 2.0, 2.0, 5.0]])
    assert quality.ranks(one).tolist() == [[1.0, 2.5, 2.5, 4.0]]
    assert quality.spearman(one, -(one**3)).tolist() == pytest.approx([-1.0])
    assert quality.spearman(one, np.ones((1, 4))).tolist() == [0.0]
    assert quality.spearman(one, np.array([[1.0, 2.0, 3.0, 4.0]])).tolist() == pytest.approx([4.5 / np.sqrt(4.5 * 5.0)])


def test_object_pixels_are_those_that_are_drawn() -> None:
    from emoji_xvlm.scenes import held_out_batch

    scenes = held_out_batch(4)
    pixels = quality.object_pixels(scenes, 64, 8)
    assert pixels.shape == (4, 64)
    areas = [sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) for boxes in scenes.boxes]
    assert all(0.2 * area < own.sum() < area for area, own in zip(areas, pixels, strict=True))
    for boxes, own in zip(scenes.boxes, pixels, strict=True):
        for patch in np.flatnonzero(own):
            top, left = 8 * (patch // 8), 8 * (patch % 8)
            assert any(x0 < left + 8 and x1 > left and y0 < top + 8 and y1 > top for x0, y0, x1, y1 in boxes)


def test_the_page_shows_the_figures() -> None:
    page = PAGE.read_text().splitlines()
    for line in quality.tables(json.loads(quality.RESULT.read_text())):
        assert line in page, line
