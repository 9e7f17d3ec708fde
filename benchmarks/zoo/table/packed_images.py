"""Decoders that read images of several sizes, packed into one list of patches with a grid for each (Qwen-VL like)."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.packed import IMAGE_STARTS, STARTS, TOKENS, packed
from benchmarks.zoo.row import Row

MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
"""Sections of half a head's dimensions for time, height and width."""

GLM_ROPE: dict[str, Any] = {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}

QWEN2: dict[str, Any] = {**TOKENS, **STARTS, "text_config": MROPE}
QWEN2_5: dict[str, Any] = {
    **QWEN2,
    "vision_config": {"out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]},
}
QWEN3: dict[str, Any] = {
    **QWEN2,
    "vision_config": {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}
QWEN3_MOE: dict[str, Any] = {
    **QWEN3,
    "text_config": {**MROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
LINEAR_ATTENTION: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 1, 1],
    },
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN3_5: dict[str, Any] = {
    **TOKENS,
    **STARTS,
    "text_config": LINEAR_ATTENTION,
    "vision_config": {"out_hidden_size": 32, "num_position_embeddings": 16},
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
QWEN3_5_MOE: dict[str, Any] = {**QWEN3_5, "text_config": {**LINEAR_ATTENTION, **EXPERTS}}
GLM4V: dict[str, Any] = {**TOKENS, **IMAGE_STARTS, "text_config": MROPE, "vision_config": {"out_hidden_size": 32}}
GLM4V_MOE: dict[str, Any] = {
    **GLM4V,
    "text_config": {**GLM_ROPE, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
PATCH = 2 * 3 * 8 * 8
"""Numbers of a patch: two frames, three colours, 8x8."""


def row(name: str, config: dict[str, Any], **more: Any) -> Row:
    """A row with the inputs that most of these models take."""
    return Row(name, "vision-text", packed(PATCH), config, **more)


ROWS = (
    row("Qwen2VLModel", QWEN2),
    row("Qwen2VLForConditionalGeneration", QWEN2),
    row("Qwen2_5_VLModel", QWEN2_5),
    row("Qwen2_5_VLForConditionalGeneration", QWEN2_5),
    row("Qwen3VLModel", QWEN3),
    row("Qwen3VLForConditionalGeneration", QWEN3),
    row("Qwen3VLMoeModel", QWEN3_MOE),
    row("Qwen3VLMoeForConditionalGeneration", QWEN3_MOE),
    row("Qwen3_5Model", QWEN3_5),
    row("Qwen3_5ForConditionalGeneration", QWEN3_5),
    row("Qwen3_5ForSequenceClassification", {**QWEN3_5, "text_config": {**LINEAR_ATTENTION, "pad_token_id": 0}}),
    row("Qwen3_5ForTokenClassification", QWEN3_5),
    row("Qwen3_5MoeModel", QWEN3_5_MOE),
    row("Qwen3_5MoeForConditionalGeneration", QWEN3_5_MOE),
    row("Cosmos3OmniModel", QWEN3),
    row("Cosmos3OmniForConditionalGeneration", QWEN3),
    row("Glm4vModel", GLM4V),
    row("Glm4vForConditionalGeneration", GLM4V),
    row("Glm46VModel", GLM4V),
    row("Glm46VForConditionalGeneration", GLM4V),
    row("GlmOcrModel", GLM4V),
    row("GlmOcrForConditionalGeneration", GLM4V),
    row("Glm4vMoeModel", GLM4V_MOE),
    row("Glm4vMoeForConditionalGeneration", GLM4V_MOE),
)
