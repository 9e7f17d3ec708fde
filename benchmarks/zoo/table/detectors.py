"""Detection and segmentation of what a text names."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.row import Fill, Ids, Row, Values, image, text

LAST_WORD = 98

END = {"text_config": {"eos_token_id": LAST_WORD}}

SWIN: dict[str, Any] = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 2],
    "window_size": 2,
    "hidden_size": 64,
    "num_layers": 4,
}

GROUNDING: dict[str, Any] = {
    "num_queries": 4,
    "num_feature_levels": 3,
    "max_text_len": 7,
    "backbone_config": {**SWIN, "out_features": ["stage2", "stage3", "stage4"], "out_indices": [2, 3, 4]},
}

TURBO: dict[str, Any] = {
    "num_queries": 4,
    "class_embed_dim": 32,
    "text_projection_in_dim": 32,
    "text_projection_out_dim": 32,
    "task_encoder_hidden_dim": 40,
    "vision_features_channels": [16, 16, 16],
    "encoder_in_channels": [16, 32, 64],
    "encoder_hidden_dim": 16,
    "decoder_hidden_dim": 16,
    "decoder_num_heads": 2,
    "d_model": 16,
    "encoder_dim_feedforward": 40,
    "decoder_dim_feedforward": 40,
    "decoder_num_points": 2,
    "use_timm_backbone": False,
    "apply_layernorm_after_vision_backbone": False,
    "text_config": {"eos_token_id": LAST_WORD},
    "backbone_config": {**SWIN, "out_features": ["stage2", "stage3", "stage4"], "out_indices": [2, 3, 4]},
}

ONE_FORMER: dict[str, Any] = {
    "num_queries": 4,
    "task_seq_len": 7,
    "conv_dim": 32,
    "mask_dim": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 40,
    "dim_feedforward": 40,
    "strides": [2, 4, 8, 16],
    "common_stride": 2,
    "backbone_config": {**SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"], "out_indices": [1, 2, 3, 4]},
}

TASK = {**image(32), "task_inputs": Ids((2, 7))}

SAM3: dict[str, Any] = {
    "vision_config": {
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "backbone_config": {"image_size": 32, "pretrain_image_size": 16, "window_size": 2, "global_attn_indexes": [1]},
    },
    "geometry_encoder_config": {"roi_size": 3},
    "detr_decoder_config": {"num_queries": 4},
}

PHRASES = {**text(), **image(32), "pixel_mask": Fill((2, 32, 32))}

ROWS = (
    Row(
        "CLIPSegForImageSegmentation",
        "vision-text",
        {**text(place={-3: LAST_WORD}), **image()},
        {**END, "extract_layers": [0, 1], "reduce_dim": 16, "decoder_intermediate_size": 24},
    ),
    Row("GroundingDinoModel", "vision-text", PHRASES, GROUNDING),
    Row("GroundingDinoForObjectDetection", "vision-text", PHRASES, GROUNDING),
    Row("MMGroundingDinoModel", "vision-text", PHRASES, GROUNDING),
    Row("MMGroundingDinoForObjectDetection", "vision-text", PHRASES, GROUNDING),
    Row(
        "OmDetTurboForObjectDetection",
        "vision-text",
        {
            **image(32),
            "classes_input_ids": Ids((4, 5)),
            "classes_attention_mask": Fill((4, 5)),
            "tasks_input_ids": Ids((2, 7)),
            "tasks_attention_mask": Fill((2, 7)),
            "classes_structure": Values([2, 2]),
        },
        TURBO,
        note="two classes per image; transformers' own Swin, for timm needs torchvision",
    ),
    Row("OneFormerModel", "vision-text", TASK, ONE_FORMER, modalities={"task_inputs": "text"}),
    Row(
        "OneFormerForUniversalSegmentation",
        "vision-text",
        TASK,
        ONE_FORMER,
        modalities={"task_inputs": "text"},
        note="its loss needs scipy, even where none is asked for",
    ),
    Row("Owlv2ForObjectDetection", "vision-text", {**text(batch=4), **image()}, note="two queries per image"),
    Row("OwlViTForObjectDetection", "vision-text", {**text(batch=4), **image()}, note="two queries per image"),
    Row("Sam3Model", "vision-text", {**text(place={-3: LAST_WORD}), **image(32)}, {**SAM3, **END}),
    Row("Sam3LiteTextModel", "vision-text", {**text(place={-3: LAST_WORD}), **image(32)}, SAM3),
)
