"""The recorded oracle: weights, calibration batches, masks and norms that the authors' published code gave on CPU.

``data/xvlm/README.md`` says what each file holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from torch import Tensor, nn

from tests.oracle.xvlm import Xvlm, XvlmConfig

DATA = Path(__file__).parent / "data" / "xvlm"
ITERATIONS = 3  # each takes one general and one region batch
SPARSITIES = ("0.63", "0.75", "0.90")

Masks = dict[str, NDArray[np.bool_]]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A prunable linear layer.

    Attributes:
        name: FQN of the weight.
        shape: (out_features, in_features).
        modality: vision, text or fusion.
    """

    name: str
    shape: tuple[int, int]
    modality: str

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


def layers() -> list[Layer]:
    """The 80 prunable layers, in the order of the parameters."""
    entries = json.loads((DATA / "layers.json").read_text(encoding="utf-8"))
    return [Layer(entry["name"], (entry["shape"][0], entry["shape"][1]), entry["modality"]) for entry in entries]


def model(*, positions_from_mask: bool = False) -> Xvlm:
    """The dense model with the recorded weights, in eval mode."""
    config = XvlmConfig(**json.loads((DATA / "config.json").read_text(encoding="utf-8")))
    module = Xvlm(config, positions_from_mask=positions_from_mask)
    module.load_state_dict(load_tensors(DATA / "model.safetensors"))
    return module.eval()


def weights() -> dict[str, NDArray[np.float32]]:
    """Weight of every prunable layer, (out, in)."""
    stored = load_file(DATA / "model.safetensors")
    return {layer.name: stored[layer.name] for layer in layers()}


def general_batches() -> list[Batch]:
    """Image-text pairs: arguments of ``Xvlm.forward``, 4 samples each."""
    stored = load_tensors(DATA / "calib.safetensors")
    names = ("image", "text_ids", "text_atts")
    return [{name: stored[f"general.{i}.{j}"] for j, name in enumerate(names)} for i in range(ITERATIONS)]


def region_batches() -> list[Batch]:
    """Region batches: 3 images and 4 texts each, with the region of the image that each text describes."""
    stored = load_tensors(DATA / "calib.safetensors")
    fields = {"image": 0, "text_ids": 2, "text_atts": 3, "idx_to_group_img": 1, "image_atts": 7}
    return [{name: stored[f"region.{i}.{j}"] for name, j in fields.items()} for i in range(ITERATIONS)]


def interleaved_batches() -> list[Batch]:
    """General and region batches in turn, as the oracle was calibrated."""
    return [batch for pair in zip(general_batches(), region_batches(), strict=True) for batch in pair]


def masks(key: str) -> Masks:
    """Recorded masks of one ``pruner@sparsity``; (out, in), True = kept."""
    packed = load_file(DATA / "masks_packed.safetensors")[key]
    order = layers()
    bits = np.unpackbits(packed, count=sum(layer.size for layer in order)).astype(np.bool_)
    found: Masks = {}
    start = 0
    for layer in order:
        found[layer.name] = bits[start : start + layer.size].reshape(layer.shape)
        start += layer.size
    return found


def mean_squares(variant: str) -> dict[str, NDArray[np.float32]]:
    """Recorded sum of squares over all calibration rows, divided by the number of samples, (in,) per layer."""
    stored = load_file(DATA / "norms.safetensors")
    return {layer.name: stored[f"{variant}.{layer.name}"] for layer in layers()}


def sample_counts(variant: str) -> dict[str, int]:
    """Number of samples behind ``mean_squares``, per layer."""
    counts = load_file(DATA / "norms.safetensors")[f"{variant}.nsamples"]
    return {layer.name: int(count) for layer, count in zip(layers(), counts, strict=True)}


def linear_inputs(module: nn.Module, batches: list[Batch]) -> list[dict[str, NDArray[np.float32]]]:
    """Raw input of every prunable layer, one dict per batch: FQN -> (rows of the batch, tokens, in)."""
    seen: dict[str, NDArray[np.float32]] = {}

    def record(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert name not in seen, f"{name} ran twice in one forward pass"
            seen[name] = args[0].numpy()

        handles.append(module.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for layer in layers():
        record(layer.name)
    found = []
    with torch.no_grad():
        for batch in batches:
            module(**batch)
            found.append(dict(seen))
            seen.clear()
    for handle in handles:
        handle.remove()
    return found


def differing_bits(left: Masks, right: Masks) -> dict[str, int]:
    """FQN -> number of differing mask bits, only where there are any."""
    counts = {name: int((left[name] != right[name]).sum()) for name in left.keys() | right.keys()}
    return {name: count for name, count in sorted(counts.items()) if count}
