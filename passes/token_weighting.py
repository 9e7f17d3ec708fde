"""Observers whose norms are weighted by token importance: CIP of CoMP (CVPR 2026), Eq. 4, in one forward pass.

::

    q, k --> attention(q, k, v)               q, k --> scores_0(q, k) --> s;  attention(q, k, v)
    x --> linear(x, w_up)             ==>     x --> linear(x, w_up);  observer_0(x, s) once both are known
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfcompile.errors import PostconditionError, PreconditionError
from mfcompile.graph import BakedScalar, CapturedGraph, Diagnostic
from mfcompile.passes.base import PassResult
from mfcompile.passes.observers import ActivationObserver, StatisticsCollector, shallow_root, writes_before
from mfcompile.passes.operators import CONTRACTIONS, is_view, operator_name, written_arguments
from mfcompile.passes.reduction import Reduction, read, weighted_norms
from mfcompile.passes.token_attention import NEGLIGIBLE, ancestors
from mfcompile.passes.token_cover import Cover, Rows
from mfcompile.passes.token_scores import received, weigh
from mfcompile.passes.token_upstream import ReadOut
from mfcompile.region import WeightUse

_LOGITS_AT_A_TIME = 1 << 24
"""Elements of attention that are computed at a time: 64 MiB in float32."""


class BatchDoesNotFitError(Exception):
    """The model would read other numbers from this batch than the graph holds; not an error of the user."""


class TokenScores(nn.Module):
    """S^t of an attention: attention received, Eq. 6; padding pays and receives none.

    Args:
        collector: knows which rows are padding.
        cover: the attention, and how many sequences of tokens a batch has.
        live: (heads,) weight of each head, Eq. 7; None for all alike.
    """

    def __init__(self, collector: StatisticsCollector, cover: Cover, live: Tensor | None) -> None:
        super().__init__()
        self._collector, self._live = collector, live
        self._attention, self._samples, self._is_self = cover.attention, cover.rows.samples, cover.is_self

    def forward(self, *operands: Tensor) -> Tensor:
        """(samples, keys) scores from the operands of the attention."""
        tracker = self._collector.tracker
        with tracker.paused(*operands):
            rows = tracker.keep(operands[0], (-1,))
            return torch.cat([self._score(operands, rows, part) for part in self._parts(operands)])

    def _parts(self, operands: Sequence[Tensor]) -> list[slice]:
        """Samples in ranges of bounded size."""
        keys = operands[1].shape[-2] if self._attention.fused else operands[0].shape[-1]
        size = operands[0][..., 0].numel() * keys // self._samples
        count = max(1, min(self._samples, _LOGITS_AT_A_TIME // max(size, 1)))
        return [slice(start, start + count) for start in range(0, self._samples, count)]

    def _score(self, operands: Sequence[Tensor], rows: Tensor | None, part: slice) -> Tensor:
        taken = [self._of(item, part) for item in operands]
        logits = self._attention.logits(*taken)
        count = len(range(self._samples)[part])
        weights, _ = weigh(logits, count, self._attention.masked, NEGLIGIBLE, is_self=self._is_self)
        if rows is not None:
            weights = weights * self._of(rows[..., None], part).reshape(count, -1, weights.shape[2], 1)
        return received(weights, None if self._live is None else self._live.to(weights.device))

    def _of(self, tensor: Tensor, part: slice) -> Tensor:
        """Some samples of a tensor whose first axis is samples, or samples and heads; all of a mask that they share."""
        inner = tensor.shape[0] // self._samples if tensor.ndim > 2 else 0
        if not inner:
            return tensor
        return tensor[part.start * inner : part.stop * inner]


@dataclass(frozen=True)
class Readers:
    """The tokens that are read in the end, as positions: which arguments of an observer they come from.

    Attributes:
        chains: for every read-out its position or the argument that holds it, and what lies between, arguments by number.
    """

    chains: tuple[tuple[int | None, int | None, tuple[tuple[bool, int], ...]], ...]

    def marks(self, scores: Tensor, arguments: Sequence[Tensor]) -> Tensor:
        """(samples, tokens) bool."""
        found = torch.zeros_like(scores, dtype=torch.bool)
        for position, argument, via in self.chains:
            if argument is None:
                at = torch.zeros_like(found[:, :1], dtype=torch.int64) + (position or 0)
            else:
                at = arguments[argument].long().reshape(-1, 1)
            for is_kept, value in reversed(via):
                at = arguments[value].gather(1, at) if is_kept else at + value
            found.scatter_(1, at, True)
        return found


def token_weights(scores: Tensor, is_read: Tensor, keep: Tensor | None) -> Tensor:
    """w of Eq. 4: one for the token that is read (CLS), S^t_n / sum S^t for the others.

    Args:
        scores: (samples, tokens), not negative.
        is_read: (samples, tokens) bool.
        keep: (samples, tokens) bool, False for padding, which weighs nothing and is no part of the sum; None for none.

    Returns:
        (samples, tokens): what is not read weighs one in all, or nothing where all of it has score zero.
    """
    others = scores.masked_fill(is_read if keep is None else is_read | ~keep, 0.0)
    total = others.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    weights = others / total + is_read
    return weights if keep is None else weights * keep


class WeightedObserver(ActivationObserver):
    """Reduces an activation whose rows are tokens, weighted by their scores, and hands it to every use of it."""

    def __init__(self, collector: StatisticsCollector, uses: Sequence[WeightUse], rows: Rows, readers: Readers) -> None:
        super().__init__(collector, uses)
        self._rows, self._readers = rows, readers

    def forward(self, activation: Tensor, scores: Tensor, *arguments: Tensor) -> None:  # type: ignore[override]
        """Reduce ``activation``; ``scores`` are (samples, tokens), ``arguments`` hold positions of read-outs."""
        collector, first = self._collector, self._uses[0]
        by_sample = any(use.fqn in collector.repeated for use in self._uses)
        plain = collector.reduce(activation, first.reading, None, None, by_sample=by_sample)
        assert isinstance(plain, Reduction)  # experts are not covered
        with collector.tracker.paused(activation, scores):
            keep = collector.tracker.keep(activation, first.reading.features)
            kept = None if keep is None else self._tokens_last(keep[..., None])[..., 0]
            weights = token_weights(scores, self._readers.marks(scores, arguments), kept)
            counted = torch.ones_like(scores[:, 0], dtype=torch.bool) if kept is None else kept.any(dim=1)
            norms = weighted_norms(self._tokens_last(read(activation, first.reading)), weights, counted.cpu())
        for use in self._uses:
            collector.add(use.fqn, use.rows, use.experts, replace(plain, weighted=norms))

    def _tokens_last(self, rows: Tensor) -> Tensor:
        """(samples, tokens, features)."""
        sizes = (self._rows.before, self._rows.tokens, self._rows.after, rows.shape[-1])
        return rows.reshape(sizes).transpose(1, 2).reshape(self._rows.samples, self._rows.tokens, rows.shape[-1])


@dataclass
class Checks:
    """Whether numbers that the model reads are compared with those of the recording.

    Attributes:
        are_made: not for the batch that was recorded, of which some readings list more than the recording keeps.
    """

    are_made: bool = True


class NumberCheck(nn.Module):
    """Stops a pass in which a number that the model read from its input is another one than in the recording."""

    def __init__(self, collector: StatisticsCollector, checks: Checks, numbers: Sequence[float]) -> None:
        super().__init__()
        self._collector, self._checks, self._numbers = collector, checks, list(numbers)

    def forward(self, tensor: Tensor) -> None:
        """Compare the numbers of ``tensor``."""
        if not self._checks.are_made:
            return
        with self._collector.tracker.paused(tensor):
            is_same = tensor.numel() == len(self._numbers) and tensor.reshape(-1).tolist() == self._numbers
            is_length = len(self._numbers) == 1 and tensor.ndim > 0 and tensor.shape[0] == self._numbers[0]
        if not (is_same or is_length):
            raise BatchDoesNotFitError


@dataclass(frozen=True)
class InsertWeightedObservers:
    """Insert observers that are weighted by token scores where a cover says so, plain ones elsewhere.

    Attributes:
        uses: every use of every observed weight.
        covers: use -> its cover; uses without one are observed plainly.
        collector: where the observers report.
        checks: whether numbers that the model reads are compared.
        live: attention node -> (heads,) weight of each head (Eq. 7).
    """

    uses: Sequence[WeightUse]
    covers: Mapping[WeightUse, Cover]
    collector: StatisticsCollector
    checks: Checks = field(default_factory=Checks)
    live: Mapping[str, Tensor] = field(default_factory=dict)

    def requires(self, graph: CapturedGraph) -> None:
        """Every use is a node of this graph."""
        names = {node.name for node in graph.graph.nodes}
        missing = [use.node for use in self.uses if use.node not in names]
        if missing:
            raise PreconditionError(f"the uses of weights were found in another graph: it has no node {missing[0]}")

    def apply(self, graph: CapturedGraph) -> PassResult:
        """A graph with observers; weights and the other nodes are the same."""
        writer = _Writer(graph, self.collector, self.live)
        writes = writes_before(graph.graph)
        groups: dict[tuple[Any, ...], list[WeightUse]] = {}
        for use in self.uses:
            cover = self.covers.get(use)
            key = None if cover is None else (cover.attention.node.name, cover.rows, cover.reads)
            seen = (use.activation, use.routed_by, use.reading, use.experts, writes[use.node], key)
            groups.setdefault(seen, []).append(use)
        for group in groups.values():
            writer.observe(group, self.covers.get(group[0]))
        for name, numbers in _numbers(graph.baked_scalars).items():
            writer.check(name, NumberCheck(self.collector, self.checks, numbers))
        return PassResult(replace(graph, graph_module=writer.finish()), modified=bool(groups))

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Every operator of the graph is still there, in its order."""
        after = iter(result.graph.graph.nodes)
        for node in before.graph.nodes:
            if not any(other.op == node.op and other.target == node.target for other in after):
                raise PostconditionError(f"inserting observers changed other nodes of the graph: {node.name} is gone")


