"""Weights that cannot be pruned at all: those without values, and those that hold no numbers."""

from __future__ import annotations

import torch
from torch import nn

from mfcompile.errors import InputError
from mfcompile.region import RegionMap


def require_values(module: nn.Module) -> None:
    """Refuse to prune, run or write a model whose weights are only a plan.

    Raises:
        InputError: names the first weight without values.
    """
    missing = [name for name, parameter in module.named_parameters() if parameter.device.type == "meta"]
    if missing:
        raise InputError(
            f"the model has {len(missing)} parameters without values (on the meta device; first: {missing[0]}): its regions "
            f"can be inspected, but it cannot be pruned or written. Load the weights first"
        )


def refuse_broken_parameters(model: nn.Module, regions: RegionMap) -> None:
    """Name a damaged weight before calibration, which would only see what it does to the activations behind it.

    Raises:
        InputError: a parameter holds NaN, or a linear weight an infinity (elsewhere it may be meant, as in a mask).
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel() or parameter.itemsize < 2:
            continue
        lowest, highest = torch.aminmax(parameter.detach())  # a NaN anywhere makes both NaN, and nothing is allocated
        if lowest.isnan() or (name in regions.weights and (lowest.isinf() or highest.isinf())):
            raise InputError(f"the parameter {name} holds NaN or infinity: the model cannot be pruned. Check the checkpoint")
