"""Masks that go with weights of which a part is removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mfcompile.masks import MaskSet, PackedMask, fingerprint

Kept = Mapping[int, NDArray[np.bool_]]


def masks_of_smaller(masks: MaskSet, model: nn.Module, smaller: nn.Module, kept: Mapping[str, Kept]) -> MaskSet:
    """The masks of a model as those of the model without some elements.

    Args:
        masks: of ``model``.
        model: what they were made for.
        smaller: what is left of it.
        kept: FQN -> dimension -> which of its positions stay.

    Returns:
        Masks that fit ``smaller``; they carry its fingerprint where they carried that of ``model``.
    """
    packed = {fqn: PackedMask.pack(_cut(masks[fqn], kept.get(fqn, {}))) for fqn in masks}
    values = {}
    for fqn, own in masks.new_values.items():
        spread = torch.zeros(masks.packed[fqn].shape, dtype=own.dtype)
        spread[masks[fqn]] = own.detach().cpu()
        values[fqn] = _cut(spread, kept.get(fqn, {}))[packed[fqn].unpack()]
    is_own = bool(masks.fingerprint) and masks.fingerprint == fingerprint(model)
    refitted = {fqn: _cut(own.detach().cpu(), kept.get(fqn, {})) for fqn, own in masks.refitted.items()}
    return replace(
        masks, packed=packed, new_values=values, refitted=refitted, fingerprint=fingerprint(smaller) if is_own else ""
    )


def _cut(tensor: Tensor, kept: Kept) -> Tensor:
    for axis, positions in kept.items():
        tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(positions)))
    return tensor
