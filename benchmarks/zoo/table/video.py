"""Models that read frames of a video together with text."""

from __future__ import annotations

from benchmarks.zoo.row import Ids, Noise, PaddingMask, Row, Values, image, images, pair

CLIP = {"model_type": "clip_vision_model"}

ROWS: tuple[Row, ...] = (
    *pair(
        "LlavaNextVideo",
        "all",
        {
            "input_ids": Ids((2, 24), runs=((0, 10, 4), (10, 2, 5))),
            "attention_mask": PaddingMask((2, 24)),
            **images(2),
            "image_sizes": Values([[16, 16]] * 2),
            "pixel_values_videos": Noise((2, 2, 3, 16, 16)),
        },
        {
            "image_token_index": 4,
            "image_token_id": 4,
            "video_token_index": 5,
            "video_token_id": 5,
            "image_grid_pinpoints": [[16, 16]],
            "vision_feature_layer": -1,
            "vision_config": CLIP,
        },
    ),
    *pair(
        "VideoLlava",
        "all",
        {
            "input_ids": Ids((2, 24), runs=((0, 4, 4), (4, 10, 5))),
            "attention_mask": PaddingMask((2, 24)),
            **image(name="pixel_values_images"),
            "pixel_values_videos": Noise((2, 2, 3, 16, 16)),
        },
        {
            "image_token_index": 4,
            "image_token_id": 4,
            "video_token_index": 5,
            "video_token_id": 5,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        },
    ),
    *(
        Row(
            name,
            "video-text",
            {
                "input_ids": Ids((1, 6)),
                "attention_mask": PaddingMask((1, 6)),
                "pixel_values": Noise((1, 2, 3, 64, 64)),
            },
            {
                "num_frames": 2,
                "max_img_size": 64,
                "visual_prompt_size": 8,
                "max_grid_col_position_embeddings": 8,
                "max_grid_row_position_embeddings": 8,
                "backbone_config": {
                    "embedding_size": 8,
                    "hidden_sizes": [8, 16, 24, 32],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                },
            },
            note="a batch of one: transformers adds positions of columns to no larger one",
        )
        for name in ("TvpModel", "TvpForVideoGrounding")
    ),
)
