"""Models that compare recordings with sentences: a tower for sound and one for text."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.row import Noise, Row, text
from benchmarks.zoo.spoken import frames_mask

CLVP_TOWER: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "eos_token_id": 98, "bos_token_id": 97}
"""Rotary embeddings have 32 dimensions at least, so a head has."""

ROWS = (
    Row(
        "ClapModel",
        "audio-text",
        {**text(), "input_features": Noise((2, 1, 32, 16))},
        {
            "audio_config": {
                "spec_size": 32,
                "num_mel_bins": 16,
                "window_size": 4,
                "patch_size": 2,
                "patch_stride": [2, 2],
                "patch_embeds_hidden_size": 16,
                "depths": [2, 2],
                "num_attention_heads": [2, 4],
            },
        },
    ),
    Row(
        "ClvpModelForConditionalGeneration",
        "audio-text",
        {**text(), "input_features": Noise((2, 20, 64))},
        {
            "speech_config": CLVP_TOWER,
            "text_config": CLVP_TOWER,
            "decoder_config": {
                "n_inner": 40,
                "feature_size": 20,
                "num_mel_attn_blocks": 2,
                "max_text_tokens": 32,
                "bos_token_id": 97,
                "eos_token_id": 98,
                "decoder_fixing_codes": [10, 11, 11, 12],
            },
        },
    ),
    Row(
        "PeAudioModel",
        "audio-text",
        {**text(), "input_values": Noise((2, 1, 160)), "padding_mask": frames_mask((160, 120))},
        {
            "text_config": {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 8},
            "audio_config": {
                "dac_config": {
                    "encoder_hidden_size": 8,
                    "downsampling_ratios": [2, 4],
                    "hop_length": 8,
                    "codebook_dim": 16,
                    "n_codebooks": 2,
                },
            },
        },
    ),
)
