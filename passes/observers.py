"""Observers: the sum of squares of every activation that feeds a prune site, while the model runs.

Two ways to observe, one reduction: ``InsertObservers`` puts observers into a captured graph, ``ModuleObserver``
watches the user's own module run, for batches that do not fit a specialised graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.control_flow import run_eagerly
from mfcompile.errors import PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph
from mfcompile.module_copy import KeptState, storage_address
from mfcompile.passes.base import PassResult
from mfcompile.passes.operands import pairings
from mfcompile.passes.operators import CONTRACTIONS, CONVOLUTIONS, written_arguments
from mfcompile.passes.padding import PaddingPlan
from mfcompile.passes.padding_flow import PaddingTracker
from mfcompile.passes.placement import Match, match
from mfcompile.passes.reduction import Reduction, WeightedNorms, distinct, read, reduce_activation
from mfcompile.passes.routing import RoutedReduction, reduce_routed
from mfcompile.passes.weight_places import WeightPlaces
from mfcompile.region import PruneSite, Reading, RegionMap, WeightUse
from mfcompile.statistics import SiteStatistics


@dataclass
class StatisticsCollector:
    """Adds reductions up per site. Not thread-safe.

    Attributes:
        sites: the sites that want statistics.
        plan: where padding is.
        repeated: FQNs of the weights that one forward calls several times: a sample that such a weight meets again is
            counted once.
        batch_count: forward passes that were added.
        batch_size: samples of the running forward pass, None where the inputs do not agree.
        weighting: whether tokens are weighed, "none" or "cip"; then ``weighted`` names the parameters whose inputs are.
        weighted: FQNs of the parameters whose inputs come with token scores.
    """

    sites: Sequence[PruneSite]
    plan: PaddingPlan
    repeated: frozenset[str] = frozenset()
    batch_count: int = 0
    batch_size: int | None = None
    weighting: str = "none"
    weighted: frozenset[str] = frozenset()
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)
    _padding: dict[str, int] = field(default_factory=dict)
    _samples: dict[str, int] = field(default_factory=dict)
    _norms: dict[str, Tensor] = field(default_factory=dict)
    _normed: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, list[Reduction]] = field(default_factory=dict)
    _met: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.by_fqn: dict[str, list[PruneSite]] = {}
        self._by_expert: dict[tuple[str, int], list[PruneSite]] = {}
        for site in self.sites:
            self.by_fqn.setdefault(site.fqn, []).append(site)
            if site.expert is not None:
                self._by_expert.setdefault((site.fqn, site.expert), []).append(site)
        self.tracker = PaddingTracker(self.plan.masks)

    def begin_batch(self, tensors: Mapping[str, Tensor]) -> None:
        """A forward pass starts on these inputs."""
        self._seen, self._met = {}, set()
        self.tracker.begin(tensors)
        sizes = {tensor.shape[0] for tensor in tensors.values() if tensor.ndim}
        self.batch_size = sizes.pop() if len(sizes) == 1 else None

    def end_batch(self) -> None:
        """The forward pass is over: add what it gave, each distinct activation once per site."""
        for name, reductions in self._seen.items():
            for reduction in distinct(reductions):
                previous = self._sums.get(name)
                sums = reduction.sum_of_squares
                self._sums[name] = sums.clone() if previous is None else previous + sums
                self._tokens[name] = self._tokens.get(name, 0) + reduction.token_count
                self._padding[name] = self._padding.get(name, 0) + reduction.padding_count
                self._samples[name] = self._samples.get(name, 0) + reduction.sample_count
                self._add_norms(name, reduction.weighted)
        for fqn in self._met:  # every sample passed through the router, whichever expert it was sent to
            for site in self.by_fqn[fqn]:
                self._samples[site.name] = self._samples.get(site.name, 0) + (self.batch_size or 1)
        self.batch_count += 1
        self._seen, self._met = {}, set()
        self.tracker.end()

    def _add_norms(self, name: str, weighted: WeightedNorms | None) -> None:
        if weighted is not None:
            total = weighted.norms[weighted.counted].sum(0)
            self._norms[name] = self._norms[name] + total if name in self._norms else total
            self._normed[name] = self._normed.get(name, 0) + int(weighted.counted.sum())

    def reduce(
        self, activation: Tensor, reading: Reading, experts: int | None, routing: Tensor | None, *, by_sample: bool
    ) -> Reduction | RoutedReduction:
        """Reduce an activation, without its padding.

        Args:
            activation: as it reaches the operator.
            reading: how it is read.
            experts: number of experts that it meets, None for a weight that is a single matrix.
            routing: which rows meet which expert.
            by_sample: tell repeats of a sample apart, where it meets a single matrix.
        """
        with self.tracker.paused(activation, routing):
            activation = read(activation, reading)
            keep = self.tracker.keep(activation, reading.features)
            if experts is not None:
                return reduce_routed(activation, reading, experts, routing, keep)
            return reduce_activation(activation, reading.features, keep, batch_size=self.batch_size, by_sample=by_sample)

    def add(self, fqn: str, rows: tuple[int, int], experts: tuple[int, int], reduction: Reduction | RoutedReduction) -> None:
        """An activation met these output rows of these experts of a weight."""
        if isinstance(reduction, Reduction):
            self._add(self.by_fqn.get(fqn, ()), rows, reduction)
            return
        self._met.add(fqn)
        for index, expert in enumerate(range(*experts)):
            own = reduction.of_expert(index)
            if own is not None:
                self._add(self._by_expert.get((fqn, expert), ()), rows, own)

    def _add(self, sites: Iterable[PruneSite], rows: tuple[int, int], reduction: Reduction) -> None:
        for site in sites:
            if rows[0] <= site.rows[0] and site.rows[1] <= rows[1]:
                self.take(site, reduction)

    def take(self, site: PruneSite, reduction: Reduction) -> None:
        """A site met this activation in the running forward pass."""
        self._seen.setdefault(site.name, []).append(reduction)

    def is_routed(self, fqn: str) -> bool:
        """The weight is a stack of experts."""
        return any(site.expert is not None for site in self.by_fqn.get(fqn, ())[:1])

    def statistics(self) -> dict[str, SiteStatistics]:
        """Site name -> statistics; a site that was never called has zero tokens."""
        found = {}
        for site in self.sites:
            zeros = torch.zeros(site.in_features, dtype=torch.float64, device="cpu")
            plain = SiteStatistics(
                self._sums.get(site.name, zeros).cpu(),
                self._tokens.get(site.name, 0),
                self._padding.get(site.name, 0),
                self._samples.get(site.name, 0),
            )
            if self.weighting != "none" and site.fqn in self.weighted:
                norms, count = self._norms.get(site.name, zeros).cpu(), self._normed.get(site.name, 0)
                plain = replace(plain, weighting=self.weighting, norm_sum=norms, norm_count=count)
            elif self.weighting != "none":
                plain = replace(plain, weighting="uniform")
            found[site.name] = plain
        return found


class ModuleObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Watches every contraction that a module runs and reduces the activations that meet a site's weight.

    Weights are recognised by their storage, so that fused, sliced and functional uses are seen as well. The q, k and v
    projections of one activation share one reduction; no activation is kept alive.

    Args:
        module: the module that will run.
        collector: where the reductions go.

    Attributes:
        places: where the weights of the sites are, and their copies.
        state: what the forward passes wrote into parameters and buffers; ``state.restore()`` puts it back.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, collector: StatisticsCollector) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collector = collector
        self.state = KeptState(module)
        self.places = WeightPlaces((fqn, item) for fqn, item in module.named_parameters() if fqn in collector.by_fqn)
        self._known: dict[Any, tuple[str, Match]] = {}  # what a linear layer's weight was found to be
        self._recent: list[tuple[weakref.ref[Tensor], object, Reduction | RoutedReduction]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_eagerly(func, args, kwargs, self, "the model")
        name = func._schema.name.partition("::")[2]
        if name in CONTRACTIONS or name in CONVOLUTIONS:
            self._observe(name, args, kwargs)
        self.state.before(func, args, kwargs)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._recent.clear()
        self.places.follow(name, args, result)
        self.collector.tracker.follow(func, args, kwargs, result)
        return result

    def _observe(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        is_plain = name == "linear" and len(args) > 1 and self.places.is_stored(args[1])
        key = _layout_key(args[1]) if is_plain else None
        if key in self._known:
            self._add(*self._known[key], args[0])
            return
        for pairing in pairings(name, args, kwargs):
            weight, activation = pairing.weight, pairing.activation
            if not isinstance(weight, Tensor) or not isinstance(activation, Tensor):
                continue
            for place in self.places.of(weight):
                found = match(pairing, place.tensor, place.parameter, place.gathered_by)
                if found is not None:
                    if key is not None:
                        self._known[key] = place.fqn, found
                    self._add(place.fqn, found, activation)
                    return

    def _add(self, fqn: str, found: Match, activation: Tensor) -> None:
        reduction = self._reduce(fqn, activation, found.reading, found.experts, found.routed_by)
        self.collector.add(fqn, found.rows, found.experts, reduction)

    def _reduce(
        self, fqn: str, activation: Tensor, reading: Reading, experts: tuple[int, int], routing: Tensor | None
    ) -> Reduction | RoutedReduction:
        by_sample = fqn in self.collector.repeated
        count = experts[1] - experts[0] if self.collector.is_routed(fqn) else None
        key = (reading, count, id(routing))
        for reference, known, reduction in self._recent:
            if reference() is activation and known == key:
                if by_sample and isinstance(reduction, Reduction) and reduction.by_sample is None:
                    continue
                return reduction
        reduced = self.collector.reduce(activation, reading, count, routing, by_sample=by_sample)
        self._recent = [*self._recent[-1:], (weakref.ref(activation), key, reduced)]
        return reduced


def _layout_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory."""
    return storage_address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


