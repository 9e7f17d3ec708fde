"""Redraw the region maps of docs/images: the trained example, and a 34 B model of 60 layers that is never loaded.

python docs/draw_images.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from mfcompile.cli import main

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"

LARGE = """
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

text = dict(model_type="llama", hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
            num_key_value_heads=8, vocab_size=64000)
vision = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
              num_attention_heads=16, image_size=28, patch_size=14, projection_dim=768)
config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=4, vision_feature_layer=-2,
                     vision_feature_select_strategy="default")
with torch.device("meta"):  # nothing is allocated: regions need no values
    model = LlavaForConditionalGeneration(config).eval()
example_inputs = {
    "pixel_values": torch.rand(2, 3, 28, 28),
    "input_ids": torch.tensor([[4, 4, 4, 4, 7, 8, 9], [4, 4, 4, 4, 9, 8, 7]]),
    "attention_mask": torch.ones(2, 7, dtype=torch.long),
}
"""


def draw() -> int:
    """Draw both pictures with the command that users have."""
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.py"
        large.write_text(LARGE)
        small = ROOT / "examples" / "emoji_xvlm" / "model.py"
        for source, name in ((small, "emoji_xvlm_regions.png"), (large, "llava_34b_regions.png")):
            status = main(["inspect", str(source), "--picture", str(IMAGES / name)])
            if status:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(draw())
