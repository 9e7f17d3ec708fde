"""An image (and a prompt) is read by an encoder, a decoder of text attends to it."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.row import Ids, Joined, Noise, PaddingMask, Row, Spec, Values, image, pair, text

IMAGE_TOKEN = 4

ANSWER: dict[str, Spec] = {"decoder_input_ids": Ids((2, 5)), "decoder_attention_mask": PaddingMask((2, 5), 1)}

FLORENCE: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "vision_config": {
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "depths": [1, 1],
        "window_size": 2,
        "projection_dim": 32,
    },
}

ENCODED: dict[str, Spec] = {**text(11, runs=((0, 5, IMAGE_TOKEN),)), **image(), **ANSWER}

T5_GEMMA: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "encoder": {
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": 5,
        "eoi_token_index": 6,
        "mm_tokens_per_image": 4,
        "text_config": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    },
    "decoder": {"query_pre_attn_scalar": 8, "sliding_window": 16},
}

FORMULA: dict[str, Any] = {
    "vision_config": {
        "image_size": 64,
        "output_channels": 16,
        "global_attn_indexes": [1],
        "window_size": 2,
        "mlp_dim": 40,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 24,
        "post_conv_out_channels": 32,
        "decoder_hidden_size": 32,
    }
}

PROMPT: dict[str, Spec] = {**text(10, runs=((0, 4, IMAGE_TOKEN),)), **image(), **ANSWER}

ROWS = (
    Row("Florence2ForConditionalGeneration", "vision-text", ENCODED, FLORENCE),
    Row("Florence2Model", "vision-text", ENCODED, FLORENCE),
    Row(
        "Pix2StructForConditionalGeneration",
        "vision-text",
        {
            "flattened_patches": Joined(
                (Values([[[row, column] for row in range(2) for column in range(3)]] * 2, "float32"), Noise((2, 6, 12)))
            ),
            "attention_mask": PaddingMask((2, 6), 1),
            **ANSWER,
        },
        {
            "text_config": {"d_kv": 8},
            "vision_config": {"patch_embed_hidden_size": 12, "d_kv": 8, "seq_len": 16},
        },
    ),
    *pair("PPFormulaNet", "vision-text", {**image(64), "decoder_input_ids": Ids((2, 5))}, FORMULA),
    Row("T5Gemma2ForConditionalGeneration", "vision-text", PROMPT, T5_GEMMA),
    Row("T5Gemma2ForSequenceClassification", "vision-text", PROMPT, T5_GEMMA),
    Row("T5Gemma2ForTokenClassification", "vision-text", PROMPT, T5_GEMMA),
    Row("T5Gemma2Model", "vision-text", PROMPT, T5_GEMMA),
)
