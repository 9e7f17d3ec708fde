"""Decoders that read the size of every image, or patches cut beforehand; and mixtures of experts that see images."""

from __future__ import annotations

from benchmarks.zoo.row import DROP, Noise, Row, Values, image, images, pair, text

SQUARES = Values([[16, 16]] * 2)
"""Sizes of two images of one tile."""

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

ROWS: tuple[Row, ...] = (
    *pair(
        "LlavaNext",
        "vision-text",
        {**text(18, runs=((0, 10, 4),)), **images(2), "image_sizes": SQUARES},
        {
            "image_token_index": 4,
            "image_token_id": 4,
            "image_grid_pinpoints": [[16, 16]],
            "vision_feature_layer": -1,
            "vision_config": {"model_type": "clip_vision_model"},
        },
    ),
    *pair(
        "Granite4Vision",
        "vision-text",
        {**text(18, runs=((0, 10, 4),)), **images(2, 32), "image_sizes": Values([[32, 32]] * 2)},
        {
            "image_token_index": 4,
            "image_token_id": 4,
            "image_grid_pinpoints": [[32, 32]],
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[1, 0]],
            "spatial_target_layers": [0, 1, 0, 1],
            "vision_feature_layer": -1,
            "qformer_config": {"num_hidden_layers": 1},
            "vision_config": {"hidden_size": 64, "image_size": 32},
        },
    ),
    *pair(
        "Mistral3",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(32), "image_sizes": Values([[32, 32]] * 2)},
        {"image_token_index": 4, "image_token_id": 4, "vision_config": {"image_size": 32}},
    ),
    *pair(
        "LightOnOcr",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(32), "image_sizes": Values([[32, 32]] * 2)},
        {"image_token_id": 4, "vision_config": {"image_size": 32}},
    ),
    *pair(
        "MiniCPMV4_6",
        "vision-text",
        {
            **text(10, runs=((0, 1, 4),)),
            "pixel_values": Noise((1, 3, 8, 256)),
            "target_sizes": Values([[4, 4]] * 2, "int32"),
        },
        {
            "image_token_id": 4,
            "image_size": 32,
            "insert_layer_id": 0,
            "vision_config": {"image_size": 32, "insert_layer_id": 0},
            "text_config": {
                "head_dim": 16,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
                "rope_parameters": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
            },
        },
    ),
    *pair(
        "Step3p7",
        "vision-text",
        {**text(10, runs=((0, 1, 4),)), **image(32)},
        {
            "image_token_id": 4,
            "vision_config": {"image_size": 32, "mlp_ratio": 1.5},
            "text_config": {
                **EXPERTS,
                "share_expert_dim": 24,
                "num_sliding_attention_heads": DROP,
                "query_pre_attn_scalar": DROP,
                "sliding_window": 64,
                "mlp_layer_types": ["dense", "sparse"],
                "pad_token_id": 1,
            },
        },
    ),
    *pair(
        "Kimi_K25",
        "vision-text",
        {
            **text(10, runs=((0, 4, 4),)),
            "pixel_values": Noise((32, 3, 8, 8)),
            "image_grid_thw": Values([[1, 4, 4]] * 2),
        },
        {
            "image_token_id": 4,
            "video_token_id": 5,
            "projection_hidden_size": 32,
            "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1},
            "text_config": {
                **EXPERTS,
                "n_group": 2,
                "topk_group": 1,
                "num_key_value_heads": 4,
                "kv_lora_rank": 16,
                "q_lora_rank": 24,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "qk_head_dim": 16,
                "first_k_dense_replace": 1,
            },
        },
    ),
    *pair(
        "Inkling",
        "vision-text",
        {**text(12, runs=((0, 2, 4),)), "pixel_values": Noise((4, 2, 2, 2, 3))},
        {
            "image_token_id": 4,
            "audio_token_id": 5,
            "vision_config": {"patch_size": 2, "n_layers": 3, "num_hidden_layers": 3},
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8},
            "text_config": {
                **EXPERTS,
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 8,
                "layer_types": ["hybrid_sliding", "hybrid"],
                "mlp_layer_types": ["dense", "sparse"],
                "rel_extent": 32,
            },
        },
        note="patches come cut: (patches, frames, height, width, channels), one place for each",
    ),
)
