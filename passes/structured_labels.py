"""Labels on the positions of tensors: which positions belong to one removable element, and how labels move with operators.

A label is the number of an element; NONE marks a position that belongs to no element. Labels of a tensor are an integer
array of its rank, of size one along every axis that they do not depend on. Elements that turn out to be inseparable are
merged in a ``Partition``; arrays keep the old numbers and are read through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]

NONE = -1


class Partition:
    """Elements that cannot be separated from each other, merged as that becomes known.

    Args:
        count: elements at first, 0 to count - 1, each alone.
    """

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count, dtype=np.int64)
        self.count = count

    @property
    def size(self) -> int:
        """Elements at first."""
        return len(self._parents)

    def roots(self, labels: Labels) -> Labels:
        """The labels, one number for all elements that are merged; NONE stays."""
        parents = self._parents
        while True:
            above = parents[parents]
            if np.array_equal(above, parents):
                break
            parents = above
        self._parents = parents
        return np.where(labels >= 0, parents[np.maximum(labels, 0)], NONE)

    def merge(self, first: Labels, second: Labels) -> None:
        """Merge elements pairwise; arrays of one shape, pairs with NONE are left out."""
        first, second = self.roots(first), self.roots(second)
        both = (first >= 0) & (second >= 0) & (first != second)
        for one, other in np.unique(np.stack([first[both], second[both]], axis=1), axis=0):
            low, high = sorted((self._find(int(one)), self._find(int(other))))
            if low != high:
                self._parents[high] = low
                self.count -= 1

    def merge_along(self, labels: Labels, axes: Sequence[int]) -> Labels:
        """Merge all elements that differ only along some axes, and give the labels without these axes (of size one)."""
        for axis in axes:
            labels = self.roots(labels)
            lead = labels.max(axis=axis, keepdims=True)  # any of them that is no NONE
            self.merge(np.broadcast_to(lead, labels.shape).reshape(-1), labels.reshape(-1))
            labels = self.roots(labels).max(axis=axis, keepdims=True)
        return labels

    def reduce(self, labels: Labels) -> Labels:
        """The labels with every axis of size one along which they do not change."""
        labels = self.roots(labels)
        for axis in range(labels.ndim):
            if labels.shape[axis] > 1:
                first = labels.take([0], axis=axis)
                if (labels == first).all():
                    labels = first
        return labels

    def _find(self, element: int) -> int:
        while self._parents[element] != element:
            element = int(self._parents[element])
        return element


def dependent_axes(labels: Labels) -> list[int]:
    """Axes along which labels change."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def labels_in_view(labels: Labels, before: Sequence[int], after: Sequence[int]) -> Labels | None:
    """Labels of a view of other sizes: a view keeps the order of elements, so that positions are only counted otherwise.

    Args:
        labels: of a tensor of sizes ``before``.
        before, after: sizes, all of them numbers.

    Returns:
        Of rank ``len(after)``, of size one along axes that are out of reach; None where the sizes do not match.
    """
    wanted = set(dependent_axes(labels))
    full: list[int] = []
    given: list[int] = []
    made: list[int] = []
    for sources, results in _segments(before, after) or ([], []):
        is_used = bool(wanted & set(sources))
        full += [before[axis] if is_used else 1 for axis in sources]
        given += [labels.shape[axis] for axis in sources]
        made += [after[axis] if is_used else 1 for axis in results]
    if len(full) != len(before) or len(made) != len(after):
        return None
    return np.broadcast_to(labels.reshape(given), full).reshape(made)


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Runs of axes that hold the same elements before and after a view, as short as can be."""
    if prod(before) != prod(after) or not prod(before):
        return None
    found: list[tuple[list[int], list[int]]] = []
    left, right = 0, 0
    while left < len(before) or right < len(after):
        sources: list[int] = []
        results: list[int] = []
        one = other = 1
        while True:
            if one == other and (sources or results) and one > 1:
                break
            if one <= other and left < len(before):
                one *= before[left]
                sources.append(left)
                left += 1
            elif right < len(after):
                other *= after[right]
                results.append(right)
                right += 1
            elif left < len(before):
                one *= before[left]
                sources.append(left)
                left += 1
            else:
                break
        found.append((sources, results))
    return found
