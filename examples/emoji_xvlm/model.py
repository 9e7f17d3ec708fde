"""The example that ``mfcompile`` loads: model, example inputs, calibration batches, a loss and a score.

mfcompile prune examples/emoji_xvlm/model.py --sparsity 0.63
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
# This file is loaded by its path, from any working directory; its siblings are found through the folder above.
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

from emoji_xvlm import evaluate as scoring  # noqa: E402 - needs the path above
from emoji_xvlm.modeling import EmojiXvlm, ModelConfig  # noqa: E402
from emoji_xvlm.objectives import calibration_loss  # noqa: E402
from emoji_xvlm.scenes import SceneBatch, calibration_batch  # noqa: E402
from emoji_xvlm.tokenizer import Tokenizer  # noqa: E402

WEIGHTS = HERE / "model.safetensors"
CALIBRATION_BATCHES = 24
CALIBRATION_BATCH_SIZE = 32
EXAMPLE_SEED = 9_000_001


def build_model(weights: Path = WEIGHTS) -> EmojiXvlm:
    """The trained model in float32 and eval mode."""
    model = EmojiXvlm(ModelConfig(vocab_size=len(Tokenizer.from_file())))
    with safe_open(weights, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    model.load_state_dict(state)
    return model.eval()


def tokenize(batch: SceneBatch) -> dict[str, Tensor]:
    """Model inputs of scenes: pixel_values (B, 3, 64, 64), input_ids (B, L) and attention_mask (B, L)."""
    input_ids, attention_mask = Tokenizer.from_file().encode_batch(batch.captions)
    return {
        "pixel_values": torch.from_numpy(batch.pixel_values),
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
    }


def calibration_batches() -> Iterator[dict[str, Tensor]]:
    """24 batches of 32 scenes with their sentences; L differs from batch to batch, padding from row to row."""
    for index in range(CALIBRATION_BATCHES):
        yield tokenize(calibration_batch(index, CALIBRATION_BATCH_SIZE))


def loss_fn(model: EmojiXvlm, batch: dict[str, Tensor]) -> Tensor:
    """The losses of pretraining on a calibration batch, for criteria that need gradients."""
    return calibration_loss(model, batch, Tokenizer.from_file().mask_id)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Held-out retrieval in per cent; ``r1`` is the headline."""
    return scoring.evaluate(model)


example_inputs: dict[str, Tensor] = tokenize(calibration_batch(0, 4, seed=EXAMPLE_SEED))
