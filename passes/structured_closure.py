"""Everything that must be cut with the inputs of one weight: labels spread through a program until nothing is left to tie.

The dependency of parameters on each other is found as in DepGraph (CVPR 2023), by going through the graph in both directions,
but position by position: every position of every tensor is labelled with the removable element that it belongs to. Where
an operator ties positions of different elements, they are one element from then on (grouped queries, channels of one head).
Nothing is compared by size. What computes across elements ends the search with its node and the reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from torch import fx

from mfcompile.passes.operators import operator_name
from mfcompile.passes.program_editor import SCORING
from mfcompile.passes.structured_labels import NONE, Labels, Partition, dependent_axes, labels_in_view
from mfcompile.passes.structured_relations import (
    CREATIONS,
    EXPANSIONS,
    SPLITS,
    Link,
    Relation,
    Unknown,
    View,
    dims,
    relations_of,
)
from mfcompile.passes.token_ties import Group, Rule, Tie

_ACROSS = {
    Tie.STOP: "computes across the elements (a normalisation, a softmax or the like)",
    Tie.REDUCE: "reduces over the elements",
    Tie.READ: "reads elements by their position",
}


class InseparableError(Exception):
    """No element can be removed without changing what the others compute; not an error of the user.

    Attributes:
        node: where.
        reason: why.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name} ({operator_name(node) or node.op}): {reason}")
        self.node = node
        self.reason = reason


