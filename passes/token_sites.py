"""Token sites: where a graph lets tokens be cut, which of them must stay, and why other places are refused.

A site is a self-attention whose queries and keys are the tokens of one residual stream; tokens are cut at the first
residual add behind it, between attention and MLP (MADTP, CVPR 2024; CoMP, CVPR 2026).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from mfcompile.graph import Diagnostic
from mfcompile.passes.modalities import TEXT
from mfcompile.passes.operators import CONTENT_FREE, argument, operator_name
from mfcompile.passes.token_attention import Attention, ancestors, at_axis, find_attentions, first_place, residual_add
from mfcompile.passes.token_axis import Flow, Kept, TokenAxisError, follow
from mfcompile.passes.token_origins import OriginError, origins_of
from mfcompile.passes.token_places import Place, node_sizes
from mfcompile.passes.token_spread import VIEWS, spread
from mfcompile.region import FUSION

_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_split", "tensor_split"})

UNTAGGED_TOKENS = "tokens"
"""Region of a site that no named modality reaches."""


@dataclass(frozen=True)
class TokenSite:
    """A place where tokens can be cut.

    Attributes:
        name: the submodule of the attention, with "@1" for its second call.
        region: modality of the tokens, "fusion" where several reach them.
        tokens: tokens that arrive.
        protected: how many of them always stay (CLS, the read-out position, text of a decoder).
        node: the residual add behind whose result tokens are cut.
        keeps: what is protected, in words.
        modality: of the tokens that may be cut: image tokens in a decoder are "vision" though text is among them, and text
            that has attended to an image is "text".
    """

    name: str
    region: str
    tokens: int
    protected: int
    node: str
    keeps: tuple[str, ...] = ()
    modality: str = ""

    def __str__(self) -> str:
        stay = f", of which {self.protected} stay ({'; '.join(self.keeps)})" if self.keeps else ""
        return f"{self.name}: {self.tokens} {self.region} tokens{stay}, cut behind {self.node}"


@dataclass(frozen=True)
class TokenSites:
    """What ``find_token_sites`` found.

    Attributes:
        sites: places where tokens can be cut, in the order of computation.
        refused: attentions where they cannot, each with node and reason.
    """

    sites: tuple[TokenSite, ...]
    refused: tuple[Diagnostic, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} token sites", *(f"  {site}" for site in self.sites)]
        lines += [f"{len(self.refused)} refused", *(f"  {item}" for item in self.refused)] if self.refused else []
        return "\n".join(lines)


@dataclass
class SitePlan:
    """A site as the transform needs it; nodes are those of one graph.

    Attributes:
        attention: whose weights score the tokens.
        point: the residual add.
        token: its token axis.
        batch: its batch axis.
        region: see ``TokenSite``.
        static: protected positions that every sample has, from the front: learned tokens, text, read-outs.
        indices: nodes of (batch,) positions that read-outs take.
        image_mask: (batch, tokens, ...) bool, True where a token may be cut; None where any may.
        protected_by_mask: tokens that ``image_mask`` protects, once it is known.
        modality: see ``TokenSite``.
        live_heads: (heads,) weights of its heads in scores (Eq. 7 of CoMP); None where all count.
    """

    attention: Attention
    point: fx.Node
    token: int
    batch: int
    region: str
    static: frozenset[int] = frozenset()
    indices: tuple[fx.Node, ...] = ()
    image_mask: fx.Node | None = None
    protected_by_mask: int = 0
    modality: str = ""
    live_heads: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that arrive, in the graph as it is now."""
        return int(node_sizes(self.point)[self.token])

    def in_copy(self, nodes: Mapping[str, fx.Node]) -> SitePlan:
        """The plan in a copy of its graph.

        Args:
            nodes: name of a node -> its copy.
        """
        own = self.attention
        written = None if own.written is None else nodes[own.written.name]
        return replace(
            self,
            attention=replace(own, node=nodes[own.node.name], written=written),
            point=nodes[self.point.name],
            indices=tuple(nodes[index.name] for index in self.indices),
            image_mask=None if self.image_mask is None else nodes[self.image_mask.name],
        )


@dataclass(frozen=True)
class Protection:
    """What of a site stays, and what the cut reaches.

    Attributes:
        flow: of the token axis.
        kept: protected ends.
        middle: static positions that are not at an end.
        indices: nodes of (batch,) positions that read-outs take.
        count: protected tokens of a sample at most.
        words: what they are.
    """

    flow: Flow
    kept: Kept
    middle: frozenset[int]
    indices: tuple[fx.Node, ...]
    count: int
    words: tuple[str, ...]


class _RefusedError(Exception):
    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


