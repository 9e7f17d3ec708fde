"""Exact selection of the smallest values of many tensors, without a sort and without joining them.

A sample of all values gives two bounds that the k-th smallest lies between almost surely. One pass over the values counts
what is below, and keeps the few in between, among which the k-th is found. The sample decides how fast this is and never
what comes out: where the bounds miss, histograms over the bits find the value. Ties are broken by position: the lower flat
index goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.passes.bounds import bounds_of, sample_of
from mfcompile.passes.histograms import kth_by_histograms
from mfcompile.passes.pieces import Magnitudes, Piece, StoredValues, Values, count_of, scratch, spread

_MOST_BETWEEN = 8
"""Where more than one in so many lies between the bounds, places are not kept: they take four bytes each."""


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest value of a group of tensors.

    Attributes:
        value: the value; a magnitude where magnitudes were ranked.
        below: per tensor, how many values are smaller.
        ties: per tensor, how many equal it.
    """

    value: float
    below: tuple[int, ...]
    ties: tuple[int, ...]

    def pruned_counts(self, k: int) -> tuple[int, ...]:
        """Per tensor, how many of the k smallest lie in it; ties go to earlier tensors first."""
        left = k - sum(self.below)
        counts = []
        for below, ties in zip(self.below, self.ties, strict=True):
            taken = min(ties, left)
            left -= taken
            counts.append(below + taken)
        return tuple(counts)


def magnitude_threshold(tensors: Sequence[Callable[[], Tensor]], k: int, names: Sequence[str]) -> Threshold:
    """The k-th smallest magnitude (1-based) over several tensors.

    Args:
        tensors: one function per tensor that gives it, any shape and float dtype; called once per pass, so that
            tensors may be loaded or computed when they are needed. There are two passes, seldom four.
        k: 1 <= k <= number of all values.
        names: what the tensors are called, for messages.

    Returns:
        The threshold with the counts of every tensor.

    Raises:
        InputError: a value is NaN or infinite (names the tensor), or k is out of range.
    """
    return _threshold([_deferred(tensor, Magnitudes) for tensor in tensors], k, names)


def score_threshold(tensors: Sequence[Callable[[], Tensor | Values]], k: int, names: Sequence[str]) -> Threshold:
    """The k-th smallest value (1-based) over several tensors of any sign; otherwise like ``magnitude_threshold``."""
    return _threshold([_deferred(tensor, StoredValues) for tensor in tensors], k, names)


def _deferred(tensor: Callable[[], Tensor | Values], kind: type[StoredValues]) -> Callable[[], Values]:
    def make() -> Values:
        given = tensor()
        return kind(given) if isinstance(given, Tensor) else given

    return make


def smallest(scores: Tensor | Values, k: int) -> Tensor:
    """Mark exactly the k smallest scores; among equal scores the lower flat index first. Eq. 8 of MULTIFLOW (CVPR 2024).

    Args:
        scores: any shape and sign, ranked as float32; infinities have their place in the order.
        k: 0 <= k <= number of scores.

    Returns:
        bool tensor of the same shape, True at the k smallest.

    Raises:
        InputError: a score is NaN.
    """
    return _marked(scores, k, take_ties=False)


def at_most(scores: Tensor | Values, k: int) -> Tensor:
    """Mark every score that is not above the k-th smallest (ties are all marked); none when k < 1.

    The rule of the published code; ``smallest`` is the exact one.
    """
    return _marked(scores, k, take_ties=True)


