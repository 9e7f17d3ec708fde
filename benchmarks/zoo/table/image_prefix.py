"""Decoders and encoders of text in which a fixed number of places per image takes the image's features."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.row import Noise, Row, Values, image, text

IMAGE_TOKEN = 4

PROMPT = {**text(10, runs=((0, 4, IMAGE_TOKEN),)), **image()}
"""Four places for the four patches of an image."""

TYPES = {"token_type_ids": Values([[1] * 4 + [0] * 6] * 2)}
"""Which tokens stand for the image: those attend to one another both ways."""

ARIA: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "projector_patch_to_query_dict": {4: 4},
    "text_config": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
}

GEMMA3: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "boi_token_index": 5,
    "eoi_token_index": 6,
    "mm_tokens_per_image": 4,
    "text_config": {"query_pre_attn_scalar": 8, "sliding_window": 16},
}

PALIGEMMA: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "vision_config": {"projection_dim": 32},
    "text_config": {"num_key_value_heads": 1},
}

ONEVISION: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "video_token_index": 5,
    "image_grid_pinpoints": [[16, 16], [16, 32]],
    "vision_config": {"vision_use_head": False},
}

ANY_RESOLUTION = {
    # Per image: 2 x 2 patches of the whole, and 2 x 2 of its one tile with a line break after each row.
    **text(16, runs=((0, 10, IMAGE_TOKEN),)),
    "pixel_values": Noise((2, 2, 3, 16, 16)),
    "image_sizes": Values([[16, 16], [16, 16]]),
}

VBERT: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "pixel_shuffle_factor": 2, "text_config": {"pad_token_id": 0}}

OVIS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "visual_indicator_token_ids": [5, 6, 7, 8, 9],
    "vision_config": {"vocab_size": 40, "num_visual_indicator_tokens": 5},
}

ROWS = (
    Row("AriaForConditionalGeneration", "vision-text", PROMPT, ARIA),
    Row("AriaModel", "vision-text", PROMPT, ARIA),
    Row("ColPaliForRetrieval", "vision-text", PROMPT, {"vlm_config": PALIGEMMA, "embedding_dim": 16}),
    Row("Gemma3ForConditionalGeneration", "vision-text", {**PROMPT, **TYPES}, GEMMA3),
    Row("Gemma3ForSequenceClassification", "vision-text", {**PROMPT, **TYPES}, {**GEMMA3, "pad_token_id": 0}),
    Row("Gemma3Model", "vision-text", {**PROMPT, **TYPES}, GEMMA3),
    Row("LlavaOnevisionForConditionalGeneration", "vision-text", ANY_RESOLUTION, ONEVISION),
    Row("LlavaOnevisionModel", "vision-text", ANY_RESOLUTION, ONEVISION),
    Row(
        "ModernVBertForMaskedLM",
        "vision-text",
        {**text(runs=((0, 1, IMAGE_TOKEN),)), "pixel_values": Noise((2, 1, 3, 16, 16))},
        VBERT,
    ),
    Row(
        "ModernVBertForSequenceClassification",
        "vision-text",
        {**text(runs=((0, 1, IMAGE_TOKEN),)), "pixel_values": Noise((2, 1, 3, 16, 16))},
        VBERT,
    ),
    Row(
        "ModernVBertForTokenClassification",
        "vision-text",
        {**text(runs=((0, 1, IMAGE_TOKEN),)), "pixel_values": Noise((2, 1, 3, 16, 16))},
        VBERT,
    ),
    Row(
        "ModernVBertModel",
        "vision-text",
        {**text(runs=((0, 1, IMAGE_TOKEN),)), "pixel_values": Noise((2, 1, 3, 16, 16))},
        VBERT,
    ),
    Row("Ovis2ForConditionalGeneration", "vision-text", PROMPT, OVIS),
    Row("Ovis2Model", "vision-text", PROMPT, OVIS),
    Row("PaliGemmaForConditionalGeneration", "vision-text", {**PROMPT, **TYPES}, PALIGEMMA),
    Row(
        "PaliGemmaForConditionalGeneration",
        "vision-text",
        {**PROMPT, **TYPES},
        {**PALIGEMMA, "text_config": {"model_type": "gemma2", "num_key_value_heads": 1, "query_pre_attn_scalar": 8}},
        variant="gemma2",
    ),
    Row("PaliGemmaModel", "vision-text", {**PROMPT, **TYPES}, PALIGEMMA),
    Row(
        "ShieldGemma2ForImageClassification",
        "vision-text",
        {**PROMPT, **TYPES},
        {**GEMMA3, "yes_token_index": 10, "no_token_index": 11},
    ),
)
