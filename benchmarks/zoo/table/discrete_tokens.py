"""Decoders that read an image as words of a codebook."""

from __future__ import annotations

from benchmarks.zoo.row import Row, Values, image, pair, text

CODES = 12
"""Rows of a codebook; code i is the word FIRST_CODE + i."""

FIRST_CODE = 6

ROWS: tuple[Row, ...] = (
    *pair(
        "Chameleon",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image(8)},
        {
            "vocabulary_map": {
                "<image>": 4,
                **{
                    f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z": FIRST_CODE + code
                    for code in range(CODES)
                },
            },
            "vq_config": {
                "num_embeddings": CODES,
                "latent_channels": 32,
                "resolution": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
            },
        },
    ),
    *pair(
        "Emu3",
        "vision-text",
        {**text(12, runs=((0, 6, 4),)), **image(8), "image_sizes": Values([[8, 8]] * 2)},
        {
            "vocabulary_map": {
                "<image>": 4,
                "<|extra_200|>": 5,
                **{f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(CODES)},
            },
            "vq_config": {
                "codebook_size": CODES,
                "temporal_downsample_factor": 1,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [2],
            },
            "text_config": {"pad_token_id": 0},
        },
    ),
    *pair(
        "Janus",
        "vision-text",
        {**text(10, runs=((0, 4, 4),)), **image()},
        {
            "image_token_id": 4,
            "vision_config": {"num_image_tokens": 4},
            "vq_config": {
                "num_embeddings": CODES,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 2,
                "image_token_embed_dim": 32,
            },
        },
        note="reads images through a vision tower; the codebook only serves to draw, which a forward pass does not",
    ),
)
