"""Padding followed through a running model: which rows of which activation come from padding tokens.

Every operator that reads a marked tensor marks its result. A mark is one bool per element, kept per storage, so that
views and writes through views need no rule of their own:

* what only moves elements (cat, index, masked_scatter, where, ...) moves their marks in the same way;
* elementwise operators mark what any operand marks: a padding token plus a position is still padding;
* reductions, and the summed dimension of a product, mark what is padding throughout: a mean over tokens is none, a
  linear layer keeps the rows of its input, and an attention has the rows of its queries, not of its keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.graph import Diagnostic
from mfcompile.passes.operators import CONTENT_FREE, SOFTMAX_ATTENTION
from mfcompile.passes.padding import PaddingMask

_MOVES = frozenset(
    {
        "cat", "concat", "concatenate", "stack", "hstack", "vstack", "index", "_unsafe_index", "index_select", "gather",
        "take_along_dim", "masked_select", "repeat", "tile", "repeat_interleave", "roll", "flip", "constant_pad_nd", "pad",
        "unfold", "where", "masked_scatter", "index_put", "_index_put_impl", "scatter", "scatter_add", "slice_scatter",
        "select_scatter", "index_copy", "index_add", "copy", "split_with_sizes_copy", "unbind_copy", "tril", "triu",
    }
)  # fmt: skip
"""Operators whose result holds elements of their operands in other places."""

_CONTENT = frozenset({"self", "tensors", "input", "src", "source", "values", "value", "other"})
"""Schema names of the arguments that hold elements; the others say where."""

_PURGE_EVERY = 256


@dataclass(frozen=True)
class _Mark:
    """Marks of one storage, and what keeps its address from being used again."""

    reference: StorageWeakRef
    bits: Tensor
    itemsize: int

    def is_alive(self) -> bool:
        """Some tensor still has the storage."""
        return not self.reference.expired()  # type: ignore[no-untyped-call]


class PaddingTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Follows padding while a module or a graph runs inside it. Not thread-safe.

    Args:
        masks: the padding masks of the model.
    """

    def __init__(self, masks: Iterable[PaddingMask]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._masks = tuple(masks)
        self._marks: dict[int, _Mark] = {}
        self._is_paused = False
        self._steps = 0
        self._lost: dict[str, int] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """A forward pass starts on these inputs: mark the padding among their tokens."""
        self._marks = {}
        for item in self._masks:
            if item.tokens in tensors and item.mask in tensors:
                tokens, padding = tensors[item.tokens], item.padding(tensors[item.mask])
                if tokens.shape[: padding.ndim] == padding.shape and bool(padding.any()):
                    self._write(tokens, padding.reshape(*padding.shape, *[1] * (tokens.ndim - padding.ndim)))

    def end(self) -> None:
        """The forward pass is over: nothing is marked any more."""
        self._marks = {}

    def keep(self, activation: Tensor, feature_dim: int) -> Tensor | None:
        """Which rows of an activation are tokens.

        Args:
            activation: (..., in_features), or with the features at ``feature_dim``.
            feature_dim: counted from the end.

        Returns:
            bool, sizes of the activation without the features; None when no row is padding.
        """
        mark = self._read(activation)
        if mark is None:
            return None
        padding = mark.all(feature_dim)
        return ~padding if bool(padding.any()) else None

    def following(self) -> contextlib.AbstractContextManager[Any]:
        """Follow what runs inside, where there is padding to follow."""
        return self if self._marks else contextlib.nullcontext()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside belongs to the observer, not to the model."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Operators behind which padding could not be told from tokens."""
        return tuple(
            Diagnostic(name, f"padding could not be followed through it ({count} times): all rows behind it count as tokens")
            for name, count in self._lost.items()
        )

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.follow(func, args, kwargs, result)
        return result

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """An operator ran: mark what its result has of padding."""
        if self._marks and not self._is_paused:
            named = _named(func, args, kwargs)
            if any(self._mark_of(leaf) is not None for leaf in _tensors(named.values())):
                self._follow(func, named, result)

    def _follow(self, func: Any, named: dict[str, Any], result: Any) -> None:
        self._steps += 1
        if self._steps % _PURGE_EVERY == 0:
            self._marks = {key: mark for key, mark in self._marks.items() if mark.is_alive()}
        name = func._schema.name.partition("::")[2]
        try:
            if func._schema.is_mutable:
                self._follow_write(func, name.removesuffix("_"), named)
            elif name not in CONTENT_FREE:
                self._follow_result(func, name, named, result)
        except (RuntimeError, IndexError, TypeError, NotImplementedError):
            self._lose(name)

    def _follow_write(self, func: Any, name: str, named: dict[str, Any]) -> None:
        target = named.get("self")
        if not isinstance(target, Tensor) or target.dtype == torch.bool:
            return
        if name in _MOVES:
            if self._read(target) is None:
                self._write(target, torch.zeros((), dtype=torch.bool, device=target.device))
            func(**{key: self._moved(key, value) for key, value in named.items()})
        elif name in {"zero", "fill"}:
            self._write(target, torch.zeros((), dtype=torch.bool, device=target.device))
        else:
            self._write(target, self._any_of(named, target.shape))

    def _follow_result(self, func: Any, name: str, named: dict[str, Any], result: Any) -> None:
        shared = {leaf.untyped_storage()._cdata for leaf in _tensors(named.values())}
        fresh = [
            (index, leaf)
            for index, leaf in enumerate(_tensors([result]))
            if leaf.dtype != torch.bool and leaf.untyped_storage()._cdata not in shared and leaf.numel()
        ]
        if not fresh:
            return
        if name in _MOVES:
            moved = list(_tensors([func(**{key: self._moved(key, value) for key, value in named.items()})]))
            for index, leaf in fresh:
                self._write(leaf, moved[index])
            return
        for index, leaf in fresh:
            mark = self._result_mark(name, named, leaf)
            if mark is not None:
                self._write(leaf, mark)
            elif index == 0:
                self._lose(name)

    def _result_mark(self, name: str, named: dict[str, Any], result: Tensor) -> Tensor | None:
        """Marks of one result, broadcastable to its sizes; None when no rule fits."""
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, named)
        operands = [leaf for leaf in _tensors(named.values()) if self._read(leaf) is not None]
        if all(_broadcasts(leaf.shape, result.shape) for leaf in operands):
            return self._any_of(named, result.shape)
        mark = self._require(operands[0])
        if "dim" in named:
            dims = named["dim"]
            if dims is None or dims == []:
                return torch.zeros((), dtype=torch.bool, device=mark.device)
            return _all_over(mark, dims, bool(named.get("keepdim", False)))
        if name in {"reshape", "flatten", "contiguous", "clone", "_reshape_copy"}:
            return mark.reshape(result.shape)
        if mark.ndim == result.ndim and mark.shape[:-1] == result.shape[:-1]:
            return mark.all(-1, keepdim=True)
        if (
            mark.ndim == result.ndim
            and mark.ndim > 2
            and mark.shape[2:] == result.shape[2:]
            and mark.shape[0] == result.shape[0]
        ):
            return mark.all(1, keepdim=True)
        return None

    def _any_of(self, named: dict[str, Any], shape: torch.Size) -> Tensor:
        """Elementwise: marked where any operand is."""
        found = torch.zeros((), dtype=torch.bool)
        for leaf in _tensors(named.values()):
            mark = self._read(leaf)
            if mark is not None and _broadcasts(leaf.shape, shape):
                found = mark if found.ndim == 0 else found | mark
        return found

    def _moved(self, key: str, value: Any) -> Any:
        """An argument of a moving operator, with marks in place of elements."""
        if key not in _CONTENT:
            return value
        if isinstance(value, Tensor):
            return self._require(value)
        if isinstance(value, (list, tuple)):
            return [self._require(item) if isinstance(item, Tensor) else item for item in value]
        return False if isinstance(value, (int, float)) else value

    def _require(self, tensor: Tensor) -> Tensor:
        mark = self._read(tensor)
        return torch.zeros((), dtype=torch.bool, device=tensor.device).expand(tensor.shape) if mark is None else mark

    def _mark_of(self, tensor: Tensor) -> _Mark | None:
        return self._marks.get(tensor.untyped_storage()._cdata)

    def _read(self, tensor: Tensor) -> Tensor | None:
        """Marks of a tensor in its own sizes and strides; None without any."""
        mark = self._mark_of(tensor)
        if mark is None or mark.itemsize != tensor.element_size():
            return None
        return torch.as_strided(mark.bits, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _write(self, tensor: Tensor, marks: Tensor) -> None:
        storage = tensor.untyped_storage()
        if self._mark_of(tensor) is None:
            bits = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=torch.bool, device=tensor.device)
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._marks[storage._cdata] = _Mark(reference, bits, tensor.element_size())
        place = self._read(tensor)
        if place is not None:
            place.copy_(marks.expand(tensor.shape))

    def _lose(self, name: str) -> None:
        self._lost[name] = self._lost.get(name, 0) + 1

    def rows(self, tensor: Any, dim: int = -1) -> Tensor | None:
        """Marks of the rows of an operand whose dimension ``dim`` is summed, that dimension kept with size one."""
        if not isinstance(tensor, Tensor):
            return None
        return self._require(tensor).all(dim, keepdim=True)


