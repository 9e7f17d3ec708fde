"""Models that read cameras, a command and the state of a robot, and move it."""

from __future__ import annotations

from benchmarks.zoo.row import Noise, Row, Values, images, text

ROWS: tuple[Row, ...] = (
    Row(
        "PI0ForConditionalGeneration",
        "vision-text",
        {
            **text(12, runs=((0, 8, 4),)),
            **images(2),
            "pixel_attention_mask": Values([[True, True]] * 2, "bool"),
            "state": Noise((2, 8)),
            "noise": Noise((2, 4, 8)),
            "timestep": Values([0.3, 0.7], "float32"),
        },
        {
            "chunk_size": 4,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "vlm_config": {"image_token_index": 4, "image_token_id": 4, "vision_config": {"vision_use_head": False}},
        },
        modalities={"state": "robot", "noise": "robot", "timestep": "control"},
        note="noise becomes the robot's moves",
    ),
)
