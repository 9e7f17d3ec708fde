"""Cutting tensors along the token axis and putting them back: plain functions of tensors, traced into the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfcompile.passes.symbolic_sizes import number_of
from mfcompile.passes.token_places import Place


def take(tensor: Tensor, kept: Tensor, axes: Sequence[int], batch: Place, lead: int = 0) -> Tensor:
    """The kept tokens of a tensor, along one axis or along several.

    Args:
        tensor: any tensor with a token axis.
        kept: (batch, kept) positions.
        axes: token axes, counted after ``lead`` axes of size one are put in front.
        batch: batch axis, likewise; with an inner factor where samples and heads share the axis. Of size one it is repeated.
        lead: axes to put in front.

    Returns:
        The axes lie in memory in the order of the tensor's: keeping every token must change no bit.
    """
    for _ in range(lead):
        tensor = tensor.unsqueeze(0)
    rows = kept
    inner = batch.inner
    if inner != 1:
        rows = kept[:, None, :].expand(-1, inner, -1).reshape(-1, kept.shape[1])
    order = _memory_order(tensor)
    if isinstance(tensor.shape[batch.axis], int) and tensor.shape[batch.axis] == 1:
        tensor = tensor.expand([rows.shape[0] if axis == batch.axis else -1 for axis in range(tensor.ndim)])
    tensor = tensor.permute(order)
    for axis in axes:
        tensor = tensor.gather(order.index(axis), _index(tensor, rows, order.index(axis), order.index(batch.axis)))
    return tensor.permute([order.index(at) for at in range(tensor.ndim)])


def _memory_order(tensor: Tensor) -> list[int]:
    """Axes by their strides, the largest first: the order in which the result of an operator should lie, too.

    Products of tensors in another order, and attention beside a mask in another order, differ in their last bits.
    """
    steps = [number_of(step) for step in tensor.stride()]
    return sorted(range(tensor.ndim), key=lambda at: (-steps[at] if steps[at] else -torch.inf, at))


def put_back(tensor: Tensor, kept: Tensor, axes: Sequence[int], batch: Place, size: int, onto: Tensor | None = None) -> Tensor:
    """Kept tokens at their old places among ``size``; the others are zero, or those of ``onto``.

    Args:
        tensor: cut along ``axes``.
        kept: (batch, kept) positions.
        axes: its token axes.
        batch: its batch axis.
        size: tokens before the cut.
        onto: what the others hold; of the result's sizes.
    """
    for axis in axes:
        sizes = [size if at == axis else tensor.shape[at] for at in range(tensor.ndim)]
        base = torch.zeros(sizes, dtype=tensor.dtype) if onto is None else onto
        tensor = base.scatter(axis, _index(tensor, kept, axis, batch.axis), tensor)
    return tensor


def _index(tensor: Tensor, kept: Tensor, axis: int, batch: int) -> Tensor:
    """``kept`` as an index of the tensor's sizes, but for the token axis."""
    shape = [1] * tensor.ndim
    rows = kept if batch < axis else kept.transpose(0, 1)
    for at, size in ((batch, kept.shape[0]), (axis, kept.shape[1])):
        shape[at] = size
    return rows.reshape(shape).expand([-1 if at in (axis, batch) else tensor.shape[at] for at in range(tensor.ndim)])
