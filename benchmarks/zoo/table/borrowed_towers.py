"""Models whose vision tower comes from timm by default; where the configuration allows, a tower of transformers stands in.

transformers builds timm's towers only where torchvision is installed too. Most of the configurations take any tower.
"""

from __future__ import annotations

from benchmarks.zoo.row import Ids, Noise, PaddingMask, Row, image, images, pair, text

CONVOLUTIONS = {
    "model_type": "convnext",
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 2, 2],
    "hidden_size": 32,
    "num_channels": 3,
    "patch_size": 4,
}
"""(batch, 32, height / 32, width / 32)."""

ROWS: tuple[Row, ...] = (
    *pair(
        "FastVlm",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(64)},
        {"image_token_index": 4, "image_token_id": 4, "vision_config": CONVOLUTIONS},
        note="a ConvNeXt stands in for timm's FastViT",
    ),
    *pair(
        "PerceptionLM",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **images(1)},
        {
            "image_token_id": 4,
            "video_token_id": 5,
            "vision_config": {"model_type": "clip_vision_model", "model_args": {"embed_dim": 32}},
        },
        note="a CLIP tower stands in for timm's",
    ),
    *pair(
        "Gemma3n",
        "vision-text",
        {**text(10, runs=((0, 4, 100),)), **image(64)},
        {
            "image_token_id": 100,
            "audio_token_id": 105,
            "vision_soft_tokens_per_image": 4,
            "vision_config": {
                "architecture": "convnext_atto",
                "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
                "vocab_size": 4,
                "vocab_offset": 99,
            },
            "text_config": {
                "vocab_size": 110,
                "vocab_size_per_layer_input": 99,
                "hidden_size_per_layer_input": 8,
                "intermediate_size": 40,
                "activation_sparsity_pattern": [0.95, 0.0],
                "num_kv_shared_layers": 0,
                "laurel_rank": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "audio_config": {
                "vocab_size": 4,
                "vocab_offset": 103,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 4,
                "sscp_conv_channel_size": [4, 4],
                "input_feat_size": 16,
            },
        },
        note="the configuration takes no tower but timm's: needs timm and torchvision",
    ),
    Row(
        "PeVideoModel",
        "video-text",
        {
            "input_ids": Ids((2, 7)),
            "attention_mask": PaddingMask((2, 7)),
            "pixel_values_videos": Noise((2, 2, 3, 16, 16)),
            "padding_mask_videos": PaddingMask((2, 2), 1, "bool"),
        },
        {
            "text_config": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
            "video_config": {
                "config_class": "PeVideoEncoderConfig",
                "vision_config": {"config_class": "ViTConfig", "num_labels": 16},
            },
        },
        note="a ViT stands in for timm's",
    ),
)
