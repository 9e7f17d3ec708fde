"""One stream: words and image patches (or regions) go through the same blocks."""

from __future__ import annotations

from benchmarks.zoo.row import Fill, Ids, Noise, PaddingMask, Row, Spec, Values, image, text

TYPED: dict[str, Spec] = {**text(), "token_type_ids": Fill((2, 7), 0)}
"""Words with their segment."""

VILT: dict[str, Spec] = {**TYPED, **image()}

LAYOUT: dict[str, Spec] = {
    **text(),
    "bbox": Values([[[10 * word, 5, 10 * word + 8, 15] for word in range(7)]] * 2),
    **image(),
}
"""Words with their places on a page, and the page."""

LAYOUT_SIZES = {
    "coordinate_size": 6,
    "shape_size": 4,
    "input_size": 16,
    "max_2d_position_embeddings": 128,
    "pad_token_id": 1,
}

BOXES: dict[str, Spec] = {
    **TYPED,
    "visual_embeds": Noise((2, 5, 20)),
    "visual_token_type_ids": Fill((2, 5), 1),
    "visual_attention_mask": PaddingMask((2, 5), 1),
}
"""Words, and features of five detected objects."""

CHOICES: dict[str, Spec] = {
    "input_ids": Ids((2, 3, 7)),
    "attention_mask": Fill((2, 3, 7)),
    "token_type_ids": Fill((2, 3, 7), 0),
    "visual_embeds": Noise((2, 3, 5, 20)),
    "visual_token_type_ids": Fill((2, 3, 5), 1),
    "visual_attention_mask": Fill((2, 3, 5)),
}
"""Three answers to choose from."""

PATCHES: dict[str, Spec] = {**text(9, runs=((0, 4, 4),)), "pixel_values": Noise((2, 4, 8 * 8 * 3))}
"""Patches cut beforehand, and places for them in the text."""

ROWS = (
    Row("FuyuModel", "vision-text", PATCHES, {"image_token_id": 4}),
    Row("FuyuForCausalLM", "vision-text", PATCHES, {"image_token_id": 4}),
    Row("LayoutLMv3Model", "vision-text", LAYOUT, LAYOUT_SIZES),
    Row("LayoutLMv3ForSequenceClassification", "vision-text", LAYOUT, LAYOUT_SIZES),
    Row("LayoutLMv3ForTokenClassification", "vision-text", LAYOUT, LAYOUT_SIZES),
    Row("LayoutLMv3ForQuestionAnswering", "vision-text", LAYOUT, LAYOUT_SIZES),
    Row("ViltModel", "vision-text", VILT),
    Row("ViltForQuestionAnswering", "vision-text", VILT),
    Row("ViltForImageAndTextRetrieval", "vision-text", VILT),
    Row("ViltForMaskedLM", "vision-text", VILT),
    Row("ViltForTokenClassification", "vision-text", VILT),
    Row(
        "ViltForImagesAndTextClassification",
        "vision-text",
        {**TYPED, "pixel_values": Noise((2, 2, 3, 16, 16))},
        {"num_images": 2, "modality_type_vocab_size": 3},
    ),
    Row("VisualBertModel", "vision-text", BOXES, {"visual_embedding_dim": 20}),
    Row("VisualBertForMultipleChoice", "vision-text", CHOICES, {"visual_embedding_dim": 20}),
    Row(
        "VisualBertForRegionToPhraseAlignment",
        "vision-text",
        {**BOXES, "region_to_phrase_position": Values([[0, 3, 1, -1]] * 2)},
        {"visual_embedding_dim": 20},
    ),
    Row("VisualBertForPreTraining", "vision-text", BOXES, {"visual_embedding_dim": 20}),
    Row("VisualBertForQuestionAnswering", "vision-text", BOXES, {"visual_embedding_dim": 20}),
    Row("VisualBertForVisualReasoning", "vision-text", BOXES, {"visual_embedding_dim": 20}),
)
