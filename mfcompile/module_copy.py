"""A second module object over the same weights, and runs that leave these weights as they were."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def share_weights_copy(
    module: nn.Module,
    wrapped: Mapping[nn.Module, nn.Module] | None = None,
    replaced: Mapping[Tensor, Tensor] | None = None,
) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the very same tensors as the original's.

    Running the copy may fill caches in it, and parametrizing it changes its attributes, while the original stays
    untouched; no weight is copied. Training the copy trains the original. Other attributes that are views of a parameter
    or a buffer stay views of it.

    Args:
        module: any module that ``copy.deepcopy`` can copy.
        wrapped: wrapper -> the module inside it; the copy holds a copy of the latter in the place of the former.
        replaced: parameter or buffer -> the tensor that stands in the copy wherever the original's tree refers to it.

    Raises:
        TypeError, RuntimeError: what ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[Any, Any] = {id(tensor): tensor for tensor in tensors}
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    memo.update((id(tensor), new) for tensor, new in (replaced or {}).items())
    memo["torch"] = {storage._cdata: storage for storage in storages}  # where torch keeps the storages it has copied
    for wrapper, inner in reversed(list((wrapped or {}).items())):  # inner wrappers before those around them
        memo[id(wrapper)] = copy.deepcopy(inner, memo)
    return copy.deepcopy(module, memo)


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module tree over the same weights, but for some that are new; a tied weight is new under all its names.

    Args:
        module: any module that ``copy.deepcopy`` can copy.
        weights: FQN -> new values, of the parameter's shape.

    Raises:
        TypeError, RuntimeError: what ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    fresh = share_weights_copy(module)
    named = dict(fresh.named_parameters(remove_duplicate=False))
    new = {id(named[fqn]): nn.Parameter(values, named[fqn].requires_grad) for fqn, values in weights.items()}
    for owner in list(fresh.modules()):
        for leaf, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in new:
                setattr(owner, leaf, new[id(parameter)])
    return fresh


class KeptState:
    """What a module's parameters and buffers held before a run wrote into them, so that it can be put back.

    Models count steps, clamp temperatures and fill queues in their forward. A dispatch mode calls ``before`` for every
    operator; only tensors that are about to be written are copied, so that a run that writes none costs nothing.

    Args:
        module: the module that will run.
    """

    def __init__(self, module: nn.Module) -> None:
        tables = [item._buffers for item in module.modules()]
        self._buffers = [(table, dict(table)) for table in tables if isinstance(table, dict)]  # a scripted module's is none
        self._watched: dict[int, list[Tensor]] = {}
        self._passing: list[tuple[int, Tensor]] = []
        self._aliases: list[tuple[Tensor, Tensor]] = []
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            self._aliases.append((tensor, tensor.detach()))
            self._watched.setdefault(storage_address(tensor), []).append(tensor)

    def watch(self, tensor: Tensor) -> None:
        """Keep this tensor's values as well, until the next ``restore``."""
        address = storage_address(tensor)
        self._watched.setdefault(address, []).append(tensor)
        self._passing.append((address, tensor))

    def before(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An operator is about to run: copy the watched tensors that it writes."""
        if not func._schema.is_mutable and _name(func) not in _WRITES_STATISTICS:
            return
        for written in written_tensors(func, args, kwargs):
            for tensor in self._watched.get(storage_address(written), ()):
                if id(tensor) not in self._saved:
                    self._saved[id(tensor)] = (tensor, tensor.detach().clone())

    def is_written(self, tensor: Tensor) -> bool:
        """The run wrote into memory that a watched tensor shares with this one."""
        address = storage_address(tensor)
        return any(storage_address(saved) == address for saved, _ in self._saved.values())

    def restore(self) -> None:
        """Put back what was written, also where ``tensor.data`` was exchanged or a buffer was replaced."""
        for buffers, before in self._buffers:
            buffers.clear()
            buffers.update(before)
        for tensor, alias in self._aliases:
            if storage_address(tensor) != storage_address(alias):
                tensor.data = alias
        for tensor, values in self._saved.values():
            tensor.detach().copy_(values)
        self._saved.clear()
        for address, tensor in self._passing:
            self._watched[address] = [item for item in self._watched[address] if item is not tensor]
        self._passing.clear()


def storage_address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; equal for a tensor and its views. Without memory, what stands for it."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.device.type == "meta" else storage.data_ptr()


def written_tensors(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensor arguments that an operator changes in place, by its schema."""
    found: list[Tensor] = []
    for position, item in enumerate(func._schema.arguments):
        if item.alias_info is not None and item.alias_info.is_write:
            value = kwargs[item.name] if item.name in kwargs else args[position] if position < len(args) else None
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    if _name(func) in _WRITES_STATISTICS and len(args) > _TRAINING and args[_TRAINING]:
        found += [leaf for leaf in args[_RUNNING] if isinstance(leaf, Tensor)]
    return found


_WRITES_STATISTICS = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")
"""They write running mean and variance while they train, and their schemas do not say so."""

_RUNNING, _TRAINING = slice(3, 5), 5
"""Places of these arguments in all three."""


def _name(func: Any) -> str:
    return str(func._schema.name)
