"""Text (or fused) blocks that attend to the image, and Q-Formers."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.row import DROP, Fill, Ids, Noise, PaddingMask, Raw, Row, Spec, image, text

BLIP: dict[str, Any] = {
    "image_text_hidden_size": 16,
    "text_config": {"encoder_hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0},
}

ANSWER: dict[str, Spec] = {"decoder_input_ids": Ids((2, 5)), "decoder_attention_mask": PaddingMask((2, 5), 1)}

IMAGE_TOKEN = 4

QFORMER: dict[str, Any] = {
    "num_query_tokens": 4,
    "image_token_index": IMAGE_TOKEN,
    "image_text_hidden_size": 16,
    "qformer_config": {"encoder_hidden_size": 32},
}
"""The default cross-attention frequency of two: one block in two attends to the image."""

T5: dict[str, Any] = {"model_type": "t5", "d_kv": 8, "decoder_start_token_id": 0}

PROMPT: dict[str, Spec] = {**text(10, runs=((0, 4, IMAGE_TOKEN),)), **image()}
"""Text with places for the four queries' outputs."""

QUESTION: dict[str, Spec] = {"qformer_input_ids": Ids((2, 5)), "qformer_attention_mask": PaddingMask((2, 5), 1)}

FRAMES: dict[str, Spec] = {**text(14, runs=((0, 8, IMAGE_TOKEN),)), "pixel_values": Noise((2, 2, 3, 16, 16))}
"""Two frames: eight places."""

VIDEO_QFORMER = {**QFORMER, "video_token_index": IMAGE_TOKEN}

BRIDGE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "contrastive_hidden_size": 16,
    "logit_scale_init_value": 2.6592,
    "text_config": {"hidden_size": 64, "pad_token_id": 1},
    "vision_config": {"hidden_size": 64},
}
"""The vision tower has heads of 64."""

BRIDGED: dict[str, Spec] = {**text(), **image(), "pixel_mask": Fill((2, 16, 16))}

LXMERT_SIZES = {
    "num_object_labels": 11,
    "num_attr_labels": 7,
    "num_qa_labels": 5,
    "visual_feat_dim": 20,
    "l_layers": 2,
    "x_layers": 2,
    "r_layers": 2,
    "num_hidden_layers": DROP,
}

OBJECTS: dict[str, Spec] = {
    **text(),
    "token_type_ids": Fill((2, 7), 0),
    "visual_feats": Noise((2, 6, 20)),
    "visual_pos": Noise((2, 6, 4)),
}

MLLAMA: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "text_config": {
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {
        "attention_heads": 4,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
}

TILES: dict[str, Spec] = {
    **text(place={0: IMAGE_TOKEN}),
    "pixel_values": Noise((2, 1, 2, 3, 16, 16)),
    "aspect_ratio_ids": Fill((2, 1)),
    "aspect_ratio_mask": Fill((2, 1, 2)),
    "cross_attention_mask": Fill((2, 7, 1, 2)),
}

FLAVA: dict[str, Any] = {
    "image_config": {"vocab_size": 99},
    "image_codebook_config": {"hidden_size": 16, "vocab_size": 99},
}

MASKED_PATCHES: dict[str, Spec] = {
    **text(),
    "token_type_ids": Fill((2, 7), 0),
    **image(),
    "bool_masked_pos": Fill((2, 2, 2), 0),
}

IDEFICS: dict[str, Any] = {
    "additional_vocab_size": 0,
    "cross_layer_interval": 1,
    "alpha_initializer": "ones",
    "perceiver_config": {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8},
}

INTERLEAVED: dict[str, Spec] = {**text(), "pixel_values": Noise((2, 1, 3, 16, 16)), "image_attention_mask": Fill((2, 7, 1))}

ROWS = (
    Row("BlipForConditionalGeneration", "vision-text", {**text(), **image()}, BLIP),
    Row("BlipForImageTextRetrieval", "vision-text", {**text(), **image()}, BLIP),
    Row("BlipForQuestionAnswering", "vision-text", {**text(), **image(), **ANSWER}, BLIP),
    Row("Blip2ForConditionalGeneration", "vision-text", {**PROMPT, **ANSWER}, {**QFORMER, "text_config": T5}, variant="t5"),
    Row(
        "Blip2ForImageTextRetrieval",
        "vision-text",
        {**text(), **image()},
        {**QFORMER, "qformer_config": {"encoder_hidden_size": 32, "use_qformer_text_input": True}},
    ),
    Row("Blip2Model", "vision-text", {**PROMPT, **ANSWER}, {**QFORMER, "text_config": T5}),
    Row("BridgeTowerForContrastiveLearning", "vision-text", BRIDGED, BRIDGE),
    Row("BridgeTowerForImageAndTextRetrieval", "vision-text", BRIDGED, BRIDGE),
    Row("BridgeTowerForMaskedLM", "vision-text", BRIDGED, BRIDGE),
    Row("BridgeTowerModel", "vision-text", BRIDGED, BRIDGE),
    Row(
        "FlavaForPreTraining",
        "vision-text",
        {**MASKED_PATCHES, "input_ids_masked": Ids((2, 7)), "return_loss": Raw(False)},
        FLAVA,
        note="without losses: their targets come from a codebook of convolutions that prunes nothing",
    ),
    Row("FlavaModel", "vision-text", MASKED_PATCHES, FLAVA),
    Row("IdeficsForVisionText2Text", "vision-text", INTERLEAVED, IDEFICS),
    Row("IdeficsForVisionText2Text", "vision-text", INTERLEAVED, {**IDEFICS, "use_resampler": True}, variant="resampler"),
    Row("IdeficsModel", "vision-text", INTERLEAVED, IDEFICS),
    Row("InstructBlipForConditionalGeneration", "vision-text", {**PROMPT, **QUESTION}, QFORMER),
    Row("InstructBlipModel", "vision-text", {**PROMPT, **QUESTION}, QFORMER),
    Row("InstructBlipVideoForConditionalGeneration", "video-text", {**FRAMES, **QUESTION}, VIDEO_QFORMER),
    Row("InstructBlipVideoModel", "video-text", {**FRAMES, **QUESTION}, VIDEO_QFORMER),
    Row("LxmertForPreTraining", "vision-text", OBJECTS, LXMERT_SIZES),
    Row("LxmertForQuestionAnswering", "vision-text", OBJECTS, LXMERT_SIZES),
    Row("LxmertModel", "vision-text", OBJECTS, LXMERT_SIZES),
    Row("MllamaForConditionalGeneration", "vision-text", TILES, MLLAMA),
    Row("MllamaModel", "vision-text", TILES, MLLAMA),
)
