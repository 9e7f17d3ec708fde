"""Decoders that read images and sound together, with text around both."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.packed import GRIDS, IMAGE, STARTS, VIDEO, Grid, image_run, packed, placed_text
from benchmarks.zoo.row import DROP, Noise, Row, Spec, Values
from benchmarks.zoo.spoken import AUDIO, AUDIO_END, AUDIO_START, FRAMES, audio_run, frames_mask
from benchmarks.zoo.table.packed_images import MROPE, PATCH, QWEN2_5, QWEN3, QWEN3_MOE

SOUND: dict[str, Any] = {
    "d_model": 32,
    "encoder_ffn_dim": 40,
    "num_mel_bins": 20,
    "output_dim": 32,
    "max_source_positions": 64,
    "n_window": 8,
    "n_window_infer": 32,
    "downsample_hidden_size": 16,
}
TOKENS: dict[str, Any] = {**STARTS, "audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END, "user_token_id": 11}


def _inputs(audio_places: tuple[int, int]) -> dict[str, Spec]:
    """Two samples, each with a recording and then its images."""
    merged = [[image_run(frames * high * wide // 4) for frames, high, wide in images] for images in GRIDS]
    tokens = placed_text([[audio_run(count), *runs] for count, runs in zip(audio_places, merged, strict=True)])
    return {
        **packed(PATCH, types=False),
        **tokens,
        "input_features": Noise((2, 20, FRAMES[0])),
        "feature_attention_mask": frames_mask(),
    }


def _phi_grid(grid: Grid) -> int:
    """Places of an image of crops of 2x2 compressed patches: rows end in a separator; then one, then the whole image."""
    _, high, wide = grid
    return 2 * high * (2 * wide + 1) + 1 + 2 * 3


PHI4: dict[str, Any] = {
    "pad_token_id": 0,
    "vision_config": {"image_token_id": IMAGE, "crop_size": 16, "patch_size": 4},
    "audio_config": {
        "audio_token_id": AUDIO,
        "num_blocks": 2,
        "depthwise_separable_out_channel": 32,
        "ext_pw_out_channel": 32,
        "nemo_conv_channels": 16,
        "input_size": 20,
        "nemo_final_size": DROP,
    },
}
PHI4_INPUTS: dict[str, Spec] = {
    **placed_text([[[IMAGE] * _phi_grid((1, 1, 2)), [AUDIO] * 4], [[IMAGE] * _phi_grid((1, 1, 1)), [AUDIO] * 3]]),
    "image_pixel_values": Noise((2, 3, 3, 16, 16)),
    "image_attention_mask": Values([[[[1] * 4] * 4] * 3, [[[1] * 4] * 4] * 3], "float32"),
    "image_sizes": Values([[16, 32], [16, 16]]),
    "audio_input_features": Noise((2, 32, 20)),
    "audio_embed_sizes": Values([4, 3]),
}

ROWS = (
    Row(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "all",
        _inputs((8, 6)),
        {
            **TOKENS,
            "audio_token_index": AUDIO,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "text_config": MROPE,
            "vision_config": QWEN2_5["vision_config"],
            "audio_config": SOUND,
        },
    ),
    Row(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "all",
        _inputs((4, 3)),
        {
            **TOKENS,
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "text_config": {**QWEN3_MOE["text_config"], "num_experts": 4},
            "vision_config": QWEN3["vision_config"],
            "audio_config": {**SOUND, "n_window": 50, "n_window_infer": 100},
        },
    ),
    Row("Phi4MultimodalModel", "all", PHI4_INPUTS, PHI4),
    Row("Phi4MultimodalForCausalLM", "all", PHI4_INPUTS, PHI4),
)
