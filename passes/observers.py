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
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.errors import PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.base import PassResult
from mfcompile.passes.operators import CONTRACTIONS
from mfcompile.passes.padding import CallKey, PaddingPlan
from mfcompile.passes.weights import locate_operand, operand_pairs
from mfcompile.region import PruneSite, RegionMap, WeightUse
from mfcompile.statistics import SiteStatistics


@dataclass(frozen=True)
class Reduction:
    """One activation, reduced: sums of squares (in_features,) in float64, and how many rows went in."""

    sum_of_squares: Tensor
    token_count: int
    padding_count: int
    sample_count: int


def reduce_activation(activation: Tensor, feature_dim: int = -1, keep: Tensor | None = None) -> Reduction:
    """Sum of squares of every feature over all kept rows (the inner sum of ||a||_2, Eq. 4 and 5).

    Each sample is summed on its own in float32, samples are added in float64: the result depends neither on how
    samples are batched nor on their order beyond the last bit of float64.

    Args:
        activation: (..., in_features), or (..., in_features, n) with feature_dim=-2; any float dtype.
        feature_dim: dimension of the features, counted from the end.
        keep: bool, sizes of the activation without the feature dimension; False rows are padding.

    Returns:
        The reduction; a row that is left out cannot spread NaN.
    """
    rows = activation if feature_dim == -1 else activation.movedim(feature_dim, -1)
    leading = rows.shape[:-1]
    samples = int(leading[0]) if leading else 1
    matrix = rows.reshape(samples if len(leading) > 1 else 1, -1, rows.shape[-1]).float()
    total = matrix.shape[0] * matrix.shape[1]
    if keep is None:
        ones = torch.ones((), dtype=matrix.dtype, device=matrix.device).expand(matrix.shape[0], 1, matrix.shape[1])
        return Reduction(_weighted_squares(ones, matrix), total, 0, samples)
    weights = keep.reshape(matrix.shape[0], 1, matrix.shape[1])
    counted = int(weights.sum())
    sums = _weighted_squares(weights.to(matrix.dtype), matrix)
    if not bool(torch.isfinite(sums).all()):
        sums = _weighted_squares(weights.to(matrix.dtype), torch.where(weights.mT, matrix, 0.0))
    return Reduction(sums, counted, total - counted, samples)


def _weighted_squares(weights: Tensor, matrix: Tensor) -> Tensor:
    """(b, 1, n) x (b, n, f) -> (f,) float64. A matrix product: five times faster than a norm over rows."""
    return torch.bmm(weights, matrix * matrix).squeeze(1).double().sum(0)


@dataclass
class StatisticsCollector:
    """Adds reductions up per site. Not thread-safe.

    Attributes:
        sites: the sites that want statistics.
        plan: where padding is.
    """

    sites: Sequence[PruneSite]
    plan: PaddingPlan
    batch_count: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)
    _padding: dict[str, int] = field(default_factory=dict)
    _samples: dict[str, int] = field(default_factory=dict)
    _inputs: Mapping[str, Tensor] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, list[Reduction]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_fqn: dict[str, list[PruneSite]] = {}
        for site in self.sites:
            self.by_fqn.setdefault(site.fqn, []).append(site)

    def begin_batch(self, tensors: Mapping[str, Tensor]) -> None:
        """A forward pass starts on these inputs."""
        self._inputs, self._calls, self._seen = tensors, {}, {}

    def end_batch(self) -> None:
        """The forward pass is over: add what it gave, each distinct activation once per site."""
        for name, reductions in self._seen.items():
            for reduction in _distinct(reductions):
                previous = self._sums.get(name)
                sums = reduction.sum_of_squares
                self._sums[name] = sums.clone() if previous is None else previous + sums
                self._tokens[name] = self._tokens.get(name, 0) + reduction.token_count
                self._padding[name] = self._padding.get(name, 0) + reduction.padding_count
                self._samples[name] = self._samples.get(name, 0) + reduction.sample_count
        self.batch_count += 1
        self._inputs, self._seen = {}, {}

    def next_call(self, fqn: str) -> CallKey:
        """Number the calls of a weight within one forward pass."""
        index = self._calls.get(fqn, 0)
        self._calls[fqn] = index + 1
        return (fqn, index)

    def keep(self, call: CallKey, activation: Tensor, feature_dim: int) -> Tensor | None:
        """Which rows of the activation are tokens, None for all."""
        sizes = list(activation.shape)
        del sizes[feature_dim]
        return self.plan.keep(call, tuple(sizes), self._inputs)

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


def _distinct(reductions: list[Reduction]) -> list[Reduction]:
    """Without repeats of the same activation: a call on the same input adds no information."""
    found: list[Reduction] = []
    for reduction in reductions:
        if not any(
            other.token_count == reduction.token_count
            and torch.allclose(other.sum_of_squares, reduction.sum_of_squares, rtol=1e-6, atol=0.0)
            for other in found
        ):
            found.append(reduction)
    return found


class ModuleObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Watches every contraction that a module runs and reduces the activations that meet a site's weight.

    Weights are recognised by their storage, so that fused, sliced and functional uses are seen as well. The q, k and v
    projections of one activation share one reduction; no activation is kept alive.
    """

    def __init__(self, module: nn.Module, collector: StatisticsCollector) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collector = collector
        self._parameters: dict[int, list[tuple[str, Tensor]]] = {}
        for fqn, parameter in module.named_parameters():
            if fqn in collector.by_fqn:
                self._parameters.setdefault(parameter.untyped_storage().data_ptr(), []).append((fqn, parameter))
        self._recent: list[tuple[weakref.ref[Tensor], int, str | None, Reduction]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in CONTRACTIONS:
            self._observe(name, args, kwargs)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._recent.clear()
        return result

    def _observe(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for weight, contracted, activation, feature_dim in operand_pairs(name, args, kwargs):
            if not isinstance(weight, Tensor) or not isinstance(activation, Tensor):
                continue
            for fqn, parameter in self._parameters.get(weight.untyped_storage().data_ptr(), ()):
                view = locate_operand(weight, contracted, parameter)
                if view is not None:
                    call = self.collector.next_call(fqn)
                    self.collector.add(fqn, view.rows, self._reduce(call, activation, feature_dim))
                    return

    def _reduce(self, call: CallKey, activation: Tensor, feature_dim: int) -> Reduction:
        keep = self.collector.keep(call, activation, feature_dim)
        mask = None if keep is None else self.collector.plan.covered.get(call, "by shape")
        for reference, dim, covered, reduction in self._recent:
            if reference() is activation and dim == feature_dim and covered == mask:
                return reduction
        reduction = reduce_activation(activation, feature_dim, keep)
        self._recent = [*self._recent[-1:], (weakref.ref(activation), feature_dim, mask, reduction)]
        return reduction


class ShapeObserver(ModuleObserver):  # type: ignore[no-untyped-call]
    """Notes the leading sizes of every activation that meets a site's weight, and reduces nothing."""

    def __init__(self, module: nn.Module, collector: StatisticsCollector) -> None:
        super().__init__(module, collector)
        self.shapes: dict[CallKey, tuple[int, ...]] = {}

    def _reduce(self, call: CallKey, activation: Tensor, feature_dim: int) -> Reduction:
        sizes = list(activation.shape)
        del sizes[feature_dim]
        self.shapes[call] = tuple(sizes)
        return Reduction(torch.zeros(0, dtype=torch.float64), 0, 0, 0)


class ActivationObserver(nn.Module):
    """A node's worth of observing: reduces the activation and hands it to every use of it."""

    def __init__(self, collector: StatisticsCollector, uses: Sequence[tuple[WeightUse, CallKey]]) -> None:
        super().__init__()
        self._collector = collector
        self._uses = tuple(uses)

    def forward(self, activation: Tensor) -> None:
        """Reduce ``activation`` (any shape with the features at the uses' feature dimension)."""
        done: list[tuple[Tensor | None, Reduction]] = []
        for use, call in self._uses:
            keep = self._collector.keep(call, activation, use.feature_dim)
            reduction = next((old for mask, old in done if _same(mask, keep)), None)
            if reduction is None:
                reduction = reduce_activation(activation, use.feature_dim, keep)
                done.append((keep, reduction))
            self._collector.add(use.fqn, use.rows, reduction)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None) == (other is None) and (one is None or other is None or torch.equal(one, other))


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
        groups: dict[tuple[str, int], list[tuple[WeightUse, CallKey]]] = {}
        for fqn in self.collector.by_fqn:
            uses = sorted(self.regions.evidence.get(fqn, ()), key=lambda use: order[use.node])
            for call, use in enumerate(uses):
                groups.setdefault((use.activation, use.feature_dim), []).append((use, (fqn, call)))
        for index, ((activation, _), group) in enumerate(groups.items()):
            target = f"mfcompile_observer_{index}"
            root.add_module(target, ActivationObserver(self.collector, group))
            first = min((use.node for use, _ in group), key=lambda name: order[name])
            with new_graph.inserting_before(by_name[first]):
                new_graph.call_module(target, (by_name[activation],))
        return PassResult(replace(graph, graph_module=fx.GraphModule(root, new_graph)), modified=bool(groups))

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Nothing but observers was added."""
        added = [node for node in result.graph.graph.nodes if node.op == "call_module"]
        if len(result.graph.graph.nodes) - len(before.graph.nodes) != len(added):
            raise PostconditionError("inserting observers changed other nodes of the graph")


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