def plan_sites(
    graph: fx.Graph, modalities: Mapping[str, str], weights: Mapping[str, str]
) -> tuple[list[SitePlan], list[Diagnostic]]:
    """Every place where tokens can be cut, and the attentions where they cannot be.

    Args:
        graph: of a program.
        modalities: placeholder -> modality, for inputs with content.
        weights: placeholder -> FQN of the parameter that it holds.

    Returns:
        (sites in order, one diagnostic per refused attention).
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    labels = _content(graph, modalities)
    attentions = find_attentions(graph.nodes, weights)
    results = {item.node for item in attentions}
    cached = _returned_keys(graph, attentions)
    used = ancestors(next(node for node in reversed(graph.nodes) if node.op == "output"))
    plans: list[SitePlan] = []
    refused: list[Diagnostic] = []
    for attention in attentions:
        try:
            if attention.node not in used:
                raise _RefusedError(attention.node, "no output depends on it")
            plan = _plan(attention, order, labels, results - {attention.node})
            if plan.point in {other.point for other in plans}:
                raise _RefusedError(plan.point, "another attention's residual add is the same node")
            if cached is not None:
                raise _RefusedError(cached, "the program returns keys or values (a cache), whose length a cut would change")
            _note_reads(plan, protect(plan, order), order)
            plans.append(plan)
        except (_RefusedError, TokenAxisError) as error:
            where = f"{attention.name} at {error.node.name} ({operator_name(error.node) or error.node.op})"
            refused.append(Diagnostic(where, error.reason if isinstance(error, TokenAxisError) else str(error)))
    return plans, refused


def _note_reads(plan: SitePlan, protection: Protection, order: Mapping[fx.Node, int]) -> None:
    """Read-outs, before any cut: behind the barrier of another cut they could not be seen any more."""
    reads = {position % plan.tokens for position in protection.flow.positions if -plan.tokens <= position < plan.tokens}
    reads |= _read_behind_slices(plan, protection.flow, order)
    if plan.modality == TEXT and not (reads or protection.indices):
        raise TokenAxisError(plan.point, "every text position is read, none is a read-out that stands for the others")
    plan.static |= reads
    plan.indices = protection.indices


def _read_behind_slices(plan: SitePlan, flow: Flow, order: Mapping[fx.Node, int]) -> set[int]:
    """Positions read from part of the tokens, a slice that gets its tokens back: they must not come back as zeros."""
    found: set[int] = set()
    for reader, operand in flow.barriers:
        carried = flow.carried[operand]
        axis = int(argument(reader, "dim", 1, 0)) % max(len(node_sizes(reader)), 1) if operator_name(reader) == "slice" else -1
        whole = carried.batch is not None and carried.batch.is_whole
        if not (whole and carried.tokens == {Place(axis)} and argument(reader, "step", 4, 1) == 1):
            continue
        assert carried.batch is not None  # whole
        start = argument(reader, "start", 2) or 0
        length = flow.length(carried)
        first = carried.offset + (max(start + length, 0) if start < 0 else start)
        size = int(node_sizes(reader)[axis])
        try:
            behind = follow(reader, axis, carried.batch.axis, Kept(), order)
        except TokenAxisError:
            continue  # what is behind the slice has its tokens back, and need not be followed
        found |= {first + position % size for position in behind.positions if -size <= position < size}
    return {position for position in found if position < plan.tokens}


def protect(plan: SitePlan, order: Mapping[fx.Node, int]) -> Protection:
    """Follow the tokens of a site and gather what must stay.

    Raises:
        TokenAxisError: the tokens cannot be followed.
    """
    size = plan.tokens
    free = follow(plan.point, plan.token, plan.batch, Kept(), order)
    reads = {position % size for position in free.positions if -size <= position < size}
    static = plan.static | reads
    kept = Kept(_run(static, range(size)), _run(static, range(size - 1, -1, -1)))
    flow = free if kept == Kept() else follow(plan.point, plan.token, plan.batch, kept, order)
    indices = tuple(dict.fromkeys((*plan.indices, *(index for _, index in flow.indices.values()))))
    ends = {*range(kept.prefix), *range(size - kept.suffix, size)}
    words = [f"{len(static)} at fixed positions"] if static else []
    words += [f"{index.name} of each sample" for index in indices]
    words += [f"{plan.protected_by_mask} that are no image"] if plan.image_mask is not None else []
    count = len(static) + len(indices) + plan.protected_by_mask
    return Protection(flow, kept, static - ends, indices, count, tuple(words))


def _run(positions: Iterable[int], along: range) -> int:
    """How many of the first positions along a range are in a set."""
    known = set(positions)
    return next((count for count, position in enumerate(along) if position not in known), len(along))


def _content(graph: fx.Graph, modalities: Mapping[str, str]) -> dict[fx.Node, frozenset[str]]:
    """Node -> modalities whose inputs it depends on."""
    labels: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        own = frozenset({modalities[node.name]}) if node.op == "placeholder" and node.name in modalities else frozenset()
        is_content = operator_name(node) not in CONTENT_FREE  # sizes and comparisons of an input are not its content
        labels[node] = own.union(*(labels[item] for item in node.all_input_nodes if is_content))
    return labels


def _returned_keys(graph: fx.Graph, attentions: Sequence[Attention]) -> fx.Node | None:
    """An output that is a key or a value of an attention."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned = set(output.all_input_nodes)
    for attention in attentions:
        operands = attention.node.args[1:3] if attention.fused else attention.node.args[1:2]
        for operand in operands:
            current = operand
            for _ in range(12):
                if not isinstance(current, fx.Node):
                    break
                if current in returned:
                    return current
                moves = operator_name(current) in VIEWS | {"transpose", "expand", "unsqueeze", "slice", "permute", "to"}
                current = current.args[0] if moves and current.args else None
    return None


