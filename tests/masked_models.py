"""A small model with masks that were drawn, for tests of what becomes of masks: linear, convolution, norm, tied weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfcompile.masks import MaskSet, PackedMask
from mfcompile.passes.masking import mask_module

NAMES = ("conv.weight", "up.weight", "down.weight", "first.weight")


class Small(nn.Module):
    """An image of (3, 4, 4) numbers to 5 classes; ``first`` and ``second`` share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.BatchNorm1d(32)
        self.up = nn.Linear(32, 16)
        self.down = nn.Linear(16, 6, bias=False)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 5)

    def forward(self, image: Tensor) -> Tensor:
        states = self.norm(self.conv(image).flatten(1))
        states = self.down(F.gelu(self.up(states)))
        result: Tensor = self.head(self.second(torch.tanh(self.first(states))))
        return result


def small(seed: int = 0) -> Small:
    """A model in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Small()


def small_masks(seed: int = 0, sparsity: float = 0.63) -> MaskSet:
    """Masks drawn at random; every weight keeps and loses some places."""
    generator = torch.Generator().manual_seed(seed)
    model = small()
    packed = {}
    for name in NAMES:
        mask = torch.rand(model.get_parameter(name).shape, generator=generator) >= sparsity
        mask.view(-1)[:2] = torch.tensor([True, False])
        packed[name] = PackedMask.pack(mask)
    return MaskSet(packed, dict.fromkeys(NAMES, "vision"), fingerprint="of the dense one", sparsity=sparsity)


def masked(seed: int = 0) -> nn.Module:
    """``small`` with its masks in force, over weights of its own dense model."""
    return mask_module(small(seed), small_masks())


def batch(seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor]:
    """Images (size, 3, 4, 4) and classes (size,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 4, 4, generator=generator), torch.randint(5, (size,), generator=generator)


def loss_of(model: Any, seed: int = 0) -> Any:
    """Any, since torch types no ``backward``."""
    images, classes = batch(seed)
    return F.cross_entropy(model(images).float(), classes)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def effective(model: nn.Module, name: str) -> Tensor:
    """What a layer multiplies by, found by attribute, not by any function that is tested."""
    path, _, leaf = name.rpartition(".")
    weight = getattr(model.get_submodule(path), leaf)
    assert isinstance(weight, Tensor)
    return weight.detach()


def assert_pruned(model: nn.Module, masks: MaskSet | None = None) -> None:
    """Every pruned place of every masked weight is +0.0, and no kept place is zero."""
    for name, mask in (masks or small_masks()).items():
        weight = effective(model, name)
        assert not weight[~mask].any(), name
        assert not torch.signbit(weight[~mask]).any(), name
        assert weight[mask].all(), name


def zeroed(model: nn.Module, masks: MaskSet) -> nn.Module:
    """The plain oracle: zeros written into a deep copy."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            plain.get_parameter(name)[~mask] = 0.0
    return plain
