"""Models that read images as rows of patches, padded to the longest, with the place of each patch."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.packed import IMAGE, VIDEO, image_run, placed_text, token_types
from benchmarks.zoo.row import Ids, Noise, Row, Spec, Values, text
from benchmarks.zoo.table.packed_images import QWEN2

COLOURS = 3 * 8 * 8
"""Numbers of a patch: three colours, 8x8."""

PATCHES: dict[str, Spec] = {
    "pixel_values": Noise((2, 16, COLOURS)),
    "pixel_attention_mask": Values([[1] * 16, [1] * 8 + [0] * 8]),
    "spatial_shapes": Values([[4, 4], [2, 4]]),
}
"""An image of 4x4 patches and one of 2x4."""

POSITIONS = Values(
    [
        [[number % 4, number // 4] for number in range(16)],
        [[number % 4, number // 4] if number < 8 else [-1, -1] for number in range(16)],
    ]
)
"""Column and row of each patch, -1 for padding: 4x4 patches and 4x2."""

MERGED = placed_text([[image_run(4)], [image_run(2)]])
"""Four patches become one token."""

GEMMA: dict[str, Any] = {
    "boi_token_id": 6,
    "eoi_token_id": 7,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": 8,
    "boa_token_id": 9,
    "eoa_token_index": 10,
}
"""Special tokens below the first word."""

GEMMA_TEXT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 8,
    "global_head_dim": 16,
}
"""The last two layers read the keys and values of the first two."""

EXPERTS: dict[str, Any] = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
GEMMA_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "num_key_value_heads": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
GEMMA4: dict[str, Any] = {
    **GEMMA,
    "text_config": {**GEMMA_TEXT, **EXPERTS, "use_bidirectional_attention": "vision"},
    "vision_config": GEMMA_VISION,
    "audio_config": None,
}
GEMMA4_INPUTS = {
    **MERGED,
    "pixel_values": Noise((2, 16, COLOURS)),
    "image_position_ids": POSITIONS,
    **token_types(MERGED, {IMAGE: 1}),
}
UNIFIED: dict[str, Any] = {
    **GEMMA,
    "text_config": {"sliding_window": 8, "global_head_dim": 16},
    "vision_config": {
        "pooling_kernel_size": 2,
        "patch_size": 4,
        "mm_embed_dim": 32,
        "mm_posemb_size": 16,
        "output_proj_dims": 32,
    },
    "audio_config": {"audio_embed_dim": 32},
}
_UNIFIED_TEXT = placed_text([[image_run(4)], [image_run(2)]])
UNIFIED_INPUTS = {
    **_UNIFIED_TEXT,
    "pixel_values": Noise((2, 4, COLOURS)),
    "image_position_ids": Values([[[0, 0], [1, 0], [0, 1], [1, 1]], [[0, 0], [1, 0], [-1, -1], [-1, -1]]]),
    **token_types(_UNIFIED_TEXT, {IMAGE: 1}),
}
DIFFUSION: dict[str, Any] = {
    **{key: GEMMA[key] for key in ("boi_token_id", "eoi_token_id", "image_token_id")},
    "canvas_length": 8,
    "text_config": {
        "sliding_window": 8,
        "global_head_dim": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "vision_config": GEMMA_VISION,
}
LFM2: dict[str, Any] = {
    "image_token_id": IMAGE,
    "projector_hidden_size": 40,
    "text_config": {"layer_types": ["conv", "full_attention"]},
    "vision_config": {"num_patches": 16},
}

ROWS = (
    Row("Siglip2Model", "vision-text", {**text(), **PATCHES}, {"vision_config": {"num_patches": 16}}),
    Row("Lfm2VlModel", "vision-text", {**MERGED, **PATCHES}, LFM2),
    Row("Lfm2VlForConditionalGeneration", "vision-text", {**MERGED, **PATCHES}, LFM2),
    Row("Gemma4Model", "vision-text", GEMMA4_INPUTS, GEMMA4),
    Row("Gemma4ForConditionalGeneration", "vision-text", GEMMA4_INPUTS, GEMMA4),
    Row("Gemma4UnifiedModel", "vision-text", UNIFIED_INPUTS, UNIFIED),
    Row("Gemma4UnifiedForConditionalGeneration", "vision-text", UNIFIED_INPUTS, UNIFIED),
    Row("DiffusionGemmaModel", "vision-text", {**GEMMA4_INPUTS, "decoder_input_ids": Ids((2, 8))}, DIFFUSION),
    Row("DiffusionGemmaForBlockDiffusion", "vision-text", {**GEMMA4_INPUTS, "decoder_input_ids": Ids((2, 8))}, DIFFUSION),
    Row(
        "ColQwen2ForRetrieval",
        "vision-text",
        {**MERGED, "pixel_values": Noise((2, 16, 2 * COLOURS)), "image_grid_thw": Values([(1, 4, 4), (1, 2, 4)])},
        {"embedding_dim": 16, "vlm_config": QWEN2},
    ),
)
