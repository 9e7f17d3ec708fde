"""More decoders that read packed images with a grid for each: other position embeddings, mergers and experts."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.packed import IMAGE, IMAGE_STARTS, STARTS, TOKENS, VIDEO, packed
from benchmarks.zoo.row import DROP, Row, Values
from benchmarks.zoo.table.packed_images import MROPE, QWEN2, QWEN2_5, QWEN3, row

COLOURS = 3 * 8 * 8
"""Numbers of a patch of one frame: three colours, 8x8."""

COMPASS: dict[str, Any] = {
    **QWEN3,
    "text_config": {"rope_parameters": {"full_attention": MROPE["rope_parameters"]}},
}
COSMOS_EDGE: dict[str, Any] = {
    **QWEN2,
    "projector_hidden_size": 32,
    "vision_config": {"num_patches": 16},
}
ERNIE_ROPE: dict[str, Any] = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}}
ERNIE: dict[str, Any] = {
    **TOKENS,
    **IMAGE_STARTS,
    "text_config": {**ERNIE_ROPE, "moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2},
}
EXAONE: dict[str, Any] = {**TOKENS, "vision_config": QWEN2_5["vision_config"]}
GLM_IMAGE: dict[str, Any] = {
    **TOKENS,
    **IMAGE_STARTS,
    "text_config": {**MROPE, "vision_vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1},
    "vq_config": {"num_embeddings": 4, "latent_channels": 32},
}
HUNYUAN: dict[str, Any] = {
    "image_token_id": IMAGE,
    "text_config": {**MROPE, "head_dim": 8},
    "vision_config": {"out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 32},
}
MINIMAX: dict[str, Any] = {
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "projector_hidden_size": 32,
    "text_config": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "dense_intermediate_size": 40,
        "shared_intermediate_size": 24,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "rotary_dim": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
}
MUSE: dict[str, Any] = {
    **TOKENS,
    "out_hidden_size": 128,
    "projector_hidden_size": 40,
    "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4, "initializer_range": 0.2},
    "text_config": {"layer_rope_theta": DROP, "sliding_window": 8, "initializer_range": 0.2},
}
"""Weights of a scale that suits a width of 32: with smaller ones a norm behind the projector would enlarge the last bits."""

PADDLE: dict[str, Any] = {**TOKENS, **STARTS, "text_config": MROPE}
VIDEO_LLAMA: dict[str, Any] = {**TOKENS, "vision_config": {}}


def _hunyuan_places(grid: tuple[int, int, int]) -> int:
    """A newline after each row of merged patches, a token before the image and one after it."""
    _, high, wide = grid
    return high // 2 * (wide // 2 + 1) + 2


def _glm_image_inputs() -> dict[str, Any]:
    """Each sample has one source image and the grid of the image to generate, which has no patches."""
    found = packed(COLOURS, grids=(((1, 4, 4),), ((1, 2, 2),)), merge=1, types=False)
    return {
        **found,
        "image_grid_thw": Values([(1, 4, 4), (1, 2, 4), (1, 2, 2), (1, 4, 4)]),
        "images_per_sample": Values([2, 2]),
    }


ROWS = (
    row("CohereCompassModel", COMPASS),
    row("CohereCompassForConditionalGeneration", COMPASS),
    Row("Cosmos3EdgeModel", "vision-text", packed(COLOURS), COSMOS_EDGE),
    Row("Cosmos3EdgeForConditionalGeneration", "vision-text", packed(COLOURS), COSMOS_EDGE),
    Row("Ernie4_5_VLMoeModel", "vision-text", packed(COLOURS), ERNIE),
    Row("Ernie4_5_VLMoeForConditionalGeneration", "vision-text", packed(COLOURS), ERNIE),
    Row("Exaone4_5_Model", "vision-text", packed(2 * COLOURS, types=False), EXAONE),
    Row("Exaone4_5_ForConditionalGeneration", "vision-text", packed(2 * COLOURS, types=False), EXAONE),
    Row("GlmImageModel", "vision-text", _glm_image_inputs(), GLM_IMAGE),
    Row("GlmImageForConditionalGeneration", "vision-text", _glm_image_inputs(), GLM_IMAGE),
    Row("HunYuanVLModel", "vision-text", packed(COLOURS, places=_hunyuan_places), HUNYUAN),
    Row("HunYuanVLForConditionalGeneration", "vision-text", packed(COLOURS, places=_hunyuan_places), HUNYUAN),
    Row("MiniMaxM3VLModel", "vision-text", packed(2 * COLOURS, types=False), MINIMAX),
    Row("MiniMaxM3SparseForConditionalGeneration", "vision-text", packed(2 * COLOURS, types=False), MINIMAX),
    Row("MuseGlimmerModel", "vision-text", packed(2 * COLOURS, types=False), MUSE),
    Row("MuseGlimmerForConditionalGeneration", "vision-text", packed(2 * COLOURS, types=False), MUSE),
    Row("PaddleOCRVLForConditionalGeneration", "vision-text", packed((3, 8, 8)), PADDLE),
    Row(
        "VideoLlama3Model",
        "vision-text",
        {**packed(COLOURS, types=False), "image_merge_sizes": Values([2, 2, 2])},
        VIDEO_LLAMA,
    ),
    Row(
        "VideoLlama3ForConditionalGeneration",
        "vision-text",
        {**packed(COLOURS, types=False), "image_merge_sizes": Values([2, 2, 2])},
        VIDEO_LLAMA,
    ),
)
