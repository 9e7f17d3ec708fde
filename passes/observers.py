"""Observers: the sum of squares of every activation that feeds a prune site, while the model runs.

Two ways to observe, one reduction: ``InsertObservers`` puts observers into a captured graph, ``ModuleObserver``
watches the user's own module run, for batches that do not fit a specialised graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.control_flow import run_eagerly
from mfcompile.errors import PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph
from mfcompile.module_copy import KeptState, storage_address
from mfcompile.passes.base import PassResult
from mfcompile.passes.operators import CONTRACTIONS, written_arguments
from mfcompile.passes.padding import PaddingPlan
from mfcompile.passes.padding_flow import PaddingTracker
from mfcompile.passes.reduction import Reduction, distinct, reduce_activation
from mfcompile.passes.weights import locate_operand, operand_pairs
from mfcompile.region import PruneSite, RegionMap, WeightUse
from mfcompile.statistics import SiteStatistics

_COPIES = frozenset({"clone", "contiguous", "to", "_to_copy"})
"""Operators that may give a weight in memory of its own, in its layout."""


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
    """

    sites: Sequence[PruneSite]
    plan: PaddingPlan
    repeated: frozenset[str] = frozenset()
    batch_count: int = 0
    batch_size: int | None = None
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)
    _padding: dict[str, int] = field(default_factory=dict)
    _samples: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, list[Reduction]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_fqn: dict[str, list[PruneSite]] = {}
        for site in self.sites:
            self.by_fqn.setdefault(site.fqn, []).append(site)
        self.tracker = PaddingTracker(self.plan.masks)

    def begin_batch(self, tensors: Mapping[str, Tensor]) -> None:
        """A forward pass starts on these inputs."""
        self._seen = {}
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
        self.batch_count += 1
        self._seen = {}
        self.tracker.end()

    def add(self, fqn: str, rows: tuple[int, int], reduction: Reduction) -> None:
        """An activation met these output rows of a weight."""
        for site in self.by_fqn.get(fqn, ()):
            if rows[0] <= site.rows[0] and site.rows[1] <= rows[1]:
                self._seen.setdefault(site.name, []).append(reduction)

    def statistics(self) -> dict[str, SiteStatistics]:
        """Site name -> statistics; a site that was never called has zero tokens."""
        return {
            site.name: SiteStatistics(
                self._sums.get(site.name, torch.zeros(site.in_features, dtype=torch.float64)).cpu(),
                self._tokens.get(site.name, 0),
                self._padding.get(site.name, 0),
                self._samples.get(site.name, 0),
            )
            for site in self.sites
        }


@dataclass(frozen=True)
class _Copy:
    """(Part of) a parameter in memory of its own.

    Attributes:
        fqn, parameter: the parameter.
        source: meta tensor, where the copied part lies in the parameter.
        result: meta tensor, how the copy lies in its memory.
        storage: that memory.
    """

    fqn: str
    parameter: Tensor
    source: Tensor
    result: Tensor
    storage: StorageWeakRef

    def place_of(self, view: Tensor) -> Tensor | None:
        """Where in the parameter a view of the copy lies; None when the layouts differ and it is not the whole copy."""
        if self.source.stride() == self.result.stride():
            return _place(view, int(self.source.storage_offset()) - int(self.result.storage_offset()))
        is_whole = (view.shape, view.stride()) == (self.result.shape, self.result.stride())
        return self.source if is_whole else None


def _place(tensor: Tensor, shift: int = 0) -> Tensor:
    """A tensor's sizes, strides and offset on the meta device."""
    offset = int(tensor.storage_offset()) + shift
    extent = 1 + offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size)
    return torch.empty(extent, device="meta").as_strided(tensor.shape, tensor.stride(), offset)


class ModuleObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Watches every contraction that a module runs and reduces the activations that meet a site's weight.

    Weights are recognised by their storage, so that fused, sliced and functional uses are seen as well. The q, k and v
    projections of one activation share one reduction; no activation is kept alive.

    Args:
        module: the module that will run.
        collector: where the reductions go.

    Attributes:
        state: what the forward passes wrote into parameters and buffers; ``state.restore()`` puts it back.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, collector: StatisticsCollector) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collector = collector
        self.state = KeptState(module)
        self._parameters: dict[int, list[tuple[str, Tensor]]] = {}
        self._copies: dict[int, _Copy] = {}
        for fqn, parameter in module.named_parameters():
            if fqn in collector.by_fqn:
                self._parameters.setdefault(storage_address(parameter), []).append((fqn, parameter))
        self._recent: list[tuple[weakref.ref[Tensor], int, Reduction]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_eagerly(func, args, kwargs, self, "the model")
        name = func._schema.name.partition("::")[2]
        if name in CONTRACTIONS:
            self._observe(name, args, kwargs)
        self.state.before(func, args, kwargs)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._recent.clear()
        if name in _COPIES:
            self._follow_copy(args[0], result)
        self.collector.tracker.follow(func, args, kwargs, result)
        return result

    def _follow_copy(self, source: Tensor, result: Tensor) -> None:
        """A weight that is cast or copied is the same weight in other memory."""
        address = storage_address(result)
        if address != storage_address(source):
            for fqn, parameter, place in self._places(source):
                storage = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
                self._copies[address] = _Copy(fqn, parameter, _place(place), _place(result), storage)

    def _places(self, weight: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """(FQN, parameter, where in the parameter the tensor lies) for every site weight that it may be rows of."""
        address = storage_address(weight)
        copy = self._copies.get(address)
        if copy is None:
            return [(fqn, parameter, weight) for fqn, parameter in self._parameters.get(address, ())]
        if copy.storage.expired():  # type: ignore[no-untyped-call]
            del self._copies[address]
            return []
        place = copy.place_of(weight)
        return [] if place is None else [(copy.fqn, copy.parameter, place)]

    def _observe(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for weight, contracted, activation, feature_dim in operand_pairs(name, args, kwargs):
            if not isinstance(weight, Tensor) or not isinstance(activation, Tensor):
                continue
            for fqn, parameter, place in self._places(weight):
                view = locate_operand(place, contracted, parameter)
                if view is not None:
                    self.collector.add(fqn, view.rows, self._reduce(fqn, activation, feature_dim))
                    return

    def _reduce(self, fqn: str, activation: Tensor, feature_dim: int) -> Reduction:
        by_sample = fqn in self.collector.repeated
        for reference, dim, reduction in self._recent:
            if reference() is activation and dim == feature_dim:
                if by_sample and reduction.by_sample is None:
                    continue
                return reduction
        keep = self.collector.tracker.keep(activation, feature_dim)
        batch_size = self.collector.batch_size
        reduction = reduce_activation(activation, feature_dim, keep, batch_size=batch_size, by_sample=by_sample)
        self._recent = [*self._recent[-1:], (weakref.ref(activation), feature_dim, reduction)]
        return reduction


class ActivationObserver(nn.Module):
    """A node's worth of observing: reduces the activation and hands it to every use of it."""

    def __init__(self, collector: StatisticsCollector, uses: Sequence[WeightUse]) -> None:
        super().__init__()
        self._collector = collector
        self._uses = tuple(uses)

    def forward(self, activation: Tensor) -> None:
        """Reduce ``activation`` (any shape with the features at the uses' feature dimension)."""
        collector, feature_dim = self._collector, self._uses[0].feature_dim
        by_sample = any(use.fqn in collector.repeated for use in self._uses)
        with collector.tracker.paused():
            keep = collector.tracker.keep(activation, feature_dim)
            reduction = reduce_activation(activation, feature_dim, keep, batch_size=collector.batch_size, by_sample=by_sample)
        for use in self._uses:
            collector.add(use.fqn, use.rows, reduction)


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
        root = _shallow_root(graph.graph_module)
        by_name = {node.name: copy for node, copy in copies.items()}
        order = {node.name: index for index, node in enumerate(graph.graph.nodes)}
        writes = _writes_before(graph.graph)
        groups: dict[tuple[str, int, int], list[WeightUse]] = {}
        for fqn in self.collector.by_fqn:
            for use in self.regions.evidence.get(fqn, ()):
                # An activation that is written in place between two uses is another one for the second.
                groups.setdefault((use.activation, use.feature_dim, writes[use.node]), []).append(use)
        for index, ((activation, _, _), group) in enumerate(groups.items()):
            target = f"mfcompile_observer_{index}"
            root.add_module(target, ActivationObserver(self.collector, group))
            first = min((use.node for use in group), key=lambda name: order[name])
            with new_graph.inserting_before(by_name[first]):
                new_graph.call_module(target, (by_name[activation],))
        return PassResult(replace(graph, graph_module=fx.GraphModule(root, new_graph)), modified=bool(groups))

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Nothing but observers was added."""
        added = [node for node in result.graph.graph.nodes if node.op == "call_module"]
        if len(result.graph.graph.nodes) - len(before.graph.nodes) != len(added):
            raise PostconditionError("inserting observers changed other nodes of the graph")


def _writes_before(graph: fx.Graph) -> dict[str, int]:
    """Node name -> how many operators before it write in place."""
    count, found = 0, {}
    for node in graph.nodes:
        found[node.name] = count
        count += bool(written_arguments(node))
    return found


def _shallow_root(graph_module: fx.GraphModule) -> nn.Module:
    """A module that holds the same attributes as a graph module: submodules and tensors are shared."""
    root = nn.Module()
    for name, child in graph_module.named_children():
        root.add_module(name, child)
    for name, parameter in graph_module.named_parameters(recurse=False):
        root.register_parameter(name, parameter)
    for name, buffer in graph_module.named_buffers(recurse=False):
        root.register_buffer(name, buffer)
    return root
