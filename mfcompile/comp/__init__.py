"""Joint pruning of tokens and structural units (CoMP, CVPR 2026): in one shot, and inside fine-tuning."""
