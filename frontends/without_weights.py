"""Running a model whose weights have no values: what depends on inputs alone is computed, the rest has only a shape.

A model on the meta device cannot be run, but where its activations go can be seen. Masks, positions, grids and indices
come from the example inputs and stay real, so that code that reads numbers from them works; whatever a weight without
values takes part in becomes a meta tensor. Tensors that the model makes on its own device are made for real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.errors import CaptureError
from mfcompile.module_copy import storage_address, written_tensors

_CPU, _META = torch.device("cpu"), torch.device("meta")

_READS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose"})
"""Operators that give Python a number."""

_FILLS = frozenset({"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"})
"""Operators that take nothing but shape and dtype from their operand."""

_LIKE_OTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "aten::expand_as": lambda one, other: one.expand(other.shape),
    "aten::view_as": lambda one, other: one.view(other.shape),
    "aten::reshape_as": lambda one, other: one.reshape(other.shape),
    "aten::type_as": lambda one, other: one.to(other.dtype),
}
"""Operators that take nothing but shape or dtype from their second operand."""


class PartialRun:
    """Executes operators some of whose operands have no values.

    A tensor without values is on the meta device, or is one that such a tensor was written into. Not thread-safe.
    """

    def __init__(self) -> None:
        self._overwritten: set[int] = set()

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operator's result, real where it can be.

        Raises:
            CaptureError: the operator reads a number that depends on a weight.
        """
        name = func._schema.name
        leaves = pytree.tree_leaves((args, kwargs))
        is_known = not any(isinstance(leaf, Tensor) and self._is_unknown(leaf) for leaf in leaves)
        device = _CPU if is_known else _META
        args, kwargs = pytree.tree_map(lambda leaf: device if isinstance(leaf, torch.device) else leaf, (args, dict(kwargs)))
        if is_known:
            return func(*args, **kwargs)
        if name in _READS or (torch.Tag.dynamic_output_shape in func.tags and name not in _SIZED):
            raise CaptureError(
                f"the model reads numbers that depend on its weights ({name.replace('::', '.')}), and these have no values. "
                f"Load the weights, or give what is computed there as an input"
            )
        if name.partition("::")[2] in _FILLS:
            return func(*args, **{**kwargs, "device": _CPU})
        if len(args) > 1 and isinstance(args[1], Tensor) and not self._is_unknown(args[0]):
            if name in _LIKE_OTHER:
                return _LIKE_OTHER[name](args[0], args[1])
            if name == "aten::to":
                return args[0].to(args[1].dtype)
        written = [item for item in written_tensors(func, args, kwargs) if item.device != _META]
        if written:
            self._overwritten.update(storage_address(item) for item in written)
            return written[0]
        if name in _SIZED:
            args, kwargs = _SIZED[name](args, dict(kwargs))
        args, kwargs = pytree.tree_map(lambda leaf: leaf.to(_META) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return func(*args, **kwargs)

    def _is_unknown(self, tensor: Tensor) -> bool:
        return tensor.device == _META or storage_address(tensor) in self._overwritten


def _with_places(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Indexing by a mask is indexing by the places where it is true; how many they are is known from a real mask."""
    places: list[Tensor | None] = []
    for index in args[1]:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        if is_mask and index.device == _META:
            raise CaptureError("the model indexes by a mask that depends on its weights, and these have no values")
        places += index.nonzero().unbind(1) if is_mask else [index]
    return (args[0], places, *args[2:]), kwargs


def _with_output_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    repeats = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    return args, {**kwargs, "output_size": int(repeats.sum())}


_SIZED: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "aten::index": _with_places,
    "aten::index_put": _with_places,
    "aten::index_put_": _with_places,
    "aten::_index_put_impl_": _with_places,
    "aten::repeat_interleave": _with_output_size,
}
"""Operators whose result is as long as a real operand says."""


def has_no_values(module: nn.Module) -> bool:
    """Some parameter of the module is on the meta device."""
    return any(parameter.device == _META for parameter in module.parameters())


@contextlib.contextmanager
def tolerating_no_values(module: nn.Module) -> Iterator[None]:
    """Let ``module`` run in the block, also where its weights have no values."""
    if not has_no_values(module):
        yield
        return
    with torch.inference_mode(), _PartialMode():
        yield


class _PartialMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._partial = PartialRun()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._partial.execute(func, args, kwargs or {})
