"""More decoders that read packed images with a grid for each: latent attention, linear attention, experts by layer."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.packed import IMAGE, IMAGE_STARTS, STARTS, TOKENS, packed
from benchmarks.zoo.row import DROP, Values, image, pair, text
from benchmarks.zoo.table.packed_images import MROPE, QWEN2_5, row

COLOURS = 3 * 8 * 8
"""Numbers of a patch of one frame."""

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
}
"""Multi-head latent attention; the second layer has experts."""

DOTS: dict[str, Any] = {
    **TOKENS,
    "text_config": {**LATENT, "pad_token_id": 0},
    "vision_config": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "moe_intermediate_size": 24,
        "num_local_experts": 4,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "audio_config": {
        "feature_size": 16,
        "downsample_hidden_size": 8,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
    },
}
GLM5: dict[str, Any] = {
    **TOKENS,
    **IMAGE_STARTS,
    "text_config": {
        **LATENT,
        "qk_rope_head_dim": 0,
        "pad_token_id": 0,
        "index_kpool": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "indexed_attention"],
    },
    "vision_config": {"out_hidden_size": 32, "projection_intermediate_size": 40},
}
HYPERCLOVA: dict[str, Any] = {**TOKENS, "vision_config": {**QWEN2_5["vision_config"]}}
INKLING: dict[str, Any] = {
    "image_token_id": IMAGE,
    "text_config": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "rel_extent": 32,
    },
    "vision_config": {"posemb_grid_size": 4, "projection_hidden_dim": 40, "text_hidden_size": 32},
}
LFM: dict[str, Any] = {
    **TOKENS,
    **STARTS,
    "projector_hidden_size": 40,
    "text_config": {"pad_token_id": 0, "layer_types": ["conv", "full_attention"]},
}
QWEN4: dict[str, Any] = {
    **TOKENS,
    **STARTS,
    "text_config": {
        **MROPE,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "layer_types": ["linear_attention", "indexed_attention"],
    },
    "vision_config": {"out_hidden_size": 32, "num_position_embeddings": 16},
}
MUSE: dict[str, Any] = {
    **TOKENS,
    "audio_token_id": 8,
    "out_hidden_size": 128,
    "projector_hidden_size": 32,
    "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4, "layer_types": ["window_attention", "full_attention"]},
    "audio_config": {
        "patch_sizes": [4, 2],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 32,
    },
    "text_config": {
        "layer_rope_theta": DROP,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 8,
        "moe_intermediate_size": 24,
        "moe_hidden_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
MISTRAL: dict[str, Any] = {
    "image_token_index": 4,
    "vision_config": {"image_size": 32},
    "text_config": {**LATENT, "kv_source_layers": DROP, "indexer_types": DROP, "no_rope_layers": DROP},
}

ROWS = (
    *pair("Dots3Note", "vision-text", packed(COLOURS, types=False), DOTS),
    row("Glm5NextModel", GLM5),
    row("Glm5NextForConditionalGeneration", GLM5),
    row("HyperCLOVAXVisionV2Model", HYPERCLOVA),
    row("HyperCLOVAXVisionV2ForConditionalGeneration", HYPERCLOVA),
    *pair("Inkling2", "vision-text", packed((16, 16, 3), merge=1, types=False), INKLING),
    row("Lfm3VlModel", LFM),
    row("Lfm3VlForConditionalGeneration", LFM),
    row("Qwen4ExpModel", QWEN4),
    row("Qwen4ExpForConditionalGeneration", QWEN4),
    *pair("MuseSpark", "vision-text", packed(2 * COLOURS, types=False), MUSE),
    *pair(
        "MistralLarge4",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(32), "image_sizes": Values([[32, 32]] * 2)},
        MISTRAL,
    ),
)
