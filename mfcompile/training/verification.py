"""Counting what masks promise: that every pruned place is zero."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mfcompile.errors import InputError, MaskError
from mfcompile.frontends.unwrapping import unwrap
from mfcompile.masked_weights import masked_places, masks_of
from mfcompile.masks import MaskSet


@dataclass(frozen=True)
class WeightCheck:
    """What one weight holds.

    Attributes:
        fqn: the parameter.
        weight_count: all places.
        kept_count: places that the mask keeps.
        kept_zero_count: kept places that hold zero all the same.
        nonzero_count: pruned places that do not hold zero; NaN is not zero.
        largest: the largest |value| at a pruned place.
    """

    fqn: str
    weight_count: int
    kept_count: int
    kept_zero_count: int
    nonzero_count: int
    largest: float


@dataclass(frozen=True)
class MaskVerification:
    """What all masked weights hold.

    Attributes:
        weights: one entry per mask.
    """

    weights: tuple[WeightCheck, ...]

    @property
    def pruned_count(self) -> int:
        """Places that the masks prune."""
        return sum(weight.weight_count - weight.kept_count for weight in self.weights)

    @property
    def kept_count(self) -> int:
        """Places that the masks keep."""
        return sum(weight.kept_count for weight in self.weights)

    @property
    def nonzero_count(self) -> int:
        """Pruned places that do not hold zero."""
        return sum(weight.nonzero_count for weight in self.weights)

    @property
    def sparsity(self) -> float:
        """Fraction of the masked weights that is pruned."""
        return self.pruned_count / max(self.pruned_count + self.kept_count, 1)

    def __str__(self) -> str:
        held = f"{self.pruned_count - self.nonzero_count:,} of {self.pruned_count:,} pruned places hold zero"
        return f"{held}, in {len(self.weights)} weights of sparsity {self.sparsity:.4f}"


def verify_masks(module: nn.Module, masks: MaskSet | Path | str | None = None) -> MaskVerification:
    """Check that every pruned place of a module holds zero, in the values that its layers compute with.

    Args:
        module: with masks in force, stripped, or reloaded by its own library; wrappers (DDP, torch.compile) may be around it.
        masks: what the places are checked against, or the path of masks.safetensors; None takes the masks in force.

    Returns:
        The counts, weight by weight.

    Raises:
        MaskError: pruned places hold something else than zero; names the weights with the most of them. Or adapters of peft
            sit on masked layers: what they add is not masked, and merging them changes nothing.
        InputError: there are no masks to check against, or the module has no weight of that name and shape.
    """
    module, _ = unwrap(module)
    if masks is None:
        masks = masks_of(module)
        if not masks:
            raise InputError(
                f"{type(module).__name__} has no masks in force, so there is nothing to check its weights against: give the "
                f"masks (verify_masks(module, 'pruned/masks.safetensors'))"
            )
    elif not isinstance(masks, MaskSet):
        masks = MaskSet.load(masks)
    refuse_foreign_adapters(module)
    found = MaskVerification(tuple(_check(fqn, _weight(module, fqn, masks), masks[fqn]) for fqn in masks))
    broken = sorted((weight for weight in found.weights if weight.nonzero_count), key=lambda one: -one.nonzero_count)
    if broken:
        raise MaskError(_describe(broken, found))
    return found


def refuse_foreign_adapters(module: nn.Module) -> None:
    """Refuse adapters of peft around masked layers.

    Raises:
        MaskError: names the layers.
    """
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if kind is None:  # nobody loaded peft
        return
    around = [path for path, item in module.named_modules() if isinstance(item, kind) and _holds_mask(item)]
    if around:
        raise MaskError(
            f"adapters of peft sit on masked layers ({_shorten(around)}): what they add is not masked, and merging them writes "
            f"into a computed weight, which changes nothing. Use mfcompile.add_lora(module) on the module without peft"
        )


def _holds_mask(layer: nn.Module) -> bool:
    return next(masked_places(layer), None) is not None


def _check(fqn: str, weight: Tensor, mask: Tensor) -> WeightCheck:
    mask = mask.to(weight.device)
    is_zero = weight == 0
    wrong = weight[~mask & ~is_zero]
    return WeightCheck(
        fqn=fqn,
        weight_count=mask.numel(),
        kept_count=int(mask.sum()),
        kept_zero_count=int((mask & is_zero).sum()),
        nonzero_count=wrong.numel(),
        largest=float(wrong.abs().max()) if wrong.numel() else 0.0,
    )


def _weight(module: nn.Module, fqn: str, masks: MaskSet) -> Tensor:
    """The values that a layer computes with, (out, in) as the mask."""
    path, _, leaf = fqn.rpartition(".")
    try:
        weight = getattr(module.get_submodule(path), leaf)
    except AttributeError:
        weight = None
    shape = masks.packed[fqn].shape
    if isinstance(weight, Tensor) and tuple(weight.shape) == shape:
        with torch.no_grad():
            return weight.detach()
    if isinstance(weight, Tensor):
        raise InputError(f"{fqn} is {tuple(weight.shape)} in the model and {shape} in the masks: they belong to another model")
    near = difflib.get_close_matches(fqn, [name for name, _ in module.named_parameters()], n=3)
    raise InputError(
        f"{type(module).__name__} has no weight called {fqn}, as the masks do. Nearest names: {', '.join(near) or 'none'}. "
        f"For a model with other names, see mfcompile.transfer_masks"
    )


def _describe(broken: Iterable[WeightCheck], found: MaskVerification) -> str:
    broken = list(broken)
    worst = "; ".join(
        f"{one.fqn}: {one.nonzero_count:,} of {one.weight_count - one.kept_count:,}, up to {one.largest:.3g}"
        for one in broken[:3]
    )
    more = f"; and {len(broken) - 3} more weights" if len(broken) > 3 else ""
    return (
        f"{found.nonzero_count:,} of {found.pruned_count:,} pruned places are not zero, in {len(broken)} of "
        f"{len(found.weights)} weights ({worst}{more}). They were trained or loaded without "
        f"masks in force: train what mfcompile.load or mfcompile.mask_module gives"
    )


def _shorten(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
