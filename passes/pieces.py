"""Numbers that are read piece by piece, in threads: what is ranked is never held in full.

A piece fits the cache of a core together with what is made of it, so that a number is fetched from memory once however much
is computed from it. Pieces follow from the shape alone: what is computed of them, in their order, is the same for every
number of threads and every memory layout.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from math import ceil, prod
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 1 << 18
"""Most numbers of a piece: small enough for the cache, and large enough that a thread computes for longer than it takes to
hand the interpreter over to another one."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Piece(NamedTuple):
    """Some whole rows of a matrix, or a part of one row: numbers [start, stop) of it, read row by row."""

    start: int
    stop: int
    rows: slice
    columns: slice


class Values(Protocol):
    """Float32 numbers in a fixed order that are computed when they are read.

    Attributes:
        shape: their shape; the order is that of flat indices.
        is_signed: False where none is negative.
    """

    shape: tuple[int, ...]
    is_signed: bool

    def pieces(self) -> list[Piece]:
        """All numbers, in order."""
        ...

    def read(self, piece: Piece, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """The numbers of a piece, flat: in the first places of ``out``, or a view that must not be written to."""
        ...

    def at(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The numbers at these flat indices: the same to the bit that ``read`` gives."""
        ...


class StoredValues:
    """The numbers of a tensor as float32, in any shape, float dtype and memory layout; no copy of the whole is made.

    Only a tensor of three or more dimensions whose strides allow no flat view is copied, and one of a dtype unknown to NumPy.
    """

    is_signed = True

    def __init__(self, tensor: Tensor, *, by_rows: bool = False) -> None:
        """Read a tensor; ``by_rows`` keeps the rows of a matrix apart, where flat pieces would do as well."""
        tensor = tensor.detach().cpu()
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        is_matrix = tensor.ndim == 2 and (by_rows or not tensor.is_contiguous())
        self._stored = _array(tensor if is_matrix else tensor.reshape(1, -1))

    def pieces(self) -> list[Piece]:
        """All numbers, in order."""
        return pieces_of(*self._stored.shape)

    def read(self, piece: Piece, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """The numbers of a piece; of contiguous float32 a view."""
        part = self._stored[piece.rows, piece.columns]
        if part.dtype == np.float32 and part.flags.c_contiguous:
            return part.reshape(-1)
        return self._converted(part, out)

    def at(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The numbers at these flat indices."""
        found = self._stored[self._rows_and_columns(places)]
        return self._converted(found.reshape(1, -1), np.empty(found.size, np.float32))

    def _rows_and_columns(self, places: NDArray[np.int64]) -> tuple[Any, Any]:
        height, width = self._stored.shape
        return (0, places) if height == 1 else np.divmod(places, width)

    @staticmethod
    def _converted(part: NDArray[Any], out: NDArray[np.float32]) -> NDArray[np.float32]:
        flat = out[: part.size]
        target = flat.reshape(part.shape)
        if part.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            bits = target.view(np.uint32)
            np.copyto(bits, part)
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(target, part, casting="same_kind")
        return flat


class Magnitudes(StoredValues):
    """|w| of a tensor, as float32."""

    is_signed = False

    def read(self, piece: Piece, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """The magnitudes of a piece, in ``out``."""
        part = self._stored[piece.rows, piece.columns]
        if part.dtype == np.float32:
            flat = out[: part.size]
            np.abs(part, out=flat.reshape(part.shape))
            return flat
        flat = self._converted(part, out)
        return np.abs(flat, out=flat)

    def at(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """The magnitudes at these flat indices."""
        return np.abs(super().at(places))


def _array(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor as NumPy sees it; bfloat16 as its 16 bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    array: NDArray[Any] = tensor.numpy()
    return array


def pieces_of(rows: int, columns: int) -> list[Piece]:
    """The pieces of a (rows, columns) matrix in the order of flat indices, of nearly equal size.

    Where the columns allow it they begin at multiples of eight, as bytes of packed bits do.
    """
    if not rows * columns:
        return []
    if columns >= PIECE:
        width = _even(columns, PIECE)
        ends = [(left, min(left + width, columns)) for left in range(0, columns, width)]
        return [
            Piece(row * columns + left, row * columns + right, slice(row, row + 1), slice(left, right))
            for row in range(rows)
            for left, right in ends
        ]
    height = _even(rows, PIECE // columns)
    return [
        Piece(top * columns, bottom * columns, slice(top, bottom), slice(0, columns))
        for top, bottom in ((top, min(top + height, rows)) for top in range(0, rows, height))
    ]


def _even(count: int, most: int) -> int:
    """The size of nearly equal parts, at most ``most`` each; a multiple of eight unless ``most`` is smaller."""
    unit = 8 if most >= 8 else 1
    parts = ceil(count / (most - most % unit))
    return ceil(count / parts / unit) * unit


def count_of(values: Values) -> int:
    """How many numbers there are."""
    return prod(values.shape)


class Scratch(threading.local):
    """Memory of a thread that is used again for every piece: to get new pages from the system costs more than the work.

    Attributes:
        is_shared_out: the thread is working on what ``spread`` shared out.
    """

    def __init__(self) -> None:
        self.is_shared_out = False
        self._numbers = np.empty(0, np.float32)
        self._marks = (np.empty(0, bool), np.empty(0, bool))

    @property
    def numbers(self) -> NDArray[np.float32]:
        """Place for the float32 numbers of a piece."""
        if self._numbers.size < PIECE:
            self._numbers = np.empty(PIECE, np.float32)
        return self._numbers

    @property
    def marks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Two places for marks of a piece."""
        if self._marks[0].size < PIECE:
            self._marks = (np.empty(PIECE, bool), np.empty(PIECE, bool))
        return self._marks


scratch = Scratch()


def spread(work: Callable[[Iterator[Item]], Result], items: Iterable[Item]) -> list[Result]:
    """Share out items among as many threads as torch may use; NumPy lets go of the interpreter while it computes.

    To wake a thread costs as much as a large piece, so share out much at a time: what ``work`` itself spreads is done by
    the thread it is in.

    Args:
        work: takes items until there are none left; called once in each thread.
        items: what there is to do. An iterator is asked for the next item by one thread at a time, when it is needed.

    Returns:
        What ``work`` returned in every thread, in no order that means something.
    """
    threads = 1 if scratch.is_shared_out else torch.get_num_threads()
    if isinstance(items, Sequence):
        threads = min(threads, len(items))
    if threads < 2:
        with np.errstate(all="ignore"):  # NaN and infinities are looked for, not warned of
            return [work(iter(items))]
    queue = _InTurn(items)
    has_gradients = torch.is_grad_enabled()

    def run() -> Result:
        scratch.is_shared_out = True
        try:
            with np.errstate(all="ignore"), torch.set_grad_enabled(has_gradients):
                return work(queue)
        finally:
            scratch.is_shared_out = False

    others = [_pool(threads - 1).submit(run) for _ in range(threads - 1)]
    try:
        own = run()
    finally:
        wait(others)
    return [own, *(other.result() for other in others)]


class _InTurn(Iterator[Item]):
    """An iterator for several threads; when it fails, it fails once, and is at its end for the others."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items, self._lock = iter(items), threading.Lock()

    def __next__(self) -> Item:
        with self._lock:
            return next(self._items)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mfcompile-pieces")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a forked process
