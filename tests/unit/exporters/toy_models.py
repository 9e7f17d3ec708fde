"""Tiny models, and CapturedGraph objects made of them with torch.export alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfcompile.graph import CapturedGraph, ExportedModel
from mfcompile.inputs import ExampleInputs, normalize_inputs, output_tensors
from mfcompile.masks import MaskSet, PackedMask

BATCH, BATCH_AND_SEQUENCE = {0: "batch"}, {0: "batch", 1: "sequence"}


class TwoTower(nn.Module):
    """An image tower, a text tower, and cross-attention from text to image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.embedding = nn.Embedding(50, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 50)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        image = self.patches(pixel_values).flatten(2).transpose(1, 2)
        text = self.embedding(input_ids) * attention_mask[..., None].to(torch.float32)
        scores = self.query(text) @ self.key(image).transpose(1, 2) / 4
        fused = self.norm(text + scores.softmax(-1) @ self.value(image))
        return {"logits": self.head(fused) * self.scale, "pooled": fused.mean(1), "best": scores.argmax(-1)}


class Tied(nn.Module):
    """The output head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 24)
        self.middle = nn.Linear(24, 24)
        self.head = nn.Linear(24, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.middle(self.embedding(input_ids))))
        return logits


def seeded(build: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(**options).eval()


def two_tower_inputs(batch: int = 2, sequence: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + sequence)
    attention = torch.ones(batch, sequence, dtype=torch.int64)
    attention[-1, -2:] = 0
    return {
        "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator),
        "input_ids": torch.randint(0, 50, (batch, sequence), generator=generator),
        "attention_mask": attention,
    }


TWO_TOWER_AXES = {"pixel_values": BATCH, "input_ids": BATCH_AND_SEQUENCE, "attention_mask": BATCH_AND_SEQUENCE}


def capture(
    module: nn.Module, inputs: Any, axes: Mapping[str, Mapping[int, str]] | None = None, masks: MaskSet | None = None
) -> CapturedGraph:
    """A CapturedGraph whose exported program is exact; its own graph is empty, exporters do not read it."""
    examples = normalize_inputs(module, inputs)
    axes = axes or {}
    names = iter(examples.names)

    def dynamic(tensor: Tensor) -> dict[int, Any]:
        return dict.fromkeys(axes.get(next(names), {}), torch.export.Dim.AUTO)

    shapes = pytree.tree_map(lambda leaf: dynamic(leaf) if isinstance(leaf, Tensor) else None, (examples.args, examples.kwargs))
    with torch.no_grad():
        program = torch.export.export(module, examples.args, examples.kwargs, dynamic_shapes=_shapes(module, *shapes))
        outputs = tuple(output_tensors(examples.call(module)))
    exported = ExportedModel(program, "torch.export", examples.names, outputs, axes, examples)
    aliases: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = next(own for own, other in module.named_parameters() if other is parameter)
        aliases.setdefault(first, []).append(name)
    return CapturedGraph(
        graph_module=fx.GraphModule({}, fx.Graph()),
        module=module,
        example_inputs=examples,
        inputs=(),
        output_names=outputs,
        parameter_nodes={},
        aliases={name: tuple(others) for name, others in aliases.items()},
        frontend="torch.export",
        exported=exported,
        masks=masks,
    )


def _shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def random_masks(module: nn.Module, density: float | Mapping[str, float], seed: int = 0) -> MaskSet:
    """Masks of every matrix and convolution kernel of a module, at one density or one per FQN."""
    generator = torch.Generator().manual_seed(seed)
    packed: dict[str, PackedMask] = {}
    for name, parameter in module.named_parameters():
        own = density if isinstance(density, float) else density.get(name)
        if parameter.ndim >= 2 and own is not None:
            packed[name] = PackedMask.pack(torch.rand(parameter.shape, generator=generator) < own)
    return MaskSet(packed)


def masked(module: nn.Module, masks: MaskSet) -> nn.Module:
    """A copy of the module with zeros at pruned places."""
    pruned = copy.deepcopy(module)
    parameters = dict(pruned.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].copy_(torch.where(mask, parameters[name], 0.0))
    return pruned


def feeds(inputs: ExampleInputs | Mapping[str, Tensor]) -> dict[str, Any]:
    tensors = inputs.tensors() if isinstance(inputs, ExampleInputs) else inputs
    return {name: tensor.numpy() for name, tensor in tensors.items()}
