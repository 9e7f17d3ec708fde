"""What a loss function is given, and what it may return."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from math import isfinite
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfcompile.errors import CalibrationError

LossFunction = Callable[[nn.Module, Any], Any]
"""(module, batch) -> a scalar tensor, or an object whose ``loss`` is one (what transformers' models return)."""


def batch_count(batches: Iterable[Any] | None) -> int | None:
    """Number of batches, None where it is not known (a loader over an endless data set has a length that raises)."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):  # a dictionary that is none of Python's own, as tokenizers return
            for item in leaf.values():
                yield from batch_tensors(item)


def own_containers(batch: Any) -> Any:
    """The batch in containers of its own: a loss function may pop its labels, and the batch may be used again."""

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_inference():  # autograd refuses to work with it
            return leaf.clone()
        return copy.copy(leaf) if isinstance(leaf, Mapping) else leaf

    return pytree.tree_map(own, batch)


def sample_count(batch: Any) -> int:
    """Samples of a batch: the size of its first tensor along dimension 0; of a batch of several mappings, of all of them."""
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(item, Mapping) for item in batch):
        return sum(sample_count(item) for item in batch)
    return next((int(tensor.shape[0]) for tensor in batch_tensors(batch) if tensor.ndim), 1)


def usable_loss(result: Any, index: int) -> Tensor:
    """The loss as a scalar tensor, from what a loss function returned for the batch of that number.

    Raises:
        CalibrationError: it is none, is not finite, or has no gradient.
    """
    loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        what = "None" if result is None else f"a {type(result).__name__} without a loss"
        hint = "return output['loss']" if isinstance(result, Mapping) else "return a scalar tensor, or an object with .loss"
        if hasattr(result, "loss"):
            what, hint = f"a {type(result).__name__} whose loss is {loss!r}", "give the model the labels that its loss needs"
        raise CalibrationError(f"the loss function returned {what} for batch {index}: {hint}")
    if loss.numel() != 1:
        raise CalibrationError(
            f"the loss of batch {index} is of shape {tuple(loss.shape)}; it must be one number. Return its mean or its sum"
        )
    if not loss.requires_grad:
        raise CalibrationError(
            f"the loss of batch {index} has no gradient: it depends on none of the weights that are pruned, or it was computed "
            f"under torch.no_grad(), or detached. Return the loss as the module's outputs give it"
        )
    if not isfinite(value := float(loss.detach())):
        raise CalibrationError(
            f"the loss of batch {index} is {value}: its gradient cannot rank weights. Check this batch and the loss function"
        )
    return loss.reshape(())
