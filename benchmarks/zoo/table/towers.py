"""Dual encoders: an image tower and a text tower that meet in a product."""

from __future__ import annotations

from benchmarks.zoo.row import Row, image, text

ROWS = (
    Row("CLIPModel", "vision-text", {**text(), **image()}, {"text_config": {"eos_token_id": 98}}),
    Row("SiglipModel", "vision-text", {**text(), **image()}),
)