def _named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**{item.name: value for item, value in zip(func._schema.arguments, args, strict=False)}, **kwargs}


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    return len(shape) <= len(onto) and all(old in (1, new) for old, new in zip(reversed(shape), reversed(onto), strict=False))


def _all_over(mark: Tensor, dims: Any, keepdim: bool) -> Tensor:
    listed = [dims] if isinstance(dims, int) else list(dims)
    for dim in sorted((dim % mark.ndim for dim in listed), reverse=True):
        mark = mark.all(dim, keepdim=keepdim)
    return mark


def _product(tracker: PaddingTracker, first: Any, second: Any) -> Tensor | None:
    if first.ndim < 2 or second.ndim < 2:
        return None
    rows, columns = tracker.rows(first, -1), tracker.rows(second, -2)
    assert rows is not None
    assert columns is not None
    return rows | columns


def _embedding(tracker: PaddingTracker, named: dict[str, Any]) -> Tensor | None:
    return tracker._require(named["indices"]).unsqueeze(-1)


def _attention(tracker: PaddingTracker, named: dict[str, Any]) -> Tensor | None:
    return tracker.rows(named["query"])


def _einsum(tracker: PaddingTracker, named: dict[str, Any]) -> Tensor | None:
    terms, _, result = named["equation"].replace(" ", "").partition("->")
    if "." in terms or not result:
        return None
    found: Tensor | None = None
    for letters, tensor in zip(terms.split(","), named["tensors"], strict=True):
        mark = tracker._require(tensor)
        summed = [index for index, letter in enumerate(letters) if letter not in result]
        mark = _all_over(mark, summed, keepdim=False)
        left = [letter for letter in letters if letter in result]
        mark = mark.permute(sorted(range(len(left)), key=lambda index: result.index(left[index])))
        mark = mark[tuple(slice(None) if letter in left else None for letter in result)]
        found = mark if found is None else found | mark
    return found


_Rule = Callable[[PaddingTracker, dict[str, Any]], Tensor | None]

_RULES: dict[str, _Rule] = {
    "linear": lambda tracker, named: tracker.rows(named["input"]),
    "matmul": lambda tracker, named: _product(tracker, named["self"], named["other"]),
    "mm": lambda tracker, named: _product(tracker, named["self"], named["mat2"]),
    "bmm": lambda tracker, named: _product(tracker, named["self"], named["mat2"]),
    "addmm": lambda tracker, named: _product(tracker, named["mat1"], named["mat2"]),
    "baddbmm": lambda tracker, named: _product(tracker, named["batch1"], named["batch2"]),
    "einsum": _einsum,
    "embedding": _embedding,
    **dict.fromkeys(SOFTMAX_ATTENTION, _attention),
}
"""Operators that sum over a dimension of their operands, and look-ups."""