class Closure:
    """Labels of every tensor that is cut together with some axes of a start node.

    Args:
        order: position of every node of the graph.
        live: nodes that an output depends on; what others compute does not matter.
        same: placeholders that hold one and the same tensor.
        apart: nodes that are cut where they are read, and left as they are: what they come from is not followed.

    Attributes:
        labels: node -> labels of its tensor.
        beside: (reader, operand) -> labels of the operand, for operands that are cut where they are read.
        elements: the partition of the labels.
        sums: contractions over labelled axes: node -> the operands that have them.
    """

    def __init__(
        self,
        order: Mapping[fx.Node, int],
        live: Collection[fx.Node],
        same: Mapping[fx.Node, frozenset[fx.Node]],
        apart: Collection[fx.Node] = (),
    ) -> None:
        self.order = order
        self.apart = apart
        self.beside: dict[tuple[fx.Node, fx.Node], Labels] = {}
        self.live = live
        self.same = same
        self.labels: dict[fx.Node, Labels] = {}
        self.elements = Partition(0)
        self.sums: dict[fx.Node, set[fx.Node]] = {}
        self._backwards: list[tuple[int, fx.Node]] = []
        self._forwards: list[tuple[int, fx.Node]] = []

    def spread(self, start: fx.Node, axes: tuple[int, ...]) -> None:
        """Label every position of some axes of a node, and whatever is tied to them.

        Raises:
            InseparableError: the positions cannot be removed.
        """
        shape = [size if axis in axes else 1 for axis, size in enumerate(dims(start))]
        count = int(np.prod(shape))
        self.elements = Partition(count)
        self._put(start, start, np.arange(count, dtype=np.int64).reshape(shape))
        while self._backwards or self._forwards:
            is_backwards = bool(self._backwards)
            node = heapq.heappop(self._backwards if is_backwards else self._forwards)[1]
            if is_backwards:
                self._relate(node, node)
                self._check(node)
            else:
                for reader in _readers(node):
                    if reader in self.live:
                        self._relate(node, reader)
                for twin in self.same.get(node, ()):
                    self._put(twin, node, self.labels[node])
        for node, labels in self.labels.items():
            self.labels[node] = self._final(node, labels)
        for key, labels in self.beside.items():
            self.beside[key] = self._final(key[0], labels)

    def _final(self, node: fx.Node, labels: Labels) -> Labels:
        labels = self.elements.reduce(labels)
        axes = dependent_axes(labels)
        if len(axes) > 1:
            places = " and ".join(str(axis) for axis in axes)
            raise InseparableError(
                node,
                f"what goes with an element is a part of it that depends on its axes {places} together, no slice along one of "
                f"them, so that nothing rectangular is left (queries, keys and values of one head packed in a tensor, say)",
            )
        if not axes:
            raise InseparableError(node, "all of it belongs to one element")
        return labels

    def _check(self, node: fx.Node) -> None:
        if self.elements.count < 2:
            raise InseparableError(node, "ties all elements together, so that none can go alone")

    def _put(self, node: fx.Node, origin: fx.Node, labels: Labels) -> None:
        """Join labels to those that a node has."""
        if any(size not in (1, full) for size, full in zip(labels.shape, dims(node), strict=True)):
            raise InseparableError(origin, f"sizes of {node.name} do not fit what is known of them")
        if node.op == "output" or not dependent_axes(labels):
            return
        if node in self.apart and origin not in self.apart:
            self._put_beside(node, origin, labels)
            return
        known = self.labels.get(node)
        if known is not None:
            first, second = np.broadcast_arrays(known, labels)
            self.elements.merge(first, second)
            labels = np.where(first >= 0, first, second)
            known = self.elements.reduce(known)
        labels = self.elements.reduce(labels)
        if known is None or known.shape != labels.shape or not np.array_equal(known >= 0, labels >= 0):
            self.labels[node] = labels
            heapq.heappush(self._backwards, (-self.order[node], node))
            heapq.heappush(self._forwards, (self.order[node], node))

    def _put_beside(self, node: fx.Node, origin: fx.Node, labels: Labels) -> None:
        known = self.beside.get((origin, node))
        if known is not None:
            self.elements.merge(*np.broadcast_arrays(known, labels))
        else:
            self.beside[origin, node] = labels

    def _relate(self, node: fx.Node, applied: fx.Node) -> None:
        """Carry a node's labels over to the other tensors of an operator: its own, or one that reads it."""
        if applied.op == "output":
            raise InseparableError(node, "it is an output of the model")
        for relation in relations_of(applied):  # the one before may have merged elements
            self._carry(node, applied, self.elements.reduce(self.labels[node]), relation)

    def _carry(self, node: fx.Node, applied: fx.Node, labels: Labels, relation: Relation) -> None:
        if isinstance(relation, Unknown):
            raise InseparableError(applied, "the operator has no rule for axes of features")
        if isinstance(relation, View):
            if node not in (relation.source, relation.result):
                raise InseparableError(applied, "a view takes its sizes from this tensor")
            other = relation.result if node is relation.source else relation.source
            self._through_view(node, other, applied, labels)
        elif isinstance(relation, Link):
            self._through_link(node, applied, labels, relation)
        else:
            self._through_rule(node, applied, labels, relation)

    def _through_view(self, node: fx.Node, other: fx.Node, applied: fx.Node, labels: Labels) -> None:
        moved = labels_in_view(labels, dims(node), dims(other))
        if moved is None:
            raise InseparableError(applied, "the view's sizes cannot be matched")
        self._put(other, applied, self.elements.reduce(moved))

    def _through_link(self, node: fx.Node, applied: fx.Node, labels: Labels, link: Link) -> None:
        if node is link.source:
            moved = labels
            if link.moved is not None and labels.shape[link.moved] > 1:
                assert link.positions is not None  # of every link with an axis that moves
                moved = self.elements.reduce(labels.take(link.positions, axis=link.moved))
                if not dependent_axes(moved) and bool((moved >= 0).any()):
                    if SCORING in applied.meta:
                        return
                    raise InseparableError(applied, _ACROSS[Tie.READ])
            self._transfer(applied, moved, dict(link.axes), link.result, dropped=link.moved)
        if node is link.result:
            self._back_through_link(applied, labels, link)

    def _back_through_link(self, applied: fx.Node, labels: Labels, link: Link) -> None:
        back = {result: source for source, result in link.axes if result is not None}
        sizes = dims(link.source)
        ordered = self._aligned(applied, labels, back, sizes)
        if ordered is None:
            return
        if link.moved is None:
            self._put(link.source, applied, ordered)
            return
        assert link.positions is not None
        length = sizes[link.moved]
        full = np.full(
            [length if axis == link.moved else size for axis, size in enumerate(ordered.shape)], NONE, dtype=np.int64
        )
        wanted = [len(link.positions) if axis == link.moved else size for axis, size in enumerate(ordered.shape)]
        spread = np.moveaxis(np.broadcast_to(ordered, wanted), link.moved, 0)
        at_first = np.moveaxis(full, link.moved, 0)  # a view: written to below
        at_first[link.positions] = spread
        self.elements.merge(at_first[link.positions], spread)  # where a position is read more than once
        self._put(link.source, applied, self.elements.reduce(full))

    def _transfer(
        self, applied: fx.Node, labels: Labels, axes: Mapping[int, int | None], other: fx.Node, dropped: int | None = None
    ) -> None:
        if dropped is not None and axes.get(dropped, 0) is None:
            labels = labels.take([0], axis=dropped)  # the one position that is taken
        ordered = self._aligned(applied, labels, {a: b for a, b in axes.items() if b is not None}, dims(other))
        if ordered is not None:
            self._put(other, applied, ordered)

    def _aligned(self, applied: fx.Node, labels: Labels, axes: Mapping[int, int], sizes: tuple[int, ...]) -> Labels | None:
        """Labels over the axes of another tensor; None where it shares none of those that they depend on."""
        depends = dependent_axes(labels)
        shared = [axis for axis in depends if axis in axes and sizes[axes[axis]] != 1]
        if not shared:
            return None
        labels = self.elements.merge_along(labels, [axis for axis in depends if axis not in shared])
        self._check(applied)
        made = np.moveaxis(
            labels.reshape([labels.shape[axis] for axis in shared]),
            range(len(shared)),
            np.argsort(np.argsort([axes[a] for a in shared])),
        )
        shape = [1] * len(sizes)
        for axis in shared:
            shape[axes[axis]] = labels.shape[axis]
        return made.reshape(shape)

    def _through_rule(self, node: fx.Node, applied: fx.Node, labels: Labels, rule: Rule) -> None:
        members = {group: _members(group, applied) for group in rule.groups}
        depends = dependent_axes(labels)
        if all(
            group.tie is Tie.IGNORE for axis in depends for group, listed in members.items() if (node, axis) in listed
        ) and any((node, axis) in listed for axis in depends for listed in members.values()):
            return
        crossed, why = [], Tie.STOP
        for axis in depends:
            ties = {group.tie for group, listed in members.items() if (node, axis) in listed}
            if ties & set(_ACROSS) or (not ties and not self._is_made(node, applied)):
                crossed.append(axis)
                why = next(iter(ties & set(_ACROSS)), Tie.STOP)
        if crossed and len(crossed) == len(depends):
            if SCORING in applied.meta:
                return
            raise InseparableError(applied, f"{_ACROSS[why]}")
        labels = self.elements.reduce(self.elements.merge_along(labels, crossed))
        self._check(applied)
        self._carry_groups(node, applied, labels, members)

    def _is_made(self, node: fx.Node, applied: fx.Node) -> bool:
        """The operator makes this axis of its result from nothing: one value everywhere."""
        return node is applied and operator_name(node) in CREATIONS | EXPANSIONS

    def _carry_groups(
        self, node: fx.Node, applied: fx.Node, labels: Labels, members: Mapping[Group, tuple[tuple[fx.Node, int], ...]]
    ) -> None:
        pairs: dict[fx.Node, dict[int, int]] = {}
        for axis in dependent_axes(labels):
            for group, listed in members.items():
                if (node, axis) not in listed:
                    continue
                if group.tie is Tie.SUM and SCORING not in applied.meta:
                    self.sums.setdefault(applied, set()).update(item for item, _ in listed)
                for other, at in listed:
                    if (other, at) != (node, axis):
                        pairs.setdefault(other, {})[axis] = at
        for other, axes in pairs.items():
            self._transfer(applied, labels, dict(axes), other)


def _members(group: Group, applied: fx.Node) -> tuple[tuple[fx.Node, int], ...]:
    """Operands and the result, each with its axis."""
    return (*group.members, (applied, group.out)) if group.out is not None else group.members


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Operators that read a node; the items of those that split it, one by one."""
    for user in node.users:
        if operator_name(user) in SPLITS:
            yield from user.users
        else:
            yield user
