"""More models of audio and text: recognition in chunks, speakers, music from words."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.zoo.packed import placed_text
from benchmarks.zoo.row import Ids, Noise, PaddingMask, Raw, Row, Spec, Values, pair, text
from benchmarks.zoo.spoken import AUDIO, AUDIO_END, AUDIO_START, audio_run, frames_mask, spoken
from benchmarks.zoo.table import audio_towers, omni
from benchmarks.zoo.table.audio_text import MEL, MOSHI
from benchmarks.zoo.table.speech import BANDS, CONVOLUTIONS, DECODED, FAST, FRAMES, SPECIAL, SPEECH_T5, WAVE

CODEBOOKS = 2

DELAYED = Ids((2 * CODEBOOKS, 5), high=64)
"""Tokens of each codebook, one row per codebook and sample."""

MUSIC: dict[str, Any] = {
    "text_encoder": {"model_type": "t5", "d_kv": 8},
    "audio_encoder": {
        "model_type": "encodec",
        "num_filters": 4,
        "upsampling_ratios": [4, 2],
        "codebook_size": 64,
        "codebook_dim": 32,
        "num_lstm_layers": 1,
        "sampling_rate": 16000,
    },
    "decoder": {
        "model_type": "musicgen_decoder",
        "num_codebooks": CODEBOOKS,
        "vocab_size": 64,
        "audio_channels": 1,
        "pad_token_id": 60,
        "bos_token_id": 60,
    },
}
MELODY: dict[str, Any] = {
    **MUSIC,
    "num_chroma": 12,
    "chroma_length": 8,
    "decoder": {**MUSIC["decoder"], "model_type": "musicgen_melody_decoder"},
}
CODEC: dict[str, Any] = {**MOSHI["audio_encoder_config"], "num_quantizers": CODEBOOKS}
CSM: dict[str, Any] = {
    "num_codebooks": CODEBOOKS,
    "text_vocab_size": 99,
    "vocab_size": 67,
    "audio_token_id": AUDIO,
    "audio_eos_token_id": AUDIO_END,
    "codebook_pad_token_id": 65,
    "codebook_eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "codec_config": CODEC,
    "depth_decoder_config": {"num_codebooks": CODEBOOKS, "backbone_hidden_size": 32, "vocab_size": 67},
}
TOKENIZER: dict[str, Any] = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "hidden_size": 16}
VIBE: dict[str, Any] = {
    "audio_token_id": AUDIO,
    "audio_bos_token_id": AUDIO_START,
    "audio_eos_token_id": AUDIO_END,
    "pad_token_id": 0,
    "audio_config": TOKENIZER,
    "semantic_model_config": TOKENIZER,
    "diffusion_head_config": {"latent_size": 16, "frequency_embedding_size": 16},
}
VIBE_INPUTS: dict[str, Spec] = {
    **placed_text([[audio_run(8)], [audio_run(6)]]),
    "input_values": Noise((2, 1, 32)),
    "padding_mask": frames_mask(),
    "sample": Raw(False),
}
HEARD: dict[str, Any] = {"num_mel_bins": MEL, "num_key_value_heads": 4}
TRANSCRIBE: dict[str, Any] = {
    "audio_token_id": AUDIO,
    "audio_config": {
        "asr_config": HEARD,
        "diarization_config": {
            "audio_config": HEARD,
            "head_config": {"audio_hidden_size": 32, "num_speakers": 4},
            "streaming_config": {"num_speakers": 4},
        },
    },
    "word_timestamp_config": {"blank_token_id": 98, "num_key_value_heads": 4},
    "text_config": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    },
}
"""A decoder of Mamba, expert and attention blocks; an encoder of speech beside one of speakers."""


def _alike(rows: tuple[Row, ...], like: str, name: str) -> list[Row]:
    """A class that takes what another takes."""
    return [dataclasses.replace(row, name=name) for row in rows if row.name == like]


ROWS = (
    *pair("Canary", "audio-text", {**FRAMES, **DECODED}, {**SPECIAL, "encoder_config": FAST, "decoder_config": SPECIAL}),
    Row(
        "CsmForConditionalGeneration",
        "audio-text",
        {
            **placed_text([[audio_run(4)], [audio_run(4)]]),
            "input_values": Noise((2, 1, 64)),
            "input_values_cutoffs": Values([[64], [64]]),
        },
        CSM,
    ),
    *pair(
        "FunAsrNano",
        "audio-text",
        spoken((24, 18), 7 * MEL, frames=(24, 18), frames_last=False),
        {
            "audio_token_id": AUDIO,
            "audio_config": {"num_mel_bins": MEL, "num_stacked_frames": 7, "num_timestamp_prediction_layers": 1},
            "adaptor_config": {"projector_hidden_size": 40, "intermediate_size": 8},
        },
    ),
    *pair(
        "MossTranscribeDiarize",
        "audio-text",
        spoken((4, 3), MEL),
        {
            "audio_token_id": AUDIO,
            "audio_config": {"num_mel_bins": MEL, "max_source_positions": 16},
            "audio_chunk_size": 320,
        },
    ),
    Row(
        "MusicgenForConditionalGeneration",
        "audio-text",
        {**text(), "decoder_input_ids": DELAYED},
        MUSIC,
        modalities={"decoder_input_ids": "audio"},
        note="the audio is what it writes: words in, codes of audio in and out",
    ),
    Row(
        "MusicgenMelodyForConditionalGeneration",
        "audio-text",
        {**text(), "decoder_input_ids": DELAYED, "input_features": Noise((2, 8, 12))},
        MELODY,
        modalities={"decoder_input_ids": "audio"},
    ),
    Row(
        "Pop2PianoForConditionalGeneration",
        "audio-text",
        {"input_features": Noise((2, 7, 32)), "attention_mask": PaddingMask((2, 7)), "decoder_input_ids": Ids((2, 5))},
        {"d_kv": 8},
    ),
    Row(
        "SpeechEncoderDecoderModel",
        "audio-text",
        {**WAVE, **DECODED},
        {
            "encoder": {
                "model_type": "wav2vec2",
                **CONVOLUTIONS,
                "num_conv_pos_embeddings": 8,
                "num_conv_pos_embedding_groups": 2,
            },
            "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        },
    ),
    *pair("VibeVoice", "audio-text", VIBE_INPUTS, VIBE),
    *(
        Row(f"Nemotron3_5Transcribe{head}", "audio-text", spoken((4, 3), MEL, frames_last=False), TRANSCRIBE)
        for head in ("Model", "ForConditionalGeneration")
    ),
    Row(
        "SpeechT5ForTextToSpeech",
        "audio-text",
        {**text(), "decoder_input_values": Noise((2, 6, BANDS)), "speaker_embeddings": Noise((2, 8))},
        {**SPEECH_T5, "num_mel_bins": BANDS, "speaker_embedding_dim": 8, "speech_decoder_postnet_kernel": 3},
        modalities={"speaker_embeddings": "audio"},
        note="the audio is what it has spoken so far",
    ),
    *_alike(audio_towers.ROWS, "PeAudioModel", "PeAudioFrameLevelModel"),
    *_alike(omni.ROWS, "Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniThinkerModel"),
    *_alike(omni.ROWS, "Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerModel"),
    Row(
        "PeAudioVideoModel",
        "all",
        {
            **text(),
            "input_values": Noise((2, 1, 160)),
            "padding_mask": frames_mask((160, 120), "bool"),
            "pixel_values_videos": Noise((2, 2, 3, 16, 16)),
            "padding_mask_videos": PaddingMask((2, 2), 1, "bool"),
        },
        {
            "text_config": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
            "audio_video_config": {
                "config_class": "PeAudioVideoEncoderConfig",
                "audio_config": {
                    "dac_config": {
                        "encoder_hidden_size": 8,
                        "downsampling_ratios": [2, 4],
                        "hop_length": 8,
                        "codebook_dim": 16,
                        "n_codebooks": 2,
                    },
                },
                "video_config": {
                    "config_class": "PeVideoEncoderConfig",
                    "vision_config": {"config_class": "ViTConfig", "num_labels": 16},
                },
            },
        },
        note="a ViT stands in for timm's",
    ),
)
