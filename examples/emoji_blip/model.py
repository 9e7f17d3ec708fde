"""The example that ``mfcompile`` loads: model, example inputs, calibration batches, a loss and a score.

mfcompile prune examples/emoji_blip/model.py --sparsity 0.63
"""

import sys
from pathlib import Path

from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
# This file is loaded by its path, from any working directory; the packages it needs lie in the folder above.
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

from emoji_xvlm.inputs import calibration_batches, example_batch, load_weights  # noqa: E402 - needs the path above
from emoji_xvlm.tokenizer import Tokenizer  # noqa: E402

from emoji_blip import evaluate as scoring  # noqa: E402
from emoji_blip.modeling import EmojiBlip, ModelConfig  # noqa: E402
from emoji_blip.objectives import calibration_loss  # noqa: E402

__all__ = ["build_model", "calibration_batches", "evaluate", "example_inputs", "loss_fn"]

WEIGHTS = HERE / "model.safetensors"


def build_model(weights: Path = WEIGHTS) -> EmojiBlip:
    """The trained model in float32 and eval mode."""
    model = EmojiBlip(ModelConfig(vocab_size=len(Tokenizer.from_file())))
    load_weights(model, weights)
    return model.eval()


def loss_fn(model: EmojiBlip, batch: dict[str, Tensor]) -> Tensor:
    """The losses of pretraining on a calibration batch, for criteria that need gradients."""
    return calibration_loss(model, batch)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Held-out retrieval and next words in per cent; ``r1`` is the headline."""
    return scoring.evaluate(model)


example_inputs: dict[str, Tensor] = example_batch()
