"""Marks: one bool per element of a storage, or per row of elements that are alike; see ``padding_flow``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Mark:
    """Marks of one storage.

    Attributes:
        reference: keeps the storage's address from being used again, not its memory.
        bits: (elements / chunk,) bool.
        chunk: neighbouring elements that share a bit: a whole row where its features are alike.
        itemsize: bytes of an element.
    """

    reference: StorageWeakRef
    bits: Tensor
    chunk: int
    itemsize: int

    def is_alive(self) -> bool:
        """Some tensor still has the storage."""
        return not self.reference.expired()  # type: ignore[no-untyped-call]


def by_chunk(tensor: Tensor, marks: Tensor, count: int) -> tuple[Tensor, int]:
    """Bits of a storage of ``count`` elements that holds one tensor, and the elements to a bit."""
    if tensor.numel() != count or any(step == 0 for step in tensor.stride()):
        bits = torch.zeros(count, dtype=torch.bool, device=tensor.device)
        torch.as_strided(bits, tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(marks.expand(tensor.shape))
        return bits, 1
    marks = marks.reshape([1] * (tensor.ndim - marks.ndim) + list(marks.shape))
    order = sorted((dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1), key=tensor.stride, reverse=True)
    chunk = 1
    for dim in reversed(order):
        if marks.shape[dim] > 1:
            break
        chunk *= tensor.shape[dim]
    sizes = [tensor.shape[dim] if tensor.stride(dim) >= chunk else 1 for dim in order]
    ones = [dim for dim in range(tensor.ndim) if tensor.shape[dim] == 1]
    thin = marks.permute(*ones, *order)[(0,) * len(ones)] if ones else marks.permute(order)
    # In memory of their own: bits are read by strides from the start of their storage.
    return thin.expand(sizes).reshape(-1).clone(memory_format=torch.contiguous_format), chunk


@functools.cache
def no_mark(device: torch.device) -> Tensor:
    """The thinnest marks of all: nothing is padding."""
    return torch.zeros((), dtype=torch.bool, device=device)


def carried(marked: Sequence[tuple[Tensor, Mark]], result: Tensor, only: Tensor | None = None) -> Mark | None:
    """Marks of a result that has the rows of its marked operands, without computing: nearly all operators are so.

    Whole rows are marked, alike in every operand, and all tensors lie row by row in storages of their own. The bits are
    shared: those of whole rows are never written to.

    Args:
        marked: the marked operands.
        result: a new tensor, in a storage of its own.
        only: where features are summed, the operand whose rows the result has; another one may not be marked, and the
            number of features may change.

    Returns:
        None where it takes a closer look.
    """
    operand, mark = marked[0]
    storage = result.untyped_storage()
    if not result.numel() or not result.ndim or (only is not None and (len(marked) > 1 or operand is not only)):
        return None
    if not _fills(result, storage.nbytes()):
        return None
    for leaf, own in marked:
        if leaf.ndim != result.ndim or leaf.shape[:-1] != result.shape[:-1] or not leaf.numel():
            return None
        if only is None and leaf.shape[-1] != result.shape[-1]:
            return None
        is_by_row = own.chunk > 1 and own.chunk % leaf.shape[-1] == 0 and own.itemsize == leaf.element_size()
        if not is_by_row or not _fills(leaf, own.bits.numel() * own.chunk * own.itemsize):
            return None
        if own.bits is not mark.bits and (own.chunk != mark.chunk or not torch.equal(own.bits, mark.bits)):
            return None
    chunk = mark.chunk // operand.shape[-1] * result.shape[-1]
    if chunk == 1:
        return None
    return Mark(StorageWeakRef(storage), mark.bits, chunk, result.element_size())  # type: ignore[no-untyped-call]


def _fills(tensor: Tensor, size_bytes: int) -> bool:
    """The tensor is all of a storage of that size, row by row."""
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == size_bytes


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an operator."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    """A tensor of these sizes takes part in an elementwise operator that gives those."""
    return len(shape) <= len(onto) and all(old in (1, new) for old, new in zip(reversed(shape), reversed(onto), strict=False))


def all_over(mark: Tensor, dims: Any, keepdim: bool) -> Tensor:
    """Marks of what is padding throughout a dimension, or several."""
    listed = [dims] if isinstance(dims, int) else list(dims)
    for dim in sorted((dim % mark.ndim for dim in listed), reverse=True):
        mark = mark.all(dim, keepdim=keepdim)
    return mark
