"""A second module object over the same weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def share_weights_copy(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the very same tensors as the original's.

    Running the copy may fill caches in it, and parametrizing it changes its attributes, while the original stays
    untouched; no weight is copied. Training the copy trains the original.

    Args:
        module: any module that ``copy.deepcopy`` can copy.

    Raises:
        TypeError, RuntimeError: what ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)
