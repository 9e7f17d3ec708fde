"""What a task brings to the benchmark: data, a loss, a test; and the recipe by which all models of a task are fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.tavlp.families.contract import Family, TaskModel


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned: AdamW (0.9, 0.98), linear warm-up over a tenth of the steps, linear decay to zero.

    Attributes:
        steps: optimizer steps.
        batch_size: images in a step.
        learning_rate: highest; new layers learn twice as fast.
        train_size: samples of the training set (images).
        test_size: samples of the test set.
        weight_decay: on matrices.
        clip: largest norm of the gradient.
        bf16: autocast in training and in tests; what is ranked is summed up in float32.
    """

    steps: int
    batch_size: int
    learning_rate: float
    train_size: int
    test_size: int
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = True


class Task(Protocol):
    """A downstream task. Objects of a module in this folder, listed in ``tasks.TASKS``.

    Attributes:
        name: as it is called in results.
        version: goes up when data, loss or test change, which makes all its results stale.
        metrics: metric -> heading, in the order of tables; all in per cent, higher is better.
        has_zero_shot: whether the model can be tested before it is fine-tuned; a new head could only guess.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def metrics(self) -> dict[str, str]: ...

    @property
    def has_zero_shot(self) -> bool: ...

    def model(self, family: Family) -> TaskModel:
        """The dense model of this task over a pretrained model; new parts are drawn from torch's generator."""

    def training_batches(self, family: Family, recipe: Recipe, seed: int) -> Iterator[Any]:
        """Batches without end; a seed decides their order."""

    def loss(self, model: Any, batch: Any, generator: torch.Generator) -> Tensor:
        """The loss of a batch that lies on the model's device; ``generator`` is on the CPU."""

    def evaluate(self, model: Any, family: Family, recipe: Recipe, device: torch.device) -> dict[str, float]:
        """Metrics on the test set; the model is in eval mode."""


def epochs(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Rows of batches without end: every epoch is a new permutation of ``count`` rows, whose rest is dropped.

    Raises:
        ValueError: a batch has more rows than there are.
    """
    if batch_size > count:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from {count} rows")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[start : start + batch_size] for start in range(0, count - batch_size + 1, batch_size))
