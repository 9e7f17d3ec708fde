"""Decoders whose text holds places for image features, a fixed number of places for each image."""

from __future__ import annotations

from benchmarks.zoo.row import Joined, Noise, Row, Values, image, images, pair, text

SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}

ROWS = (
    *pair(
        "Llava",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image()},
        {
            "image_token_id": 4,
            "image_token_index": 4,
            "vision_feature_layer": -1,
            "vision_config": {"model_type": "clip_vision_model"},
        },
    ),
    *pair(
        "VipLlava",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image()},
        {"image_token_id": 4, "image_token_index": 4, "vision_feature_layers": [0, 1], "vision_feature_layer": [-1, -2]},
    ),
    *pair(
        "AyaVision",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(32)},
        {"image_token_id": 4, "image_token_index": 4, "vision_config": {"image_size": 32}},
    ),
    *pair(
        "Cohere2Vision",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(32)},
        {"image_token_id": 4, "alignment_intermediate_size": 64, "vision_config": {"image_size": 32, **SIGLIP}},
    ),
    *pair(
        "DeepseekVL", "vision-text", {**text(10, runs=((0, 4, 4),)), **image()}, {"image_token_id": 4, "vision_config": SIGLIP}
    ),
    *pair(
        "DeepseekVLHybrid",
        "vision-text",
        {**text(22, runs=((0, 16, 4),)), **image(32), **image(64, name="high_res_pixel_values")},
        {
            "image_token_id": 4,
            "vision_config": {"image_size": 32, **SIGLIP},
            "high_res_vision_config": {
                "image_size": 64,
                "patch_size": 16,
                "global_attn_indexes": [0],
                "output_channels": 8,
                "mlp_dim": 40,
                "window_size": 2,
                "num_pos_feats": 16,
            },
        },
    ),
    *pair(
        "GotOcr2",
        "vision-text",
        {**text(10, runs=((0, 1, 4),)), **image(32)},
        {
            "image_token_id": 4,
            "image_token_index": 4,
            "vision_config": {
                "image_size": 32,
                "window_size": 2,
                "global_attn_indexes": [1],
                "output_channels": 16,
                "mlp_dim": 40,
            },
        },
    ),
    *pair(
        "InternVL",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(32)},
        {"image_token_id": 4, "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    ),
    *pair(
        "QianfanOCR",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(32)},
        {"image_token_id": 4, "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    ),
    *pair(
        "DeepseekOcr2",
        "vision-text",
        {**text(152, runs=((0, 145, 4),)), **image()},
        {
            "image_token_id": 4,
            "vision_config": {
                "sam_config": {
                    "image_size": 64,
                    "output_channels": 16,
                    "window_size": 2,
                    "global_attn_indexes": [1],
                    "mlp_dim": 40,
                    "downsample_channels": [24, 32],
                },
                "encoder_config": {"max_position_embeddings": 512},
            },
            "text_config": {
                "max_position_embeddings": 512,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "mlp_layer_types": ["dense", "sparse"],
            },
        },
    ),
    *pair(
        "Idefics2",
        "vision-text",
        {**text(10, runs=((0, 6, 4),)), **images(2)},
        {
            "image_token_id": 4,
            "perceiver_config": {
                "resampler_n_latents": 3,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
            },
        },
    ),
    *pair("Idefics3", "vision-text", {**text(10, runs=((0, 2, 4),)), **images(2)}, {"image_token_id": 4}),
    *pair("SmolVLM", "vision-text", {**text(10, runs=((0, 2, 4),)), **images(2)}, {"image_token_id": 4}),
    Row(
        "ColModernVBertForRetrieval",
        "vision-text",
        {**text(10, runs=((0, 2, 4),)), **images(2)},
        {
            "embedding_dim": 16,
            "vlm_config": {
                "image_token_id": 4,
                "pixel_shuffle_factor": 2,
                "text_config": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
            },
        },
    ),
    *pair(
        "Kosmos2",
        "vision-text",
        {
            **text(10, runs=((1, 3, 4),)),
            **image(),
            "image_embeds_position_mask": Values([[0, 1, 1, 1, 0, 0, 0, 0, 0, 0]] * 2),
        },
        {"latent_query_num": 3, "text_config": {"layers": 2, "attention_heads": 4}},
    ),
    *pair(
        "Kosmos2_5",
        "vision-text",
        {
            **text(10, runs=((1, 3, 4),)),
            "flattened_patches": Joined(
                (Values([[[row, column] for row in range(2) for column in range(3)]] * 2, "float32"), Noise((2, 6, 192)))
            ),
            "image_embeds_position_mask": Values([[0, 1, 1, 1, 0, 0, 0, 0, 0, 0]] * 2),
        },
        {
            "latent_query_num": 3,
            "text_config": {"layers": 2, "attention_heads": 4},
            "vision_config": {"patch_embed_hidden_size": 192, "max_num_patches": 16},
        },
    ),
    Row("GitModel", "vision-text", {**text(), **image()}),
    Row("GitForCausalLM", "vision-text", {**text(), **image()}),
    Row(
        "Blip2ForConditionalGeneration",
        "vision-text",
        {**text(10, runs=((0, 3, 4),)), **image()},
        {"image_token_index": 4, "image_token_id": 4, "num_query_tokens": 3, "qformer_config": {"encoder_hidden_size": 32}},
    ),
)
