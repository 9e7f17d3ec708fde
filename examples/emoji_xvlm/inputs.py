"""What both example models read: scenes as tensors, example inputs, calibration batches, and weights from a file."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from emoji_xvlm.scenes import SceneBatch, calibration_batch
from emoji_xvlm.tokenizer import Tokenizer

CALIBRATION_BATCHES = 24
CALIBRATION_BATCH_SIZE = 32
EXAMPLE_SEED = 9_000_001


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


def example_batch() -> dict[str, Tensor]:
    """Four scenes that neither training nor calibration drew."""
    return tokenize(calibration_batch(0, 4, seed=EXAMPLE_SEED))


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model in place from a file that holds every parameter once, a tied one under its first name.

    Raises:
        ValueError: the file lacks a parameter, or holds one that the model has not.
    """
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        if stored != set(parameters):
            raise ValueError(f"{path.name} and the model differ in {', '.join(sorted(stored ^ set(parameters)))}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))
