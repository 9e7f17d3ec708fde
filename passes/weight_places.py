"""Where stored weights are while a module runs: in the parameters' memory, and in copies that the model makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mfcompile.module_copy import storage_address
from mfcompile.passes.weights import gathered

_COPIES = frozenset({"clone", "contiguous", "to", "_to_copy"})
"""Operators that may give a weight in memory of its own, in its layout."""

_LOOK_UPS = frozenset({"index", "_unsafe_index", "index_select"})
"""Operators that may copy some matrices of a stack."""


@dataclass(frozen=True)
class Place:
    """A tensor as part of a parameter.

    Attributes:
        fqn, parameter: the parameter.
        tensor: where in the parameter it lies: sizes, strides and offset, perhaps on the meta device.
        gathered_by: the indices that picked its matrices along dimension 0; ``tensor`` has step 0 along their dimensions.
    """

    fqn: str
    parameter: Tensor
    tensor: Tensor
    gathered_by: Tensor | None = None


@dataclass(frozen=True)
class _Copy:
    """(Part of) a parameter in memory of its own.

    Attributes:
        place: the copied part.
        result: meta tensor, how the copy lies in its memory.
        storage: that memory.
    """

    place: Place
    result: Tensor
    storage: StorageWeakRef

    def place_of(self, view: Tensor) -> Place | None:
        """Where in the parameter a view of the copy lies; None when the layouts differ and it is not the whole copy."""
        if (view.shape, view.stride()) == (self.result.shape, self.result.stride()):
            return self.place
        source = self.place.tensor
        if self.place.gathered_by is not None:
            found = self._place_of_gathered(view, self.place.gathered_by.ndim)
        elif source.stride() != self.result.stride():
            found = None
        else:
            found = _place(view, int(source.storage_offset()) - int(self.result.storage_offset()))
        return None if found is None else replace(self.place, tensor=found)

    def _place_of_gathered(self, view: Tensor, looked_up: int) -> Tensor | None:
        """The same of copied matrices, one behind the other: steps from matrix to matrix count as step 0."""
        first = self.place.tensor[(0,) * looked_up]
        size = first.numel()
        if first.stride() != self.result.stride()[looked_up:] or not size:
            return None
        inside = sum((length - 1) * step for length, step in zip(view.shape, view.stride(), strict=True) if step < size)
        offset = (int(view.storage_offset()) - int(self.result.storage_offset())) % size
        if inside + offset >= size:
            return None
        steps = [step if step < size else 0 for step in view.stride()]
        start = int(first.storage_offset()) + offset
        return torch.empty(start + inside + 1, device="meta").as_strided(view.shape, steps, start)


def _place(tensor: Tensor, shift: int = 0) -> Tensor:
    """A tensor's sizes, strides and offset on the meta device."""
    offset = int(tensor.storage_offset()) + shift
    extent = 1 + offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size)
    return torch.empty(extent, device="meta").as_strided(tensor.shape, tensor.stride(), offset)


class WeightPlaces:
    """Finds out which part of which parameter a tensor is, by its storage. Copies are forgotten with their memory.

    Args:
        parameters: (FQN, parameter) of the weights that are wanted.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        self._parameters: dict[int, list[tuple[str, Tensor]]] = {}
        self.copies: dict[int, _Copy] = {}
        for fqn, parameter in parameters:
            self._parameters.setdefault(storage_address(parameter), []).append((fqn, parameter))

    def is_stored(self, tensor: Tensor) -> bool:
        """The tensor lies in the memory of a parameter; what part of which one it is will not change."""
        address = storage_address(tensor)
        return address in self._parameters and address not in self.copies

    def of(self, weight: Tensor) -> list[Place]:
        """Every parameter that the tensor may be part of (several where they share memory)."""
        address = storage_address(weight)
        copy = self.copies.get(address)
        if copy is None:
            return [Place(fqn, parameter, weight) for fqn, parameter in self._parameters.get(address, ())]
        if copy.storage.expired():  # type: ignore[no-untyped-call]
            del self.copies[address]
            return []
        place = copy.place_of(weight)
        return [] if place is None else [place]

    def follow(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """An operator ran: a weight that it copied is the same weight in other memory."""
        if name in _COPIES:
            self._follow_copy(args[0], result)
        elif name in _LOOK_UPS:
            self._follow_look_up(name, args, result)

    def _follow_copy(self, source: Tensor, result: Tensor) -> None:
        """A weight that is cast or copied is the same weight in other memory."""
        if storage_address(result) != storage_address(source):
            for place in self.of(source):
                self._remember(replace(place, tensor=_place(place.tensor)), result)

    def _follow_look_up(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        """Matrices that were looked up by number (the expert of every token) are copies as well."""
        listed = [args[2]] if name == "index_select" and args[1] == 0 else args[1]
        if not isinstance(listed, (list, tuple)) or len(listed) != 1 or args[0].ndim < 3:
            return
        (indices,) = listed
        if isinstance(indices, Tensor) and not indices.dtype.is_floating_point and indices.dtype != torch.bool:
            for place in self.of(args[0]):
                if place.gathered_by is None and place.tensor.shape[0]:
                    looked_up = gathered(_place(place.tensor), tuple(indices.shape))
                    self._remember(replace(place, tensor=looked_up, gathered_by=indices), result)

    def _remember(self, place: Place, result: Tensor) -> None:
        storage = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
        self.copies[storage_address(result)] = _Copy(place, _place(result), storage)
