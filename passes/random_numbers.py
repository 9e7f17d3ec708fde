"""Random numbers that a loss, a model or its batches draw: seeded inside, and put back at the end."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def seeded(seed: int, module: nn.Module) -> Iterator[None]:
    """Seed torch, NumPy and Python inside, and put their generators back at the end.

    Args:
        seed: any integer that torch takes.
        module: the model that will run; of the CUDA generators those of its devices are seeded, and no other is touched.
    """
    devices = sorted({item.device for item in module.parameters() if item.device.type == "cuda"}, key=str)
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which seeds every device there is, also those that are not put back.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
