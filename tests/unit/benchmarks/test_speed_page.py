"""docs/speed.md says what the results say."""

from __future__ import annotations

import pytest

from benchmarks.speed_page import BLOCK, BLOCKS, PAGE, load_results, render

TEXT = PAGE.read_text(encoding="utf-8")


def test_every_block_is_what_the_results_give() -> None:
    assert render(TEXT, load_results()) == TEXT, "run python -m benchmarks.speed_page"


def test_the_page_has_every_block_once() -> None:
    assert sorted(found[1] for found in BLOCK.findall(TEXT)) == sorted(BLOCKS)


def test_another_figure_would_be_seen() -> None:
    results = load_results()
    row = results["sparse"]["speed"][0]
    row["speedup"] = row["speedup"] + 1
    assert render(TEXT, results) != TEXT


def test_a_block_without_a_writer_is_refused() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        render("<!-- nonsense -->\n<!-- end -->", {})
