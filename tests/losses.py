"""Losses of small models, and their gradients by torch.autograd alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Batch, vlm_batch

BATCHES = [vlm_batch((6, 3, 5), seed=seed) for seed in range(3)]


def chosen(module: nn.Module) -> list[str]:
    """Weights inside the repeated blocks."""
    return [name for name, item in module.named_parameters() if item.ndim == 2 and name.split(".")[0] in SPANS]


SPANS = ("vision", "text", "fusion")


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    outputs = module(**batch)
    loss: Tensor = outputs["fused"].pow(2).mean() + outputs["match"].sum()
    return loss


def by_autograd(module: nn.Module, batches: Sequence[Any], fqns: list[str], loss: Any = loss_of) -> dict[str, Tensor]:
    """Sum over batches of torch.autograd.grad, divided by their number."""
    weights = [module.get_parameter(fqn) for fqn in fqns]
    total = [torch.zeros_like(item) for item in weights]
    for batch in batches:
        found = torch.autograd.grad(loss(module, batch), weights, allow_unused=True)
        total = [one if two is None else one + two for one, two in zip(total, found, strict=True)]
    return {fqn: item / len(batches) for fqn, item in zip(fqns, total, strict=True)}


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


class Pair(nn.Module):
    """Two linear layers in a row."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Linear(5, 5, bias=False, dtype=dtype)
            self.second = nn.Linear(5, 5, bias=False, dtype=dtype)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(states)))
        return result


def square(module: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = module(batch).pow(2).sum()
    return result


def pair_batches(count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 5, generator=generator).to(dtype) for _ in range(count)]


PAIR = ["first.weight", "second.weight"]