class ActivationObserver(nn.Module):
    """A node's worth of observing: reduces the activation and hands it to every use of it."""

    def __init__(self, collector: StatisticsCollector, uses: Sequence[WeightUse]) -> None:
        super().__init__()
        self._collector = collector
        self._uses = tuple(uses)

    def forward(self, activation: Tensor, routing: Tensor | None = None) -> None:
        """Reduce ``activation`` as its uses read it; ``routing`` says which rows meet which expert."""
        collector, first = self._collector, self._uses[0]
        by_sample = any(use.fqn in collector.repeated for use in self._uses)
        count = _expert_count(first, collector)
        reduction = collector.reduce(activation, first.reading, count, routing, by_sample=by_sample)
        for use in self._uses:
            collector.add(use.fqn, use.rows, use.experts, reduction)


def _expert_count(use: WeightUse, collector: StatisticsCollector) -> int | None:
    """Number of experts that a use meets; None where its weight is a single matrix."""
    return use.experts[1] - use.experts[0] if collector.is_routed(use.fqn) else None


@dataclass(frozen=True)
class InsertObservers:
    """Insert one observer per activation that feeds pruned sites, before its first use.

    ::

        x --> linear(x, w_q)            x --> observer_0(x)
          \\-> linear(x, w_k)    ==>      \\-> linear(x, w_q)
                                          \\-> linear(x, w_k)

    Attributes:
        regions: the region map, whose evidence names the uses.
        collector: where the observers report.
    """

    regions: RegionMap
    collector: StatisticsCollector

    def requires(self, graph: CapturedGraph) -> None:
        """Every use in the evidence is a node of this graph."""
        names = {node.name for node in graph.graph.nodes}
        missing = [use.node for uses in self.regions.evidence.values() for use in uses if use.node not in names]
        if missing:
            raise PreconditionError(f"the region map was made for another graph: it has no node {missing[0]}")

    def apply(self, graph: CapturedGraph) -> PassResult:
        """A graph with observers; weights and the other nodes are the same."""
        new_graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = new_graph.graph_copy(graph.graph, copies)
        new_graph.output(output)
        root = shallow_root(graph.graph_module)
        by_name = {node.name: copy for node, copy in copies.items()}
        order = {node.name: index for index, node in enumerate(graph.graph.nodes)}
        writes = writes_before(graph.graph)
        groups: dict[tuple[Any, ...], list[WeightUse]] = {}
        for fqn in self.collector.by_fqn:
            for use in self.regions.evidence.get(fqn, ()):
                # An activation that is written in place between two uses is another one for the second.
                seen = (use.activation, use.routed_by, use.reading, _expert_count(use, self.collector), writes[use.node])
                groups.setdefault(seen, []).append(use)
        for index, ((activation, routed_by, *_), group) in enumerate(groups.items()):
            target = f"mfcompile_observer_{index}"
            root.add_module(target, ActivationObserver(self.collector, group))
            first = min((use.node for use in group), key=lambda name: order[name])
            with new_graph.inserting_before(by_name[first]):
                new_graph.call_module(target, tuple(by_name[name] for name in (activation, routed_by) if name is not None))
        return PassResult(replace(graph, graph_module=fx.GraphModule(root, new_graph)), modified=bool(groups))

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Nothing but observers was added."""
        added = [node for node in result.graph.graph.nodes if node.op == "call_module"]
        if len(result.graph.graph.nodes) - len(before.graph.nodes) != len(added):
            raise PostconditionError("inserting observers changed other nodes of the graph")


def writes_before(graph: fx.Graph) -> dict[str, int]:
    """Node name -> how many operators before it write in place."""
    count, found = 0, {}
    for node in graph.nodes:
        found[node.name] = count
        count += bool(written_arguments(node))
    return found


def shallow_root(graph_module: fx.GraphModule) -> nn.Module:
    """A module that holds the same attributes as a graph module: submodules and tensors are shared."""
    root = nn.Module()
    for name, child in graph_module.named_children():
        root.add_module(name, child)
    for name, parameter in graph_module.named_parameters(recurse=False):
        root.register_parameter(name, parameter)
    for name, buffer in graph_module.named_buffers(recurse=False):
        root.register_buffer(name, buffer)
    return root
