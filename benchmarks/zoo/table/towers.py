"""Dual encoders: an image (or video) tower and a text tower that meet in a product."""

from __future__ import annotations

from benchmarks.zoo.row import DROP, Noise, Row, image, text

LAST_WORD = 98

ENDED = {**text(place={-3: LAST_WORD}), **image()}
"""Text whose end is marked: these towers pool the text there."""

END = {"text_config": {"eos_token_id": LAST_WORD}}

ROWS = (
    Row("Aimv2Model", "vision-text", ENDED, END),
    Row(
        "AlignModel",
        "vision-text",
        {**text(), **image(32)},
        {
            "vision_config": {
                "image_size": 32,
                "width_coefficient": 1.0,
                "depth_coefficient": 1.0,
                "kernel_sizes": [3, 3, 5],
                "in_channels": [32, 8, 8],
                "out_channels": [8, 8, 32],
                "strides": [1, 2, 2],
                "num_block_repeats": [1, 1, 2],
                "expand_ratios": [1, 2, 2],
                "hidden_dim": 32,
            }
        },
    ),
    Row("AltCLIPModel", "vision-text", {**text(), **image()}, {"text_config": {"project_dim": 32}}),
    Row("BlipModel", "vision-text", {**text(), **image()}, {"text_config": {"encoder_hidden_size": 32, "bos_token_id": 2}}),
    Row("ChineseCLIPModel", "vision-text", {**text(), **image()}),
    Row("CLIPModel", "vision-text", ENDED, END),
    Row("CLIPSegModel", "vision-text", ENDED, END),
    Row(
        "GroupViTModel",
        "vision-text",
        ENDED,
        {
            **END,
            "projection_intermediate_dim": 48,
            "vision_config": {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]},
        },
    ),
    Row("MetaClip2Model", "vision-text", ENDED, END),
    Row("Owlv2Model", "vision-text", {**text(), **image()}),
    Row("OwlViTModel", "vision-text", {**text(batch=4), **image()}, note="two queries per image"),
    Row("SiglipModel", "vision-text", {**text(), **image()}),
    Row("Tipsv2Model", "vision-text", {**text(), **image()}, {"vision_config": {"out_features": DROP, "out_indices": DROP}}),
    Row(
        "VideoPrismClipModel",
        "video-text",
        {**text(), "pixel_values_videos": Noise((2, 2, 3, 16, 16))},
        {
            "vision_config": {
                "tubelet_size": [1, 8, 8],
                "num_frames": 2,
                "num_spatial_layers": 2,
                "num_temporal_layers": 2,
                "num_auxiliary_layers": 2,
            }
        },
    ),
    Row(
        "XCLIPModel",
        "video-text",
        {**text(place={-3: LAST_WORD}), "pixel_values": Noise((2, 2, 3, 16, 16))},
        {
            **END,
            "prompt_num_attention_heads": 4,
            "vision_config": {
                "num_frames": 2,
                "mit_hidden_size": 32,
                "mit_intermediate_size": 40,
                "mit_num_hidden_layers": 2,
                "mit_num_attention_heads": 4,
            },
        },
    ),
)
