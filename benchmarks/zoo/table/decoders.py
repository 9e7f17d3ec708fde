"""Decoders whose text holds places for image features."""

from __future__ import annotations

from benchmarks.zoo.row import Row, image, text

ROWS = (
    Row(
        "LlavaForConditionalGeneration",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image()},
        {
            "image_token_id": 4,
            "image_token_index": 4,
            "vision_feature_layer": -1,
            "vision_config": {"model_type": "clip_vision_model"},
        },
    ),
)
