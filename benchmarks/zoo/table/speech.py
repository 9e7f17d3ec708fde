"""Models that read speech and write text token by token: encoder-decoders and transducers."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.row import DROP, Ids, Noise, PaddingMask, Row, Spec
from benchmarks.zoo.spoken import frames_mask

BANDS = 16
"""Bands of a spectrogram."""

DECODED: dict[str, Spec] = {"decoder_input_ids": Ids((2, 5)), "decoder_attention_mask": PaddingMask((2, 5))}
WAVE: dict[str, Spec] = {"input_values": Noise((2, 2400)), "attention_mask": PaddingMask((2, 2400), 720)}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

WHISPER: dict[str, Any] = {
    **SPECIAL,
    "num_mel_bins": BANDS,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SPEECH2TEXT: dict[str, Any] = {
    **SPECIAL,
    "input_feat_per_channel": BANDS,
    "conv_channels": 16,
    "max_source_positions": 32,
    "max_target_positions": 16,
}
CONVOLUTIONS: dict[str, Any] = {
    "num_feat_extract_layers": DROP,
    "conv_dim": [16, 16, 16],
    "conv_stride": [8, 4, 2],
    "conv_kernel": [10, 3, 3],
}
SPEECH_T5: dict[str, Any] = {
    **SPECIAL,
    **CONVOLUTIONS,
    "vocab_size": 99,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "encoder_max_relative_position": 8,
    "speech_decoder_prenet_units": 16,
    "speech_decoder_postnet_units": 16,
}
MOONSHINE: dict[str, Any] = {
    **SPECIAL,
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 4),
}
"""The queries are viewed with the number of key heads, so both numbers must be the same."""

STREAMING: dict[str, Any] = {**SPECIAL, "num_key_value_heads": 4, "encoder_config": {"sliding_windows": [[4, 2], [4, 0]]}}
FAST: dict[str, Any] = {"num_mel_bins": BANDS, "subsampling_conv_channels": 8, "conv_kernel_size": 3}
"""An encoder of FastConformer blocks; frames become eight times fewer."""

COHERE: dict[str, Any] = {**SPECIAL, "encoder_config": FAST}
TRANSDUCER: dict[str, Any] = {"decoder_hidden_size": 32, "blank_token_id": 98, "pad_token_id": 0, "encoder_config": FAST}
NEMOTRON: dict[str, Any] = {
    **TRANSDUCER,
    "encoder_config": {**FAST, "sliding_window": 4, "default_num_lookahead_tokens": 1},
}
PROMPTED: dict[str, Any] = {**NEMOTRON, "num_prompts": 48, "prompt_intermediate_size": 40, "default_prompt_id": 1}
FRAMES: dict[str, Spec] = {"input_features": Noise((2, 64, BANDS)), "attention_mask": frames_mask((64, 48))}
TRANSDUCED = {**FRAMES, "decoder_input_ids": Ids((2, 1))}
SEAMLESS: dict[str, Any] = {
    **SPECIAL,
    "t2u_vocab_size": 99,
    "char_vocab_size": 99,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 40,
    "feature_projection_input_dim": BANDS,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "conv_depthwise_kernel_size": 3,
    "max_source_positions": 32,
    **dict.fromkeys(("t2u_encoder_layers", "t2u_decoder_layers"), 2),
    **dict.fromkeys(("t2u_encoder_attention_heads", "t2u_decoder_attention_heads"), 4),
    **dict.fromkeys(("t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim"), 40),
    "t2u_variance_predictor_embed_dim": 16,
    "t2u_variance_predictor_hidden_dim": 16,
    "upsample_initial_channel": 32,
    "unit_hifi_gan_vocab_size": 99,
    **dict.fromkeys(("unit_embed_dim", "lang_embed_dim", "spkr_embed_dim"), 8),
}
SEAMLESS_INPUTS = {
    "input_features": Noise((2, 24, BANDS)),
    "attention_mask": frames_mask((24, 16)),
    "decoder_input_ids": Ids((2, 5)),
}


def rows(names: tuple[str, ...], *inputs: Any, **more: Any) -> tuple[Row, ...]:
    """A row for each name, all alike."""
    return tuple(Row(name, "audio-text", *inputs, **more) for name in names)


ROWS = (
    *rows(
        ("WhisperModel", "WhisperForConditionalGeneration"),
        {"input_features": Noise((2, BANDS, 32)), **DECODED},
        WHISPER,
    ),
    *rows(
        ("Speech2TextModel", "Speech2TextForConditionalGeneration"),
        {"input_features": Noise((2, 16, BANDS)), "attention_mask": PaddingMask((2, 16), 4), **DECODED},
        SPEECH2TEXT,
    ),
    *rows(("SpeechT5ForSpeechToText",), {**WAVE, **DECODED}, SPEECH_T5),
    *rows(("MoonshineModel", "MoonshineForConditionalGeneration"), {**WAVE, **DECODED}, MOONSHINE),
    *rows(("MoonshineStreamingModel", "MoonshineStreamingForConditionalGeneration"), {**WAVE, **DECODED}, STREAMING),
    *rows(("CohereAsrModel", "CohereAsrForConditionalGeneration"), {**FRAMES, **DECODED}, COHERE),
    *rows(("ParakeetForTDT", "ParakeetForRNNT"), TRANSDUCED, TRANSDUCER),
    *rows(("NemotronAsrStreamingForRNNT",), TRANSDUCED, NEMOTRON),
    *rows(("Nemotron3_5AsrForRNNT",), {**TRANSDUCED, "prompt_ids": Ids((2,), high=41)}, PROMPTED),
    *rows(
        (
            "SeamlessM4TModel",
            "SeamlessM4TForSpeechToText",
            "SeamlessM4TForSpeechToSpeech",
            "SeamlessM4Tv2Model",
            "SeamlessM4Tv2ForSpeechToText",
            "SeamlessM4Tv2ForSpeechToSpeech",
        ),
        SEAMLESS_INPUTS,
        SEAMLESS,
    ),
)
