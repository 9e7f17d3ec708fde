"""Following the token axis from where tokens are cut: what shortens with it, what is cut beside it, where it ends.

The axis is followed operator by operator (``token_rules``) and through views by the products of the sizes before it
(``token_places``), never by its size. What cannot be followed stops with the node and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from mfcompile.passes.operators import argument, operator_name
from mfcompile.passes.token_places import Place, node_sizes, place_in_view
from mfcompile.passes.token_rules import rule_of
from mfcompile.passes.token_spread import VIEWS
from mfcompile.passes.token_ties import Group, Rule, Tie

_FIXED_OUTSIDE = 2**31


class TokenAxisError(Exception):
    """The token axis cannot be followed; not an error of the user, who gets it as a refused site.

    Attributes:
        node: where it ends.
        reason: why.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name} ({operator_name(node) or node.op}): {reason}")
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class Carried:
    """The token axis in one tensor.

    Attributes:
        tokens: where it is; twice in a matrix of attention.
        batch: where the batch axis is, None where it is lost.
        offset: leading tokens that a slice took off.
    """

    tokens: frozenset[Place]
    batch: Place | None
    offset: int = 0


@dataclass
class Side:
    """An operand from elsewhere that has the token axis too, and must be cut like the stream.

    Attributes:
        operand: its node.
        axes: its token axes, after ``lead`` axes of size one are put in front.
        lead: how many.
        batch: its batch axis, likewise; of the whole axis, or with an inner factor.
        offset: as in ``Carried``.
    """

    operand: fx.Node
    axes: set[int]
    lead: int
    batch: Place
    offset: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Sides with one key are cut once."""
        return (self.operand, tuple(sorted(self.axes)), self.lead, self.batch, self.offset)


@dataclass
class Flow:
    """What a cut of the token axis reaches.

    Attributes:
        start: the node whose tokens are cut.
        size: its number of tokens.
        carried: nodes that shorten with it, in order; ``start`` too.
        sides: reader -> operands that are cut beside it.
        barriers: (reader, operand): readers that need all tokens at their old places.
        readers: nodes that read the shortened tokens and give no token axis.
        positions: positions that read-outs select, from the front (0, 1, ...) or the back (-1, ...).
        indices: read-outs by an index of their own per sample: reader -> (operand, index).
        notes: (node, what it does from now on) where a result means something else.
    """

    start: fx.Node
    size: int
    carried: dict[fx.Node, Carried] = field(default_factory=dict)
    sides: dict[fx.Node, dict[fx.Node, Side]] = field(default_factory=dict)
    barriers: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    readers: set[fx.Node] = field(default_factory=set)
    positions: set[int] = field(default_factory=set)
    indices: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    notes: list[tuple[fx.Node, str]] = field(default_factory=list)

    def length(self, carried: Carried) -> int:
        """Tokens of a tensor before the cut."""
        return self.size - carried.offset


@dataclass(frozen=True)
class Kept:
    """Tokens that are known to stay at the ends: ``prefix`` in front, ``suffix`` at the back."""

    prefix: int = 0
    suffix: int = 0

    def holds(self, position: int, offset: int = 0) -> bool:
        """The token at a position (negative from the back) is among them."""
        return position + offset < self.prefix if position >= 0 else -position <= self.suffix


def follow(start: fx.Node, token: int, batch: int, kept: Kept, order: Mapping[fx.Node, int]) -> Flow:
    """Follow the token axis of a node to all that depends on it.

    Args:
        start: gives the tensor whose tokens will be cut.
        token: its token axis, of fixed size.
        batch: its batch axis.
        kept: tokens that the cut leaves at the ends.
        order: position of every node in the graph.

    Raises:
        TokenAxisError: an operator cannot be followed.
    """
    flow = Flow(start, int(node_sizes(start)[token]))
    flow.carried[start] = Carried(frozenset({Place(token)}), Place(batch))
    return _Follower(flow, kept).run(order)


class _Follower:
    """One walk; what it finds goes into the flow."""

    def __init__(self, flow: Flow, kept: Kept) -> None:
        self.flow = flow
        self.kept = kept
        self.derived: dict[fx.Node, fx.Node] = {}
        """Node that depends on the tokens without carrying them -> the barrier or reader that it comes from."""
        self.unread: set[fx.Node] = set()

    def run(self, order: Mapping[fx.Node, int]) -> Flow:
        flow = self.flow
        start = order[flow.start]
        for node in sorted(order, key=order.__getitem__):
            if order[node] <= start:
                continue
            carriers = [item for item in node.all_input_nodes if item in flow.carried]
            if not carriers:
                origin = next((self.derived[item] for item in node.all_input_nodes if item in self.derived), None)
                if origin is not None:
                    self.derived[node] = origin
                continue
            self.visit(node, carriers)
            if node not in flow.carried and node not in self.unread:
                self.derived[node] = node
        for reader, operand in flow.barriers:
            self._check_restorable(reader, operand)
        return flow

    def _check_restorable(self, reader: fx.Node, operand: fx.Node) -> None:
        carried = self.flow.carried[operand]
        is_plain = isinstance(operand.meta.get("val"), Tensor) and all(place.is_whole for place in carried.tokens)
        if operand is not self.flow.start and not (is_plain and carried.batch is not None and carried.batch.is_whole):
            raise TokenAxisError(
                reader, "it needs all tokens at their places, but in its operand they share an axis with something"
            )

    def visit(self, node: fx.Node, carriers: list[fx.Node]) -> None:
        if node.op == "output":
            self.flow.barriers += [(node, item) for item in carriers]
            return
        if operator_name(node) in VIEWS:
            self._view(node, carriers)
            return
        rule = rule_of(node)
        if rule is None:
            raise TokenAxisError(node, "the token axis enters an operator that has no rule")
        if self._is_barrier(node, carriers, rule):
            if node not in self.flow.readers:
                self.flow.barriers += [(node, item) for item in carriers]
            return
        self._apply(node, carriers, rule)

    def _view(self, node: fx.Node, carriers: list[fx.Node]) -> None:
        source = carriers[0]
        if node.args[0] is not source or len(carriers) > 1:
            raise TokenAxisError(node, "a view takes its sizes from a tensor that is cut")
        carried = self.flow.carried[source]
        before, after = node_sizes(source), node_sizes(node)
        moved = {place_in_view(before, after, place, self.flow.length(carried)) for place in carried.tokens}
        if None in moved:
            self.flow.barriers.append((node, source))  # cut into a grid or windows: it needs all places
            return
        batch = None if carried.batch is None else self._moved_batch(source, node, carried.batch)
        self._carry(node, Carried(frozenset(item for item in moved if item is not None), batch, carried.offset))

    def _moved_batch(self, source: fx.Node, node: fx.Node, place: Place) -> Place | None:
        size = node_sizes(self.flow.start)[self._start_batch]
        return place_in_view(node_sizes(source), node_sizes(node), place, size)

    @property
    def _start_batch(self) -> int:
        batch = self.flow.carried[self.flow.start].batch
        assert batch is not None  # ``follow`` gives one
        return batch.axis

    def _is_barrier(self, node: fx.Node, carriers: list[fx.Node], rule: Rule) -> bool:
        """The operator reads positions; reads that stay right are taken as readers, or carry on behind a slice."""
        for operand in carriers:
            carried = self.flow.carried[operand]
            for place in carried.tokens:
                if any(group.tie is Tie.READ for group in _groups(rule, operand, place)):
                    return not self._stays_right(node, operand, carried, place, rule)
            if carried.batch is not None and any(item.tie is Tie.READ for item in _groups(rule, operand, carried.batch)):
                return True
        return False

    def _stays_right(self, node: fx.Node, operand: fx.Node, carried: Carried, place: Place, rule: Rule) -> bool:
        if not place.is_whole or len(carried.tokens) > 1:
            return False
        name, length = operator_name(node), self.flow.length(carried)
        if name == "select":
            position = int(argument(node, "index", 2))
            position = position - length if position == length - 1 else position
            self.flow.positions.add(position if position < 0 else position + carried.offset)
            if self.kept.holds(position, carried.offset):
                self.flow.readers.add(node)
            return False
        if name == "slice" and argument(node, "step", 4, 1) == 1:
            return self._slice_stays_right(node, operand, carried, rule)
        if name == "index" and carried.offset == 0:
            index = index_per_sample(node, operand, place, carried.batch)
            if index is not None and index not in self.derived and index not in self.flow.carried:
                self.flow.indices[node] = (operand, index)
                self.flow.readers.add(node)
        return False

    def _slice_stays_right(self, node: fx.Node, operand: fx.Node, carried: Carried, rule: Rule) -> bool:
        length = self.flow.length(carried)
        start, end = _bounds(argument(node, "start", 2), argument(node, "end", 3), length)
        if start == 0 or end == length:
            count = end - start
            if count == 1:
                self.flow.positions.add(carried.offset if start == 0 else -1)
            fits = carried.offset + end <= self.kept.prefix if start == 0 else count <= self.kept.suffix
            if fits:
                places = range(carried.offset, carried.offset + end) if start == 0 else range(-count, 0)
                self.flow.positions.update(places)
                self.flow.readers.add(node)
                return False
        if end == length and start + carried.offset <= self.kept.prefix:
            batch = self._out_batch(node, operand, carried, rule)
            self._carry(node, Carried(carried.tokens, batch, carried.offset + start))
            return True
        return False

    def _out_batch(self, node: fx.Node, operand: fx.Node, carried: Carried, rule: Rule) -> Place | None:
        if carried.batch is None:
            return None
        outs = {item.out for item in _groups(rule, operand, carried.batch) if item.tie is Tie.KEEP and item.out is not None}
        return replace(carried.batch, axis=outs.pop()) if len(outs) == 1 else None

    def _apply(self, node: fx.Node, carriers: list[fx.Node], rule: Rule) -> None:
        if node in self.flow.carried or node in self.flow.readers:
            return
        outs: set[Place] = set()
        batches = {self._out_batch(node, item, self.flow.carried[item], rule) for item in carriers} - {None}
        batch = next(iter(batches)) if len(batches) == 1 else None
        ignored = True
        for operand in carriers:
            carried = self.flow.carried[operand]
            for place in carried.tokens:
                groups = _groups(rule, operand, place)
                if not groups:
                    raise TokenAxisError(node, f"the rule of this operator says nothing of axis {place.axis} of {operand.name}")
                for group in groups:
                    ignored = ignored and group.tie is Tie.IGNORE
                    outs |= self._tie(node, rule, group, carried, place, batch)
        if outs and batch is None and all(self.flow.carried[item].batch is not None for item in carriers):
            self.flow.barriers += [(node, item) for item in carriers]  # behind it, which sample a token is of is not known
        elif outs:
            offsets = {self.flow.carried[item].offset for item in carriers}
            if len(offsets) > 1:
                raise TokenAxisError(node, "tokens meet with and without those in front of them")
            self._carry(node, Carried(frozenset(outs), batch, offsets.pop()))
        elif ignored:
            self.unread.add(node)
        else:
            self.flow.readers.add(node)

    def _tie(self, node: fx.Node, rule: Rule, group: Group, carried: Carried, place: Place, batch: Place | None) -> set[Place]:
        if group.tie is Tie.STOP:
            raise TokenAxisError(node, "the operator computes across the token axis, or takes its size for a number")
        if group.tie is Tie.REDUCE:
            self.flow.notes.append((node, "reduces over the tokens that are kept, no more over all"))
        for operand, axis in group.members:
            if node_sizes(operand)[axis] == 1:
                continue
            other = self.flow.carried.get(operand)
            if other is not None:
                if not any(item.axis == axis for item in other.tokens):
                    raise TokenAxisError(node, f"the token axis meets another axis of {operand.name}, which depends on it")
            else:
                self._add_side(node, rule, operand, axis, carried, place, batch)
        return {replace(place, axis=group.out)} if group.tie is Tie.KEEP and group.out is not None else set()

    def _add_side(
        self, node: fx.Node, rule: Rule, operand: fx.Node, axis: int, carried: Carried, place: Place, batch: Place | None
    ) -> None:
        if operand in self.derived:
            origin = self.derived[operand]
            raise TokenAxisError(
                origin,
                f"it needs all tokens at their places (a grid or windows of tokens?), and what it gives returns to the "
                f"stream at {node.name}: cutting and restoring in turn would save nothing",
            )
        batch = batch or self._batch_of_sum(node, rule, carried)
        if not place.is_whole or batch is None or batch.outer != 1:
            raise TokenAxisError(node, f"{operand.name} must be cut too, but tokens and samples share an axis")
        lead = rule.rank - len(node_sizes(operand))
        known = self.flow.sides.setdefault(node, {})
        side = known.setdefault(operand, Side(operand, set(), lead, batch, carried.offset))
        side.axes.add(axis + lead)

    def _batch_of_sum(self, node: fx.Node, rule: Rule, carried: Carried) -> Place | None:
        return carried.batch if len(node_sizes(node)) == rule.rank else None

    def _carry(self, node: fx.Node, carried: Carried) -> None:
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            raise TokenAxisError(node, "the token axis enters something that is no tensor")
        self.flow.carried[node] = carried


def _groups(rule: Rule, operand: fx.Node, place: Place) -> list[Group]:
    return [group for group in rule.groups if (operand, place.axis) in group.members]


def _bounds(start: Any, end: Any, length: int) -> tuple[int, int]:
    first = 0 if start is None else int(start)
    last = _FIXED_OUTSIDE if end is None else int(end)
    first = max(first + length, 0) if first < 0 else min(first, length)
    last = last + length if last < 0 else min(last, length)
    return first, max(last, first)


def index_per_sample(node: fx.Node, operand: fx.Node, place: Place, batch: Place | None) -> fx.Node | None:
    """The index of a read-out ``x[arange(batch), index]``: one position per sample."""
    indices = argument(node, "indices", 1)
    if batch != Place(0) or place != Place(1) or len(indices) != 2 or not all(isinstance(item, fx.Node) for item in indices):
        return None
    samples, index = indices
    is_counted = operator_name(samples) == "arange" and len(samples.args) == 1
    if not is_counted or len(node_sizes(index)) != 1 or node_sizes(samples) != node_sizes(index):
        return None
    return index if node_sizes(index)[0] == node_sizes(operand)[0] else None
