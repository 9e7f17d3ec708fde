"""The task-agnostic benchmark (TA-VLP) of MULTIFLOW (CVPR 2024) at small scale: prune once, fine-tune on unknown tasks.

    python -m benchmarks.tavlp run [--family xvlm] [--task retrieval] [--pruner multiflow] [--sparsity 0.63] [--seed 0]
    python -m benchmarks.tavlp tables

A pretrained model is pruned with generic image-text pairs; the pruned model is then fine-tuned on every task with its masks
kept, and tested. Results are files of one cell each, so that a run continues where it stopped.
"""

import sys
from pathlib import Path

# The examples are no part of the package: their models and scenes are found through their folder.
_EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.insert(0, _EXAMPLES)
