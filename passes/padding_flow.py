"""Padding followed through a running model: which rows of which activation come from padding tokens.

Every operator that reads a marked tensor marks its result. A mark is one bool per element (or per row of
elements), kept per storage, so that views and writes through views need no rule of their own. Marks in hand are thin:
of size one in dimensions along which they do not differ. The rules:

* what only moves elements (cat, index, masked_scatter, ...) moves their marks in the same way;
* elementwise operators mark what any operand marks: a padding token plus a position, or put to zero, is still padding;
* reductions, and the summed dimension of a product, mark what is padding throughout: a mean over tokens is none, a
  linear layer keeps the rows of its input, and an attention has the rows of its queries, not of its keys.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.graph import Diagnostic
from mfcompile.passes.operators import CONTENT_FREE, SOFTMAX_ATTENTION
from mfcompile.passes.padding import PaddingMask
from mfcompile.passes.padding_marks import Mark, all_over, broadcasts, by_chunk, carried, no_mark, tensors_in

_MOVES = frozenset(
    {
        "cat", "concat", "concatenate", "stack", "hstack", "vstack", "index", "_unsafe_index", "index_select", "gather",
        "take_along_dim", "masked_select", "repeat", "tile", "repeat_interleave", "roll", "flip", "constant_pad_nd", "pad",
        "unfold", "masked_scatter", "index_put", "_index_put_impl", "scatter", "scatter_add", "slice_scatter",
        "select_scatter", "index_copy", "index_add", "copy", "split_with_sizes_copy", "unbind_copy", "tril", "triu",
    }
)  # fmt: skip
"""Operators whose result holds elements of their operands in other places."""

_CONTENT = frozenset({"self", "tensors", "input", "src", "source", "values", "value", "other"})
"""Schema names of the arguments that hold elements; the others say where."""

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Classes of tensors that compute without Python."""

_PURGE_EVERY = 256


class PaddingTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Follows padding while a module or a graph runs inside it. Not thread-safe.

    Args:
        masks: the padding masks of the model.
    """

    def __init__(self, masks: Iterable[PaddingMask]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._masks = tuple(masks)
        self._marks: dict[int, Mark] = {}
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

    def keep(self, activation: Tensor, features: tuple[int, ...]) -> Tensor | None:
        """Which rows of an activation are tokens.

        Args:
            activation: (..., in_features), or with the features at ``features``.
            features: dimensions counted from the end.

        Returns:
            bool, sizes of the activation without the features; None when no row is padding.
        """
        mark = self._read(activation)
        if mark is None:
            return None
        padding = all_over(mark, features, keepdim=False)
        if not bool(padding.any()):
            return None
        dims = {dim % activation.ndim for dim in features}
        return ~padding.expand([size for dim, size in enumerate(activation.shape) if dim not in dims])

    def following(self) -> contextlib.AbstractContextManager[Any]:
        """Follow what runs inside, where there is padding to follow."""
        return self if self._marks else contextlib.nullcontext()

    @contextlib.contextmanager
    def paused(self, *operands: Tensor | None) -> Iterator[None]:
        """What runs inside belongs to the observer, not to the model.

        Args:
            operands: the tensors of the model that it reads; where they are plain ones, no mode sees what is done to them.
        """
        before, self._is_paused = self._is_paused, True
        is_plain = all(operand is None or type(operand) in _PLAIN for operand in operands)
        try:
            with torch._C._DisableTorchDispatch() if is_plain else contextlib.nullcontext():
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
        if not self._marks or self._is_paused:
            return
        leaves = [(leaf, leaf.untyped_storage()._cdata) for leaf in tensors_in((*args, *kwargs.values()))]
        marked = [(leaf, self._marks[address]) for leaf, address in leaves if address in self._marks]
        if not marked:
            return
        facts = _facts(func)
        if facts.keeps_rows and isinstance(result, Tensor) and result.dtype != torch.bool:
            address = result.untyped_storage()._cdata
            if any(other == address for _, other in leaves):
                return  # a view has the marks of what it views
            only = leaves[0][0] if facts.name == "linear" else None
            mark = carried(marked, result, only) if address not in self._marks else None
            if mark is not None:
                self._marks[address] = mark
                self._purge()
                return
        self._follow(func, _named(func, args, kwargs), result)

    def _purge(self) -> None:
        self._steps += 1
        if self._steps % _PURGE_EVERY == 0:
            self._marks = {key: mark for key, mark in self._marks.items() if mark.is_alive()}

    def _follow(self, func: Any, named: dict[str, Any], result: Any) -> None:
        self._purge()
        facts = _facts(func)
        name = facts.name
        try:
            if facts.is_mutable:
                self._follow_write(func, name.removesuffix("_"), named)
            elif name not in CONTENT_FREE and not (name == "where" and "self" not in named):  # where(mask): places alone
                self._follow_result(func, name, named, result)
        except (RuntimeError, IndexError, TypeError, NotImplementedError):
            self._lose(name)

    def _follow_write(self, func: Any, name: str, named: dict[str, Any]) -> None:
        target = named.get("self")
        if not isinstance(target, Tensor) or target.dtype == torch.bool:
            return
        if name in _MOVES:
            func(**{key: self._moved(key, value) for key, value in named.items()} | {"self": self._place(target)})
        elif name in {"zero", "fill"}:
            self._write(target, no_mark(target.device))
        else:
            self._write(target, self._any_of(named, target.shape))

    def _follow_result(self, func: Any, name: str, named: dict[str, Any], result: Any) -> None:
        shared = {leaf.untyped_storage()._cdata for leaf in tensors_in(named.values())}
        fresh = [
            (index, leaf)
            for index, leaf in enumerate(tensors_in([result]))
            if leaf.dtype != torch.bool and leaf.untyped_storage()._cdata not in shared and leaf.numel()
        ]
        if not fresh:
            return
        if name in _MOVES:
            moved = list(tensors_in([func(**{key: self._moved(key, value) for key, value in named.items()})]))
            for index, leaf in fresh:
                bits = moved[index]
                is_by_row = bits.ndim > 1 and bool((bits == bits[..., :1]).all())
                self._write(leaf, bits[..., :1] if is_by_row else bits)
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
        operands = [leaf for leaf in tensors_in(named.values()) if self._read(leaf) is not None]
        if all(broadcasts(leaf.shape, result.shape) for leaf in operands):
            return self._any_of(named, result.shape)
        mark, sizes = self._require(operands[0]), operands[0].shape
        if "dim" in named:
            dims = named["dim"]
            if dims is None or dims == []:
                return no_mark(mark.device)
            return all_over(mark, dims, bool(named.get("keepdim", False)))
        if name in {"reshape", "flatten", "contiguous", "clone", "_reshape_copy"}:
            return mark.expand(sizes).reshape(result.shape)
        if sizes[:-1] == result.shape[:-1]:
            return mark.all(-1, keepdim=True)
        if len(sizes) > 2 and sizes[:1] == result.shape[:1] and sizes[2:] == result.shape[2:]:
            return mark.all(1, keepdim=True)
        return None

    def _any_of(self, named: dict[str, Any], shape: torch.Size) -> Tensor:
        """Elementwise: marked where any operand is."""
        found: Tensor | None = None
        for leaf in tensors_in(named.values()):
            mark = self._read(leaf)
            if mark is not None and broadcasts(leaf.shape, shape):
                found = mark if found is None else found | mark
        return no_mark(torch.device("cpu")) if found is None else found

    def _moved(self, key: str, value: Any) -> Any:
        """An argument of a moving operator, with marks in place of elements."""
        if key not in _CONTENT:
            return value
        if isinstance(value, Tensor):
            return self._require(value).expand(value.shape)
        if isinstance(value, (list, tuple)):
            return [self._require(item).expand(item.shape) if isinstance(item, Tensor) else item for item in value]
        return False if isinstance(value, (int, float)) else value

    def _require(self, tensor: Tensor) -> Tensor:
        """Thin marks of a tensor, all False where it has none."""
        mark = self._read(tensor)
        return no_mark(tensor.device).reshape([1] * tensor.ndim) if mark is None else mark

    def _mark_of(self, tensor: Tensor) -> Mark | None:
        return self._marks.get(tensor.untyped_storage()._cdata)

    def _read(self, tensor: Tensor) -> Tensor | None:
        """Thin marks of a tensor; None without any."""
        mark = self._mark_of(tensor)
        if mark is None or mark.itemsize != tensor.element_size():
            return None
        strides, inside = [], int(tensor.storage_offset()) % mark.chunk
        for size, step in zip(tensor.shape, tensor.stride(), strict=True):
            strides.append(0 if step % mark.chunk else step // mark.chunk)
            inside += (size - 1) * step if step % mark.chunk else 0
        if inside >= mark.chunk:
            self._spread(tensor, mark)
            return self._read(tensor)
        sizes = [size if step else 1 for size, step in zip(tensor.shape, strides, strict=True)]
        return torch.as_strided(mark.bits, sizes, strides, int(tensor.storage_offset()) // mark.chunk)

    def _spread(self, tensor: Tensor, mark: Mark) -> None:
        """From now on the storage has a bit for every element."""
        bits = mark.bits.repeat_interleave(mark.chunk)
        self._marks[tensor.untyped_storage()._cdata] = replace(mark, bits=bits, chunk=1)

    def _write(self, tensor: Tensor, marks: Tensor) -> None:
        """Mark the elements of a tensor.

        Args:
            tensor: a result, or what was written to.
            marks: broadcastable to its sizes.
        """
        storage = tensor.untyped_storage()
        mark = self._mark_of(tensor)
        if mark is None:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            bits, chunk = by_chunk(tensor, marks, storage.nbytes() // tensor.element_size())
            self._marks[storage._cdata] = Mark(reference, bits, chunk, tensor.element_size())
            return
        self._place(tensor).copy_(marks.expand(tensor.shape))

    def _place(self, tensor: Tensor) -> Tensor:
        """Marks of a tensor to write into: one of its own for every element."""
        mark = self._mark_of(tensor)
        if mark is None:
            self._write(tensor, no_mark(tensor.device))
            mark = self._marks[tensor.untyped_storage()._cdata]
        if mark.chunk > 1:
            self._spread(tensor, mark)
            mark = self._marks[tensor.untyped_storage()._cdata]
        return torch.as_strided(mark.bits, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _lose(self, name: str) -> None:
        self._lost[name] = self._lost.get(name, 0) + 1

    def rows(self, tensor: Any, dim: int = -1) -> Tensor | None:
        """Marks of the rows of an operand whose dimension ``dim`` is summed, that dimension kept with size one."""
        if not isinstance(tensor, Tensor):
            return None
        return self._require(tensor).all(dim, keepdim=True)


@dataclass(frozen=True)
class _Facts:
    """What is asked of an operator at every call.

    Attributes:
        name: without namespace and overload.
        is_mutable: it writes into an argument.
        arguments: names of its arguments.
        keeps_rows: it computes row by row, as far as marks go, where operands and result have the same rows.
    """

    name: str
    is_mutable: bool
    arguments: tuple[str, ...]
    keeps_rows: bool


@functools.cache
def _facts(func: Any) -> _Facts:
    schema = func._schema
    name = schema.name.partition("::")[2]
    has_rule = name in _MOVES or name in CONTENT_FREE or name == "where" or (name in _RULES and name != "linear")
    return _Facts(name, schema.is_mutable, tuple(item.name for item in schema.arguments), not (schema.is_mutable or has_rule))


def _named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_facts(func).arguments, args, strict=False)), **kwargs}


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
        mark = all_over(mark, summed, keepdim=False)
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
    "_grouped_mm": lambda tracker, named: tracker.rows(named["self"]),
    "topk": lambda tracker, named: tracker.rows(named["self"], named.get("dim", -1)),
    "one_hot": lambda tracker, named: tracker._require(named["self"]).unsqueeze(-1),
    "einsum": _einsum,
    "embedding": _embedding,
    **dict.fromkeys(SOFTMAX_ATTENTION, _attention),
}
"""Operators that sum over a dimension of their operands, and look-ups."""