def _plan(
    attention: Attention,
    order: Mapping[fx.Node, int],
    labels: Mapping[fx.Node, frozenset[str]],
    others: set[fx.Node],
) -> SitePlan:
    found = residual_add(attention, order, others)
    if found is None:
        raise _RefusedError(
            attention.node, "no residual add of its queries' tokens behind the attention (pooling, or tokens of another kind)"
        )
    point, stream = found
    token, batch = _axes(attention, point, stream, order)
    if not isinstance(node_sizes(point)[token], int):
        raise _RefusedError(
            point, f"its number of tokens is free ({node_sizes(point)[token]}): a cut to a fixed number needs a fixed length"
        )
    plan = SitePlan(attention, point, token, batch, _region(labels[stream]))
    return _with_origins(plan, stream, labels)


def _axes(attention: Attention, point: fx.Node, stream: fx.Node, order: Mapping[fx.Node, int]) -> tuple[int, int]:
    """Token and batch axis of the stream: the one that becomes queries and keys, and the one in front of both."""
    (query, at_query), (key, at_key) = attention.query_and_key
    within = [node for node in order if order[stream] < order[node] <= order[point]]
    places = {axis: spread(stream, axis, within) for axis in range(len(node_sizes(stream)))}

    def reaches(axis: int, node: fx.Node, wanted: int) -> bool:
        return at_axis(places[axis].get(node, ()), wanted)

    queries = [axis for axis in places if reaches(axis, query, at_query) and reaches(axis, point, axis)]
    if not queries:
        raise _RefusedError(*_where_lost(places, within, query))
    tokens = [axis for axis in queries if reaches(axis, key, at_key)]
    if not tokens:
        raise _RefusedError(key, "keys are other tokens than queries (cross-attention, or keys of a cache)")
    batches = [
        axis
        for axis in places
        if axis not in tokens and reaches(axis, point, axis) and first_place(places[axis].get(query, ()), 0) is not None
    ]
    if len(tokens) != 1 or len(batches) != 1:
        raise _RefusedError(point, f"of its axes {list(places)} the token axis and the batch axis cannot be told")
    return tokens[0], batches[0]


def _where_lost(
    places: Mapping[int, Mapping[fx.Node, frozenset[Place]]], within: Sequence[fx.Node], query: fx.Node
) -> tuple[fx.Node, str]:
    upstream = ancestors(query)
    for node in within:
        for axis, reached in list(places.items())[:-1]:
            source = node.args[0] if node.args else None
            if node in upstream and node not in reached and isinstance(source, fx.Node) and source in reached and axis:
                if operator_name(node) in _SPLITS:
                    return node, "tokens are split here into parts that attend apart (packed images, windows)"
                sizes = f"{node_sizes(source)} to {node_sizes(node)}"
                return node, f"tokens are rearranged here before they attend ({sizes}; windows or shifts?)"
    return query, "the queries' tokens are not those of the residual stream"


def _region(labels: frozenset[str]) -> str:
    return UNTAGGED_TOKENS if not labels else next(iter(labels)) if len(labels) == 1 else FUSION


def _with_origins(plan: SitePlan, stream: fx.Node, labels: Mapping[fx.Node, frozenset[str]]) -> SitePlan:
    """Protect what the tokens were put together from, besides the image: learned tokens, text between image tokens."""
    try:
        origins = origins_of(stream, plan.token, labels)
    except OriginError as error:
        raise _RefusedError(error.node, error.reason) from error
    if origins.is_learned:
        raise _RefusedError(
            stream, f"its {plan.tokens} tokens are learned queries, a fixed number that the model was built for"
        )
    plan.modality = _region(origins.content)
    plan.image_mask = origins.image_mask
    plan.static |= origins.protected
    return plan
