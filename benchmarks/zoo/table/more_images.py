"""More models of images and text: pages, retrievers, tiles, and pairs of a tower with any other."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.packed import packed
from benchmarks.zoo.row import Fill, Ids, Noise, PaddingMask, Row, Spec, Values, image, images, pair, text
from benchmarks.zoo.table.packed_grids import PADDLE
from benchmarks.zoo.table.padded_patches import DIFFUSION, GEMMA, GEMMA4_INPUTS, GEMMA_VISION, MERGED

IMAGE_TOKEN = 4

PROMPT: dict[str, Spec] = {**text(10, runs=((0, 4, IMAGE_TOKEN),)), **image()}

ANSWER: dict[str, Spec] = {"decoder_input_ids": Ids((2, 5)), "decoder_attention_mask": PaddingMask((2, 5), 1)}

UDOP: dict[str, Any] = {"d_kv": 8, "max_2d_position_embeddings": 64}

PAGE: dict[str, Spec] = {
    **text(),
    "bbox": Values([[[0.1 * word, 0.2, 0.1 * word + 0.08, 0.3] for word in range(7)]] * 2, "float32"),
    **image(),
}
"""Words with their places on a page, as shares of its size, and the page."""

VBERT: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "pixel_shuffle_factor": 2, "text_config": {"pad_token_id": 0}}

VBERT_PROMPT: dict[str, Spec] = {**text(runs=((0, 1, IMAGE_TOKEN),)), "pixel_values": Noise((2, 1, 3, 16, 16))}

NEO: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "embedding_rank": 16,
    "embedding_dim": 16,
    "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}},
}

NEO_PROMPT: dict[str, Spec] = {**text(10, runs=((0, 4, IMAGE_TOKEN),)), "pixel_values": Noise((8, 3 * 8 * 8))}

DOCLING: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "pad_token_id": 0,
    "text_config": {"pad_token_id": 0},
    "vision_config": {"image_size": 32, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
}
TILES: dict[str, Spec] = {
    **text(14, runs=((0, 8, IMAGE_TOKEN),)),
    "pixel_values": Noise((2, 2, 3, 32, 32)),
    "pixel_attention_mask": Fill((2, 2), 1, "bool"),
}

LLAMA4: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "boi_token_index": 5,
    "eoi_token_index": 6,
    "vision_config": {
        "image_size": 32,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "intermediate_size": 128,
    },
    "text_config": {
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 32,
    },
}

MINICPM: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 5,
    "insert_layer_id": 0,
    "vision_config": {"image_size": 32, "insert_layer_id": 0},
    "text_config": {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
}
STRIP: dict[str, Spec] = {
    **text(10, runs=((0, 1, IMAGE_TOKEN),)),
    "pixel_values": Noise((1, 3, 8, 256)),
    "target_sizes": Values([[4, 4]] * 2, "int32"),
}

MOLMO: dict[str, Any] = {
    "image_patch_id": IMAGE_TOKEN,
    "vision_config": {"image_size": [16, 16], "num_position_embeddings": 4, "num_key_value_heads": 4},
    "adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 32, "num_key_value_heads": 4},
    "text_config": {"additional_vocab_size": 8, "rope_scaling_layers": [0, 1]},
}
CROPS: dict[str, Spec] = {
    **text(9, runs=((0, 3, IMAGE_TOKEN),)),
    "pixel_values": Noise((4, 4, 8 * 8 * 3)),
    "image_token_pooling": Values(
        [[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, -1, -1], [8, 9, 10, 11], [12, 13, -1, -1], [14, 15, -1, -1]]
    ),
    "image_grids": Values([[1, 1, 1, 2]] * 2),
    "image_num_crops": Values([2, 2]),
}
"""Per image: the whole as one token of four patches, a crop as two tokens of two patches."""

UNLIMITED: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "vision_config": {
        "sam_config": {
            "image_size": 64,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 40,
            "downsample_channels": [24, 32],
        },
    },
    "text_config": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_layer_types": ["dense", "sparse"],
    },
}

ROWS = (
    Row("VisionTextDualEncoderModel", "vision-text", {**text(), **image()}, {"vision_config": {"pooler_output_size": 32}}),
    Row(
        "VisionEncoderDecoderModel",
        "vision-text",
        {**image(), **ANSWER},
        {"decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}},
    ),
    Row(
        "VisionEncoderDecoderModel",
        "vision-text",
        {**image(), **ANSWER},
        {
            "encoder": {"model_type": "deit"},
            "decoder": {
                "model_type": "trocr",
                "is_decoder": True,
                "add_cross_attention": True,
                "cross_attention_hidden_size": 32,
            },
        },
        variant="trocr",
    ),
    Row(
        "VisionEncoderDecoderModel",
        "vision-text",
        {**image(32), **ANSWER},
        {
            "encoder": {
                "model_type": "donut-swin",
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [2, 4],
                "window_size": 2,
                "hidden_size": 32,
            },
            "decoder": {"model_type": "mbart", "is_decoder": True, "add_cross_attention": True},
        },
        variant="donut",
    ),
    Row("UdopModel", "vision-text", {**PAGE, **ANSWER}, UDOP),
    Row("UdopForConditionalGeneration", "vision-text", {**PAGE, **ANSWER}, UDOP),
    Row("UdopEncoderModel", "vision-text", PAGE, UDOP),
    Row("UltraVBertModel", "vision-text", VBERT_PROMPT, VBERT),
    Row("UltraVBertForMaskedLM", "vision-text", VBERT_PROMPT, VBERT),
    Row("UltraVBertForSequenceClassification", "vision-text", VBERT_PROMPT, VBERT),
    Row("UltraVBertForTokenClassification", "vision-text", VBERT_PROMPT, VBERT),
    Row("NeoMMEModel", "vision-text", NEO_PROMPT, NEO),
    Row("NeoMMEForMaskedLM", "vision-text", NEO_PROMPT, NEO),
    Row("NeoMMEForRetrieval", "vision-text", NEO_PROMPT, NEO),
    *pair("GraniteDocling", "vision-text", TILES, DOCLING),
    Row("Llama4ForConditionalGeneration", "vision-text", {**text(10, runs=((0, 4, IMAGE_TOKEN),)), **image(32)}, LLAMA4),
    *pair("MiniCPMOcr", "vision-text", {**STRIP, **text(10, runs=((0, 4, IMAGE_TOKEN),))}, MINICPM),
    *pair("MiniCPMV4_7", "vision-text", {**STRIP, "mm_token_type_ids": Values([[1] + [0] * 9] * 2)}, MINICPM),
    *pair("Molmo2", "vision-text", CROPS, MOLMO),
    *pair("UnlimitedOcr", "vision-text", {**text(13, runs=((0, 7, IMAGE_TOKEN),)), **image(64)}, UNLIMITED),
    Row(
        "EmbeddingGemma2Model",
        "vision-text",
        {key: GEMMA4_INPUTS[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_position_ids")},
        {
            **GEMMA,
            "text_config": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": GEMMA_VISION,
        },
    ),
    Row(
        "NemotronH_Omni_Reasoning_V3",
        "vision-text",
        {**MERGED, "pixel_values": Noise((24, 8 * 8 * 3)), "image_grid_hw": Values([[4, 4], [4, 2]])},
        {
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 5,
            "audio_token_id": 8,
            "projector_hidden_size": 40,
            "vision_hidden_size": 32,
            "vision_config": {"max_img_size": 64},
            "text_config": {
                "ssm_state_size": 8,
                "mamba_num_heads": 4,
                "mamba_head_dim": 8,
                "n_groups": 2,
                "chunk_size": 4,
                "n_routed_experts": 4,
                "moe_intermediate_size": 24,
                "moe_shared_expert_intermediate_size": 24,
            },
        },
    ),
    Row(
        "T5Gemma2Encoder",
        "vision-text",
        PROMPT,
        {
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 5,
            "eoi_token_index": 6,
            "mm_tokens_per_image": 4,
            "text_config": {"dropout_rate": 0.0, "query_pre_attn_scalar": 8, "sliding_window": 16},
        },
    ),
    Row(
        "PI0Model",
        "vision-text",
        {
            **text(12, runs=((0, 8, IMAGE_TOKEN),)),
            **images(2),
            "pixel_attention_mask": Values([[True, True]] * 2, "bool"),
            "action_embeds": Noise((2, 5, 32)),
        },
        {"vlm_config": {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN}},
        modalities={"action_embeds": "robot"},
    ),
    Row("DiffusionGemmaEncoderModel", "vision-text", GEMMA4_INPUTS, DIFFUSION),
    Row("PaddleOCRVLModel", "vision-text", packed((3, 8, 8)), PADDLE),
)
