"""Which attention's token scores weigh the rows that a weight meets: Eq. 5 of CoMP (CVPR 2026), by dataflow.

Tokens meet in attentions only, so that the importance of tokens in layer l is set by what comes before its attention:
projections of an attention read its own scores, and an MLP those of the next attention that its tokens enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import fx

from mfcompile.errors import PreconditionError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.operators import CONTRACTIONS, operator_name
from mfcompile.passes.token_attention import Attention, find_attentions
from mfcompile.passes.token_places import Place, node_sizes
from mfcompile.passes.token_spread import spread
from mfcompile.passes.token_upstream import (
    ReadOut,
    Upstream,
    content_ancestors,
    content_nodes,
    feeders,
    is_layer,
    order_of,
    read_outs,
    with_meta_tensors,
)
from mfcompile.region import InputModality, WeightUse


@dataclass(frozen=True)
class Rows:
    """How the rows of an activation are those of samples and tokens.

    Attributes:
        before: product of the sizes before the token axis.
        tokens: its size.
        after: product of the sizes behind it, without the features.
    """

    before: int
    tokens: int
    after: int

    @property
    def samples(self) -> int:
        """Sequences of tokens."""
        return self.before * self.after


@dataclass(frozen=True)
class Cover:
    """Whose token scores weigh the rows of an activation.

    Attributes:
        attention: the attention; its nodes are those of ``TokenCovers.graph``.
        rows: of the activation.
        reads: the tokens that are read in the end.
        is_self: its queries are the same tokens as its keys, whose scores these are.
    """

    attention: Attention
    rows: Rows
    reads: tuple[ReadOut, ...]
    is_self: bool = True


class _UncoveredError(Exception):
    """Plain norms, and why."""


@dataclass(frozen=True)
class _Mapped:
    """An attention with where its tokens come from.

    Attributes:
        attention: the attention.
        position: of its result in the graph.
        keys: node -> places of what its keys are made of.
        is_self: queries are the same tokens as keys.
        axis: of its queries in its result; None where that cannot be told.
    """

    attention: Attention
    position: int
    keys: Mapping[fx.Node, set[Place]]
    is_self: bool

    @property
    def axis(self) -> int:
        """Token axis of the result."""
        return len(node_sizes(self.attention.node)) - 2


class TokenCovers:
    """Finds, for every use of a weight in one recorded graph, whose token scores weigh its rows.

    Args:
        captured: a recorded graph.
        modalities: of its inputs.
        uses: of all weights that covers may be asked for.

    Attributes:
        graph: a copy with nodes of the same names, which covers speak of.
    """

    def __init__(self, captured: CapturedGraph, modalities: Iterable[InputModality], uses: Iterable[WeightUse]) -> None:
        self.graph = with_meta_tensors(captured)
        self._order = order_of(self.graph)
        self._nodes = list(self._order)
        self._by_name = {node.name: node for node in self._nodes}
        given = {item.name: item.modality for item in modalities}
        # Called by position where the example was by keyword, an input has another name: it counts as content.
        content = [spec.node for spec in captured.inputs if given.get(spec.name, "unknown")]
        # What layers read counts too: learned queries come from no input.
        self._content = content_nodes(self.graph, [*content, *(use.activation for use in uses)])
        self._used = content_ancestors(self._nodes[-1])
        """What outputs depend on: models compute read-outs that nothing reads."""
        self._upstream = Upstream()
        self._attentions = find_attentions(self._nodes, captured.parameter_nodes)
        self._results = {item.node for item in self._attentions}
        self._reads: dict[tuple[fx.Node, int], tuple[ReadOut, ...]] = {}
        self._forward: dict[fx.Node, Mapping[fx.Node, frozenset[Place]]] = {}

    def of(self, use: WeightUse) -> Cover | str:
        """The cover of a use, or the reason why there is none."""
        if use.node not in self._by_name or use.activation not in self._by_name:
            raise PreconditionError(f"the use of {use.fqn} was found in another graph: it has no node {use.node}")
        try:
            return self._cover(use, self._by_name[use.node], self._by_name[use.activation])
        except _UncoveredError as error:
            return str(error)

    @cached_property
    def _mapped(self) -> tuple[_Mapped, ...]:
        return tuple(map(self._map, self._attentions))

    def _map(self, attention: Attention) -> _Mapped:
        (query, at_query), (key, at_key) = attention.query_and_key
        keys = self._upstream.of(key, Place(at_key), int(node_sizes(key)[at_key]))
        queries = self._upstream.of(query, Place(at_query), int(node_sizes(query)[at_query]))
        is_self = node_sizes(query)[at_query] == node_sizes(key)[at_key] and self._share(queries, keys)
        return _Mapped(attention, self._order[attention.node], keys, is_self)

    def _share(self, one: Mapping[fx.Node, set[Place]], other: Mapping[fx.Node, set[Place]]) -> bool:
        """The axes run over the same things: they come from one axis of an activation."""
        return any(places & other.get(node, set()) for node, places in one.items() if node in self._content)

    def _cover(self, use: WeightUse, node: fx.Node, activation: fx.Node) -> Cover:
        reading = use.reading
        if reading.patches is not None:
            raise _UncoveredError("a convolution reads patches, before there are tokens")
        if reading.experts or use.routed_by is not None or use.experts != (0, 1):
            raise _UncoveredError("its rows are sent to experts, where they cannot be told from one another")
        if reading.features != (-1,) or len(node_sizes(activation)) < 2:
            raise _UncoveredError("its input is not (samples, tokens, features)")
        own = self._projected_by(node, activation)
        found = own or self._gathered_in(activation) or self._entered_by(node, activation) or self._left(node, activation)
        if found is None:
            raise _UncoveredError("no self-attention has the tokens that it reads, before or behind")
        mapped, place = found
        rows = _rows_of(activation, place)
        self._check_samples(mapped, activation, place, rows)
        return Cover(mapped.attention, rows, self._reads_of(mapped, activation, place, rows), mapped.is_self)

    @cached_property
    def _projections(self) -> dict[fx.Node, _Mapped]:
        """Layer -> the attention whose keys or values it makes."""
        found: dict[fx.Node, _Mapped] = {}
        for mapped in self._mapped:
            for value in _keys_and_values(mapped.attention, self._content):
                for node in feeders(value, self._content, self._results, through_sums=True):
                    found.setdefault(node, mapped)
        return found

    def _projected_by(self, node: fx.Node, activation: fx.Node) -> tuple[_Mapped, Place] | None:
        """The attention whose keys or values a layer makes."""
        mapped = self._projections.get(node)
        place = None if mapped is None else _only(mapped.keys.get(activation, ()))
        return None if mapped is None or place is None else (mapped, place)

    def _gathered_in(self, activation: fx.Node) -> tuple[_Mapped, Place] | None:
        """The self-attention whose result an activation is, re-arranged."""
        fed = feeders(activation, self._content, self._results, through_sums=False)
        for mapped in self._mapped:
            if mapped.is_self and mapped.attention.node in fed:
                within = self._nodes[mapped.position + 1 : self._order[activation] + 1]
                place = _only(spread(mapped.attention.node, mapped.axis, within).get(activation, ()))
                if place is not None:
                    return mapped, place
        return None

    def _entered_by(self, node: fx.Node, activation: fx.Node) -> tuple[_Mapped, Place] | None:
        """The next self-attention that the tokens of an activation enter."""
        for mapped in self._mapped:
            if mapped.is_self and mapped.position > self._order[node]:
                place = _only(mapped.keys.get(activation, ()))
                if place is not None:
                    return mapped, place
        return None

    def _left(self, node: fx.Node, activation: fx.Node) -> tuple[_Mapped, Place] | None:
        """The last self-attention that the tokens of an activation come from."""
        for mapped in reversed(self._mapped):
            if mapped.is_self and mapped.position < self._order[node]:
                place = _only(self._behind(mapped).get(activation, ()))
                if place is not None:
                    return mapped, place
        return None

    def _behind(self, mapped: _Mapped) -> Mapping[fx.Node, frozenset[Place]]:
        node = mapped.attention.node
        if node not in self._forward:
            self._forward[node] = spread(node, mapped.axis, self._nodes[mapped.position + 1 :])
        return self._forward[node]

    def _check_samples(self, mapped: _Mapped, activation: fx.Node, place: Place, rows: Rows) -> None:
        """Samples of the activation are those of the attention, in their order."""
        key = mapped.attention.query_and_key[1][0]
        leading, samples = int(node_sizes(key)[0]), rows.samples
        if samples == 1:
            return
        batch = _batch_place(activation, place, rows)
        if batch is None or leading % samples:
            raise _UncoveredError("its rows are of tokens, samples and something else")
        of_key = self._upstream.of(key, Place(0, 1, leading // samples), samples)
        if not self._share(self._upstream.of(activation, batch, samples), of_key):
            raise _UncoveredError(f"its samples are not those of the attention {mapped.attention.name} (windows?)")

    def _reads_of(self, mapped: _Mapped, activation: fx.Node, place: Place, rows: Rows) -> tuple[ReadOut, ...]:
        start, at, batch = activation, place, _batch_place(activation, place, rows) or Place(0)
        if mapped.is_self:  # all layers of a stream ask once per attention
            start, at, batch = mapped.attention.node, Place(mapped.axis), Place(0)
        key = (start, at.axis)
        if key not in self._reads:
            nodes = [node for node in self._nodes[self._order[start] + 1 :] if node in self._used]
            self._reads[key] = read_outs(start, at.axis, batch, nodes) if at.is_whole else ()
        return self._reads[key]


def _keys_and_values(attention: Attention, content: set[fx.Node]) -> list[fx.Node]:
    """The two operands that an attention's other tokens give."""
    value = attention.node.args[2 if attention.fused else 1]
    assert isinstance(value, fx.Node)  # by the schemas of attentions and products
    if attention.written is None:
        return [attention.query_and_key[1][0], value]
    pending, seen = [attention.written], {attention.written}
    while pending:
        node = pending.pop(0)
        operands = [item for item in node.all_input_nodes if item in content]
        if operator_name(node) in CONTRACTIONS and not is_layer(node):
            return [operands[-1], value] if operands else [value]
        fresh = [item for item in operands if item not in seen and not is_layer(item)]
        seen.update(fresh)
        pending += fresh
    return [value]


def _only(places: Iterable[Place]) -> Place | None:
    found = list(places)
    return found[0] if len(found) == 1 else None


def _rows_of(activation: fx.Node, place: Place) -> Rows:
    sizes: Sequence[int] = node_sizes(activation)
    if place.axis == len(sizes) - 1:
        raise _UncoveredError("it sums over tokens")
    tokens = sizes[place.axis] // (place.outer * place.inner)
    return Rows(prod(sizes[: place.axis]) * place.outer, tokens, place.inner * prod(sizes[place.axis + 1 : -1]))


def _batch_place(activation: fx.Node, place: Place, rows: Rows) -> Place | None:
    """Where the samples are; None where they are in several places."""
    if rows.before > 1 and rows.after > 1:
        return None
    sizes = node_sizes(activation)
    axes = [axis for axis in range(len(sizes) - 1) if sizes[axis] > 1 and axis != place.axis]
    if place.is_whole:
        return Place(axes[0]) if len(axes) == 1 else Place(0 if place.axis else 1) if not axes else None
    if axes:
        return None
    return Place(place.axis, 1, rows.tokens) if rows.before > 1 else Place(place.axis, rows.tokens, 1)
