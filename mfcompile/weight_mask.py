"""One weight's mask: what lays it over the weight, wherever that is and however it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def mask_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with zeros at its pruned places: exact (+0.0), also where the stored value is NaN.

    Args:
        weight: any shape and dtype; not changed.
        mask: bool, of the same shape, 1 = kept.

    Returns:
        A new tensor of the weight's shape and dtype; no gradient flows to pruned places.
    """
    if not weight.requires_grad or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.where(mask, weight, 0.0)
    # Without autograd torch still picks the kernel of a linear layer by whether its weight is trainable: this one is
    # as much as the dense one, so that both round alike to the last bit. An inference tensor could not say so.
    with torch.inference_mode(False), torch.no_grad():
        return torch.where(mask, weight, 0.0).requires_grad_()


@dataclass(frozen=True)
class MaskRecord:
    """Where a mask comes from.

    Attributes:
        region: region of the weight, "" when unknown.
        fingerprint: fingerprint of the model that the masks were made for, "" when unknown.
        sparsity: requested sparsity of the whole set, the fraction removed: one, or region -> its own.
    """

    region: str = ""
    fingerprint: str = ""
    sparsity: float | Mapping[str, float] | None = None


class WeightMask:
    """What holds the pruned places of one weight at zero.

    It is no buffer: averages of weights, broadcasts of buffers and checkpoints have no business with it.

    Args:
        mask: bool, shape of the weight, 1 = kept; never written to.
        shared: the parameter of a dense model that the masked module shares; zeros are not written into it.
        record: where the mask comes from.
    """

    def __init__(self, mask: Tensor, shared: nn.Parameter | None = None, record: MaskRecord | None = None) -> None:
        self.mask = mask
        self.record = record or MaskRecord()
        # By its id and not by a reference, which would forbid torch to exchange what the parameter holds. A parameter
        # that comes to have the id of one that is gone is taken for shared, and none of its values is lost by that.
        self._shared = None if shared is None else id(shared)
        self._cut_dimensions = 0

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight with zeros at its pruned places; see ``mask_weight``."""
        return mask_weight(weight, self.over(weight))

    def over(self, weight: Tensor) -> Tensor:
        """The mask where the weight is, and cut as it is: layers of FSDP hold whole tensors in their forward only."""
        mask = self.mask if self.mask.device == weight.device else self.mask.to(weight.device)
        mesh: Any = None if type(weight) in (Tensor, nn.Parameter) else getattr(weight, "device_mesh", None)
        if mesh is None:
            return mask
        from torch.distributed.tensor import distribute_tensor

        placements: Any = weight.placements  # type: ignore[attr-defined]
        return distribute_tensor(mask, mesh, placements, src_data_rank=None)  # every process has the whole mask

    def is_shared(self, stored: Tensor) -> bool:
        """The stored tensor is a dense model's own, whose values at pruned places must stay."""
        is_cut = hasattr(stored, "device_mesh")  # by FSDP, which leaves no dense model over the same parameters
        return self._shared == id(stored) and not is_cut

    def is_cut(self, owner: nn.Module, stored: Tensor) -> bool:
        """FSDP has cut what is stored, and nobody computes with it; FSDP itself asks the module for it, and must get it.

        What it puts together for a forward is a plain tensor, or, under tensor parallelism, cut along fewer dimensions.
        """
        if type(stored) in (Tensor, nn.Parameter) or not getattr(owner, "_is_fsdp_managed_module", False):
            return False
        dimensions: int = getattr(getattr(stored, "device_mesh", None), "ndim", 0)
        self._cut_dimensions = max(self._cut_dimensions, dimensions)
        return dimensions == self._cut_dimensions > 0

    def move(self, device: torch.device) -> None:
        """Keep the mask on this device, but where devices hold no values."""
        if device.type != "meta":
            self.mask = self.mask.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightMask:
        twin = WeightMask(self.mask, None, self.record)
        twin._shared = self._shared  # only a copy over the very same parameter still shares it
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shared": None}