def kept_bits(scores: Tensor | Values, k: int, *, take_ties: bool = False) -> NDArray[np.uint8]:
    """What ``smallest`` (with ``take_ties``, ``at_most``) leaves unmarked, as bits; no byte per score is needed for it.

    Args:
        scores: n of them, in any shape.
        k: 0 <= k <= n.
        take_ties: mark all that equal the k-th smallest.

    Returns:
        (ceil(n / 8),) as numpy.packbits has them, in the order of flat indices: 1 = not among the smallest.

    Raises:
        InputError: a score is NaN.
    """
    values = _values(scores)
    if any(piece.start % 8 for piece in values.pieces()):
        return np.packbits(~_marked(values, k, take_ties=take_ties).numpy().reshape(-1))
    bits = np.empty((count_of(values) + 7) // 8, np.uint8)
    if 0 < k < count_of(values) and _pack_in_one_pass(values, k, bits, take_ties=take_ties):
        return bits

    def store(piece: Piece, marks: NDArray[np.bool_]) -> None:
        bits[_bytes_of(piece)] = np.packbits(np.logical_not(marks, out=marks))

    _mark(values, k, store, take_ties=take_ties)
    return bits


def _pack_in_one_pass(values: Values, k: int, bits: NDArray[np.uint8], *, take_ties: bool) -> bool:
    """Write the bits while values are counted, and correct those between the bounds once the k-th smallest is known.

    Returns:
        Whether the bits are right: not where the bounds miss, or where so many values lie between them (most are ties)
        that their places would take more memory than marks do.
    """
    sample, _ = sample_of([lambda: values], k)
    low, high = bounds_of(sample, k / count_of(values))

    def count(queue: Iterator[Piece]) -> list[tuple[Piece, _Counts, NDArray[np.int32], NDArray[np.float32]]]:
        found = []
        for piece in queue:
            counts, under, places, inside = _look(values, piece, low, high, may_be_infinite=True)
            bits[_bytes_of(piece)] = np.packbits(np.logical_not(under, out=under))
            if places.size > (piece.stop - piece.start) // _MOST_BETWEEN:
                places = places[:0]
                counts.is_sound = False
            found.append((piece, counts, places.astype(np.int32), inside if places.size else inside[:0]))
        return found

    looked = sorted((item for part in spread(count, values.pieces()) for item in part), key=lambda item: item[0].start)
    total = _Counts()
    for _, counts, _, _ in looked:
        total.add(counts)
    threshold = _from_counts([total], low, high, k) if total.is_sound else None
    if threshold is None:
        return False
    limit, left = np.float32(threshold.value), k - threshold.below[0]
    for piece, _, places, inside in looked:
        ties = places[inside == limit] if take_ties else places[inside == limit][:left]
        left -= ties.size
        marks = np.unpackbits(bits[_bytes_of(piece)], count=piece.stop - piece.start)
        marks[places[inside < limit]] = 0
        marks[ties] = 0
        bits[_bytes_of(piece)] = np.packbits(marks)
    return True


def _bytes_of(piece: Piece) -> slice:
    return slice(piece.start // 8, (piece.stop + 7) // 8)


def _values(scores: Tensor | Values) -> Values:
    return StoredValues(scores) if isinstance(scores, Tensor) else scores


def _marked(scores: Tensor | Values, k: int, *, take_ties: bool) -> Tensor:
    values = _values(scores)
    marked = np.empty(count_of(values), bool)

    def store(piece: Piece, marks: NDArray[np.bool_]) -> None:
        marked[piece.start : piece.stop] = marks

    _mark(values, k, store, take_ties=take_ties)
    return torch.from_numpy(marked.reshape(values.shape))


def _mark(values: Values, k: int, store: Callable[[Piece, NDArray[np.bool_]], None], *, take_ties: bool) -> None:
    """Store the marks of the k smallest piece by piece, and once more where ties are taken one by one."""
    count = count_of(values)
    limit, taken, ties = np.float32(np.inf), 0, 0
    if k < 1:
        limit = np.float32(-np.inf)
    elif k < count or (take_ties and count):
        found = _threshold([lambda: values], k, None)
        limit, ties = np.float32(found.value), found.ties[0]
        taken = ties if take_ties else k - found.below[0]
    compare = np.less if k < 1 or taken < ties else np.less_equal

    def mark(queue: Iterator[Piece]) -> None:
        for piece in queue:
            marks = scratch.marks[0][: piece.stop - piece.start]
            store(piece, compare(values.read(piece, scratch.numbers), limit, out=marks))

    parts = values.pieces()
    spread(mark, parts)
    for piece in parts:
        if not 0 < taken < ties:
            break
        numbers = values.read(piece, scratch.numbers)
        chosen = np.flatnonzero(numbers == limit)[:taken]
        marks = np.less(numbers, limit, out=scratch.marks[0][: numbers.size])
        marks[chosen] = True
        store(piece, marks)
        taken -= chosen.size


def _threshold(group: Sequence[Callable[[], Values]], k: int, names: Sequence[str] | None) -> Threshold:
    """The k-th smallest of a group; infinities are refused where there are names to say of what."""
    sample, total = sample_of(group, k)
    if not 1 <= k <= total:
        raise InputError(f"cannot take the {k}-th smallest of {total} values")
    low, high = bounds_of(sample, k / total)
    del sample
    found = _scan(group, low, high, names)
    threshold = _from_counts(found, low, high, k)
    if threshold is None:
        threshold = Threshold(*kth_by_histograms(group, k))
    return threshold


@dataclass
class _Counts:
    """Where the values of one tensor lie.

    Attributes:
        below: how many are under the lower bound.
        at_low: how many equal it.
        between: those that lie between the bounds, in parts.
        at_high: how many equal the upper bound, where that is another value.
        is_sound: all of them can be ranked.
    """

    below: int = 0
    at_low: int = 0
    between: list[NDArray[np.float32]] = field(default_factory=list)
    at_high: int = 0
    is_sound: bool = True

    def add(self, other: _Counts) -> None:
        """Add the counts of other values of the same tensor."""
        self.below += other.below
        self.at_low += other.at_low
        self.between += other.between
        self.at_high += other.at_high
        self.is_sound &= other.is_sound


def _scan(
    group: Sequence[Callable[[], Values]], low: np.float32, high: np.float32, names: Sequence[str] | None
) -> list[_Counts]:
    """Count the values of every tensor under, at and between the bounds; tensors are taken up in turn and let go again."""

    def all_pieces() -> Iterator[tuple[int, Values, Piece]]:
        for index, make in enumerate(group):
            values = make()
            for piece in values.pieces():
                yield index, values, piece

    def count(queue: Iterator[tuple[int, Values, Piece]]) -> list[tuple[int, _Counts]]:
        return [(index, _count_piece(values, piece, low, high, names is None)) for index, values, piece in queue]

    found = [_Counts() for _ in group]
    for counted in spread(count, all_pieces() if len(group) > 1 else list(all_pieces())):
        for index, counts in counted:
            found[index].add(counts)
    broken = next((index for index, counts in enumerate(found) if not counts.is_sound), None)
    if broken is not None:
        _refuse(group[broken](), names[broken] if names else None)
    return found


def _count_piece(values: Values, piece: Piece, low: np.float32, high: np.float32, may_be_infinite: bool) -> _Counts:
    """The counts of a piece."""
    return _look(values, piece, low, high, may_be_infinite=may_be_infinite)[0]


def _look(
    values: Values, piece: Piece, low: np.float32, high: np.float32, *, may_be_infinite: bool
) -> tuple[_Counts, NDArray[np.bool_], NDArray[np.int64], NDArray[np.float32]]:
    """Read a piece: everything in the cache, and in memory that is there already.

    Returns:
        Its counts; marks of what is under the bounds (memory that is used again); places and values of what is not outside.
    """
    numbers = values.read(piece, scratch.numbers)
    under, over = (marks[: numbers.size] for marks in scratch.marks)
    np.less(numbers, low, out=under)
    np.greater(numbers, high, out=over)
    places = np.flatnonzero(np.equal(under, over, out=over))  # neither; a NaN is one of them
    inside = numbers.take(places)
    between = inside[(inside > low) & (inside < high)]
    counts = _Counts(int(np.count_nonzero(under)), int(np.count_nonzero(inside == low)), [between] if between.size else [])
    if high > low:
        counts.at_high = int(np.count_nonzero(inside == high))
    counts.is_sound = counts.at_low + between.size + counts.at_high == inside.size
    if not may_be_infinite:
        counts.is_sound &= bool(np.isfinite(numbers.max())) and not (values.is_signed and np.isinf(numbers.min()))
    return counts, under, places, inside


def _refuse(values: Values, name: str | None) -> None:
    """Say how many values of a tensor cannot be ranked.

    Raises:
        InputError: always.
    """
    with np.errstate(all="ignore"):
        read = (values.read(piece, scratch.numbers) for piece in values.pieces())
        broken = sum(int(np.count_nonzero(np.isnan(part) if name is None else ~np.isfinite(part))) for part in read)
    if name is None:
        raise InputError(f"{broken} of the scores are NaN: they cannot be ranked. Check what computed them")
    raise InputError(f"{name} holds {broken} NaN or infinite values: it cannot be ranked. Check the checkpoint")


def _from_counts(found: Sequence[_Counts], low: np.float32, high: np.float32, k: int) -> Threshold | None:
    """The k-th smallest from counts and the values between the bounds; None where it lies outside of them."""
    below = tuple(counts.below for counts in found)
    not_above_low = tuple(counts.below + counts.at_low for counts in found)
    rank = k - sum(below)
    if rank < 1:
        return None
    if rank <= sum(counts.at_low for counts in found):
        return Threshold(float(low), below, tuple(counts.at_low for counts in found))
    rank = k - sum(not_above_low)
    inner = np.concatenate([np.empty(0, np.float32), *(part for counts in found for part in counts.between)])
    if rank <= inner.size:
        inner.partition(rank - 1)
        value = inner[rank - 1]
        less = (sum(int(np.count_nonzero(part < value)) for part in counts.between) for counts in found)
        ties = tuple(sum(int(np.count_nonzero(part == value)) for part in counts.between) for counts in found)
        return Threshold(float(value), tuple(map(sum, zip(not_above_low, less, strict=True))), ties)
    under_high = tuple(
        known + sum(part.size for part in counts.between) for known, counts in zip(not_above_low, found, strict=True)
    )
    if k - sum(under_high) <= sum(counts.at_high for counts in found):
        return Threshold(float(high), under_high, tuple(counts.at_high for counts in found))
    return None