def _numbers(baked: Iterable[BakedScalar]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item in baked:
        if item.from_input:
            found.setdefault(item.node, []).append(item.value)
    return found


class _Writer:
    """A copy of a graph that observers are put into."""

    def __init__(self, captured: CapturedGraph, collector: StatisticsCollector, live: Mapping[str, Tensor]) -> None:
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(captured.graph, copies))
        self.root = shallow_root(captured.graph_module)
        self.collector, self.live = collector, live
        self.by_name = {node.name: copy for node, copy in copies.items()}
        self.order = {copy: index for index, copy in enumerate(copies.values())}
        writes = writes_before(captured.graph)
        self.writes = {copy: writes[node.name] for node, copy in copies.items()}
        self._written = {_root(item) for node in copies.values() for item in written_arguments(node)}
        self._scores: dict[tuple[str, int], fx.Node] = {}
        self._hoisted: dict[fx.Node, fx.Node] = {}
        self._count = 0

    def observe(self, uses: Sequence[WeightUse], cover: Cover | None) -> None:
        """One observer for uses of one activation."""
        first = min((self.by_name[use.node] for use in uses), key=self.order.__getitem__)
        activation = self.by_name[uses[0].activation]
        if cover is None:
            operands = [self.by_name[name] for name in (uses[0].activation, uses[0].routed_by) if name is not None]
            self._call(ActivationObserver(self.collector, uses), operands, before=first)
            return
        scores = self._scored(cover)
        readers, arguments = self._readers(cover.reads)
        last = max((scores, *arguments, first), key=self.order.__getitem__)
        if last is not first and self.writes[last] != self.writes[first]:
            with self.graph.inserting_before(first):  # it may be written to before its scores are known
                activation = self.graph.call_function(torch.ops.aten.clone.default, (activation,))
        observer = WeightedObserver(self.collector, uses, cover.rows, readers)
        operands = [activation, scores, *arguments]
        self._call(observer, operands, **({"before": first} if last is first else {"after": last}))

    def check(self, name: str, check: NumberCheck) -> None:
        """Look at numbers that the model reads from a node."""
        self._call(check, [self.by_name[name]], after=self.by_name[name])

    def finish(self) -> fx.GraphModule:
        """The graph with its observers."""
        return fx.GraphModule(self.root, self.graph)

    def _scored(self, cover: Cover) -> fx.Node:
        attention = cover.attention
        key = (attention.node.name, cover.rows.samples)
        if key not in self._scores:
            operands = [self.by_name[item.name] for item in attention.operands]
            scores = TokenScores(self.collector, cover, self.live.get(attention.node.name))
            anchor = max(operands, key=self.order.__getitem__)
            self._scores[key] = self._call(scores, operands, after=anchor)
            self._place(self._scores[key], anchor)
        return self._scores[key]

    def _place(self, node: fx.Node, like: fx.Node) -> None:
        """A new node counts as where it was put."""
        self.order[node] = self.order[like]
        self.writes[node] = self.writes[like]

    def _readers(self, reads: Sequence[ReadOut]) -> tuple[Readers, list[fx.Node]]:
        arguments: list[fx.Node] = []

        def argument(name: str) -> int:
            node = self._early(self.by_name[name])
            if node not in arguments:
                arguments.append(node)
            return arguments.index(node)

        chains = []
        for item in reads:
            via = tuple((False, part) if isinstance(part, int) else (True, argument(part.name)) for part in item.via)
            chains.append((item.position, None if item.index is None else argument(item.index.name), via))
        return Readers(tuple(chains)), arguments

    def _early(self, node: fx.Node) -> fx.Node:
        """The node, computed in front where it takes no layer: activations need not wait for it."""
        if node in self._hoisted:
            return self._hoisted[node]
        needed = ancestors(node)
        if any(operator_name(item) in CONTRACTIONS or _root(item) in self._written for item in needed):
            return node
        inputs = [item for item in self.graph.nodes if item.op == "placeholder"]
        copies: dict[fx.Node, fx.Node] = {item: item for item in inputs}
        last = inputs[-1]
        for item in sorted(needed - set(inputs), key=self.order.__getitem__):
            with self.graph.inserting_after(last):
                copies[item] = last = self.graph.node_copy(item, copies.__getitem__)
            self._place(last, inputs[-1])
        self._hoisted[node] = copies[node]
        return copies[node]

    def _call(
        self, module: nn.Module, operands: Sequence[fx.Node], *, before: fx.Node | None = None, after: fx.Node | None = None
    ) -> fx.Node:
        target = f"mfcompile_observer_{self._count}"
        self._count += 1
        self.root.add_module(target, module)
        point = self.graph.inserting_before(before) if before is not None else self.graph.inserting_after(after)
        with point:
            return self.graph.call_module(target, tuple(operands))


def _root(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def uncovered(reasons: Mapping[str, str]) -> tuple[Diagnostic, ...]:
    """Which weights keep plain norms, and why: those of one reason in one line.

    Args:
        reasons: FQN -> why no token scores weigh its input.
    """
    by_reason: dict[str, list[str]] = {}
    for fqn, reason in reasons.items():
        by_reason.setdefault(reason, []).append(fqn)
    return tuple(
        Diagnostic(", ".join(fqns), f"its norms are not weighted by tokens: {reason}") for reason, fqns in by_reason.items()
    )
