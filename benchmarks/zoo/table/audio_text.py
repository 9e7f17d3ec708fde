"""Decoders whose text holds places for the features of recordings."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.packed import placed_text, token_types
from benchmarks.zoo.row import Fill, Ids, Noise, PaddingMask, Raw, Row, Spec, Values
from benchmarks.zoo.spoken import AUDIO, AUDIO_END, AUDIO_START, audio_run, frames_mask, spoken
from benchmarks.zoo.table.padded_patches import GEMMA, GEMMA_TEXT, UNIFIED

MEL = 20
"""Bands of a spectrogram."""

TOWER: dict[str, Any] = {"num_mel_bins": MEL, "max_source_positions": 16}
"""As many positions as half the frames."""

FLAMINGO: dict[str, Any] = {"audio_token_id": AUDIO, "audio_config": TOWER}
MUSIC: dict[str, Any] = {**FLAMINGO, "audio_bos_token_id": AUDIO_START, "audio_eos_token_id": AUDIO_END}
GLM_ASR: dict[str, Any] = {"audio_token_id": AUDIO, "audio_config": {"num_mel_bins": MEL, "intermediate_size": 128}}
QWEN2_AUDIO: dict[str, Any] = {"audio_token_index": AUDIO, "audio_config": TOWER}
QWEN3_ASR: dict[str, Any] = {
    "audio_token_id": AUDIO,
    "timestamp_token_id": 11,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "audio_config": {"num_mel_bins": MEL, "downsample_hidden_size": 16, "output_dim": 32, "n_window_infer": 100},
}
VOXTRAL: dict[str, Any] = {"audio_token_id": AUDIO, "audio_config": {**TOWER, "intermediate_size": 128}}
REALTIME: dict[str, Any] = {
    "audio_config": {"num_mel_bins": MEL, "sliding_window": 16},
    "text_config": {"sliding_window": 16},
}
GRANITE: dict[str, Any] = {
    "audio_token_index": AUDIO,
    "downsample_rate": 2,
    "window_size": 4,
    "has_lora_adapter": False,
    "encoder_config": {
        "input_dim": MEL,
        "hidden_dim": 32,
        "dim_head": 8,
        "context_size": 6,
        "max_pos_emb": 16,
        "output_dim": 12,
        "conv_kernel_size": 3,
    },
    "projector_config": {"encoder_hidden_size": 32},
}
GRANITE_PLUS: dict[str, Any] = {
    **GRANITE,
    "encoder_config": {**GRANITE["encoder_config"], "cat_hidden_layers": [1]},
    "projector_config": {"encoder_hidden_size": 64},
}
GRANITE_INPUTS: dict[str, Spec] = {
    **spoken((6, 4), MEL, frames=(12, 8), mask=None, frames_last=False),
    "input_features_mask": Values([[1] * 6, [1] * 4 + [0] * 2], "bool"),
}
GEMMA_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "subsampling_conv_channels": [16, 8],
    "conv_kernel_size": 3,
    "attention_chunk_size": 4,
    "attention_context_left": 5,
    "output_proj_dims": 32,
    "use_clipped_linears": False,
}
GEMMA4: dict[str, Any] = {**GEMMA, "text_config": GEMMA_TEXT, "vision_config": None, "audio_config": GEMMA_AUDIO}
GEMMA4_INPUTS: dict[str, Spec] = {
    **spoken((8, 6), 16, mask=None, frames_last=False),
    "input_features_mask": frames_mask(dtype="bool"),
}
_UNIFIED_TEXT = placed_text([[audio_run(6)], [audio_run(4)]])
UNIFIED_INPUTS: dict[str, Spec] = {
    **_UNIFIED_TEXT,
    "input_features": Noise((2, 6, 32)),
    "input_features_mask": frames_mask((6, 4), "bool"),
    **token_types(_UNIFIED_TEXT, {AUDIO: 3}),
}
TOKENIZER: dict[str, Any] = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "hidden_size": 16}
VIBE_VOICE: dict[str, Any] = {
    "audio_token_id": AUDIO,
    "audio_bos_token_id": AUDIO_START,
    "audio_eos_token_id": AUDIO_END,
    "acoustic_tokenizer_encoder_config": TOKENIZER,
    "semantic_tokenizer_encoder_config": TOKENIZER,
}
VIBE_VOICE_INPUTS: dict[str, Spec] = {
    **placed_text([[audio_run(8)], [audio_run(6)]]),
    "input_values": Noise((2, 1, 32)),
    "padding_mask": frames_mask(),
    "sample": Raw(False),
}
CODEBOOKS = 4
MOSHI: dict[str, Any] = {
    "num_codebooks": CODEBOOKS,
    "audio_vocab_size": 64,
    "ffn_dim": 40,
    "sliding_window": 16,
    "depth_decoder_config": {"input_size": 32, "num_codebooks": CODEBOOKS, "audio_vocab_size": 64, "ffn_dim": 40},
    "audio_encoder_config": {
        "num_filters": 4,
        "num_quantizers": CODEBOOKS,
        "codebook_size": 64,
        "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16,
        "upsampling_ratios": [4, 2],
        "upsample_groups": 32,
    },
}
MOSHI_INPUTS: dict[str, Spec] = {
    "input_ids": Ids((2, 7)),
    "attention_mask": PaddingMask((2, 7)),
    "moshi_audio_codes": Ids((2, CODEBOOKS, 7), high=64),
    "user_audio_codes": Ids((2, CODEBOOKS, 7), high=64),
}


def both(name: str, *inputs: Any, **more: Any) -> tuple[Row, Row]:
    """Rows of a base model and of the same with a language head."""
    return (
        Row(f"{name}Model", "audio-text", *inputs, **more),
        Row(f"{name}ForConditionalGeneration", "audio-text", *inputs, **more),
    )


ROWS = (
    *both("AudioFlamingo3", spoken((8, 6), MEL), FLAMINGO),
    *both("MusicFlamingo", spoken((8, 6), MEL), MUSIC),
    *both("GlmAsr", spoken((4, 3), MEL), GLM_ASR),
    *both("Qwen2Audio", spoken((8, 6), MEL, mask="feature_attention_mask"), QWEN2_AUDIO),
    *both("Qwen3ASR", spoken((13, 8), MEL, frames=(100, 60)), QWEN3_ASR),
    Row("Qwen3ASRForTokenClassification", "audio-text", spoken((13, 8), MEL, frames=(100, 60)), {**QWEN3_ASR, "num_labels": 5}),
    *both("Voxtral", spoken((4, 4), MEL, frames=(32, 32), mask=None), VOXTRAL),
    *both(
        "VoxtralRealtime",
        {"input_ids": Ids((2, 8)), "attention_mask": Fill((2, 8)), "input_features": Noise((2, MEL, 64))},
        REALTIME,
    ),
    *both("GraniteSpeech", GRANITE_INPUTS, GRANITE),
    *both("GraniteSpeechPlus", GRANITE_INPUTS, GRANITE_PLUS),
    *both("VibeVoiceAsr", VIBE_VOICE_INPUTS, VIBE_VOICE, note="without the noise on latents, with which no two runs agree"),
    *both("Gemma4", GEMMA4_INPUTS, GEMMA4, variant="audio"),
    *both("Gemma4Unified", UNIFIED_INPUTS, UNIFIED, variant="audio"),
    Row("MoshiForConditionalGeneration", "audio-text", MOSHI_INPUTS, MOSHI),
)
