"""Least squares after structured removal: what is left of a unit stands in for what went, through other values of W_out.

A unit is what W_out sums over, so that taking elements out is setting columns of W_out to zero. With x_t the inputs of W_out,
of which the places K stay, its new values V and its new bias c are

    argmin  sum_t || W x_t + b - V x_t,K - c ||^2  +  damping || V - W_K ||^2        over V and c,

the problem of ``least_squares`` (SparseGPT, ICML 2023, Eq. 1) with one support for all rows, and a bias, which is not damped.
Forward passes are all that it takes. Its aim, its inputs and its order are those of the weight update: the dense layer's output
on the inputs that the model gives whose earlier units are gone and refitted, stage by stage (``weight_update``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.calibration import plan_padding, repeated_weights, run_batches
from mfcompile.passes.gram import GramCollector
from mfcompile.passes.least_squares import LeastSquares, LeastSquaresOptions
from mfcompile.passes.operators import CONVOLUTIONS, argument, operator_name
from mfcompile.passes.random_numbers import seeded
from mfcompile.passes.update_stages import group_sites, plan_stages
from mfcompile.passes.weight_update import SiteUpdate, refused_gram
from mfcompile.passes.weight_values import with_values
from mfcompile.region import PruneSite, RegionMap, WeightUse


@dataclass(frozen=True)
class Refit:
    """Values for the output weights of units that lose elements.

    Attributes:
        values: FQN of every W_out, and of its bias where it has one of its own -> the values, in the sizes of the whole
            model: columns of elements that go are zero.
        updates: what became of every W_out; ``masked_error`` is that of removal alone.
    """

    values: Mapping[str, Tensor]
    updates: tuple[SiteUpdate, ...]

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Output weights whose values stay, and why."""
        return tuple(
            Diagnostic(item.name, f"it is not refitted: {item.left}") for item in self.updates if item.left is not None
        )


def refit_outputs(
    captured: CapturedGraph,
    regions: RegionMap,
    kept: Mapping[str, Tensor],
    batches: Callable[[], Iterable[Any]],
    options: LeastSquaresOptions | None = None,
    seed: int = 0,
) -> Refit:
    """Values for output weights of which some inputs go; those of the rest stand in for them as well as they can.

    Args:
        captured: the model with all elements; its weights are read, never written.
        regions: its regions, with the output weights among the pruned sites; others are left as they are.
        kept: FQN of W_out -> bool in its shape, False where inputs of elements that go are read.
        batches: gives the calibration batches; they are run once per stage.
        options: damping, memory, passes.
        seed: of what the model draws.

    Returns:
        The values. A row whose output would not come closer to the dense one keeps its own.

    Raises:
        InputError: the model cannot be copied.
        CalibrationError: there is no batch, or one that the model refuses.
    """
    asked = options or LeastSquaresOptions()
    sites = [site for site in regions.pruned_sites if site.fqn in kept and site.expert is None]
    found = {site.fqn for site in sites}
    weights = {
        fqn: torch.where(mask.to(_own(captured, fqn).device), _own(captured, fqn), 0.0)
        for fqn, mask in kept.items()
        if fqn not in found
    }
    updates = [SiteUpdate(fqn, 0.0, 0.0, "calibration does not observe its inputs") for fqn in weights]
    biases = own_biases(captured, regions, found)
    plan, repeated = plan_padding(captured, regions, asked.padding_mask), repeated_weights(regions)
    for stage in plan_stages(group_sites(captured, regions, sites), int(asked.memory_mib * 2**20), asked.passes):
        reached = [site for group in stage for site in group.sites]
        collector = GramCollector(reached, plan, repeated, has_ones=True)
        current = with_values(captured, weights) if weights else captured
        with seeded(seed, captured.module):
            run_batches(current, regions, collector, batches(), plan, num_samples=asked.num_samples)
        for site in reached:
            bias = biases.get(site.fqn)
            update, matrix = _solved(
                site, _own(captured, site.fqn), kept[site.fqn], _own(captured, bias) if bias else None, collector, asked
            )
            updates.append(update)
            _write(captured, weights, site, bias, matrix)
    return Refit(weights, tuple(updates))


def own_biases(captured: CapturedGraph, regions: RegionMap, fqns: Iterable[str]) -> dict[str, str]:
    """FQN of a weight -> FQN of the bias that the operator that reads it adds, where that is read nowhere else.

    A bias that another operator adds is none: it may be added to other things too.
    """
    nodes = {node.name: node for node in captured.graph.nodes}
    readers: dict[str, set[fx.Node]] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr" and node.name in captured.parameter_nodes:
            readers.setdefault(captured.parameter_nodes[node.name], set()).update(node.users)
    found: dict[str, str] = {}
    for fqn in fqns:
        uses = regions.evidence.get(fqn, ())
        own = {_bias_of(captured, nodes[use.node], use) for use in uses}
        bias = own.pop() if len(own) == 1 else None
        if bias is None or readers[bias] != {nodes[use.node] for use in uses}:
            continue
        rows = {use.rows for use in uses}
        if rows == {(0, captured.parameter(bias).numel())} and isinstance(captured.parameter(bias), nn.Parameter):
            found[fqn] = bias
    return found


def _bias_of(captured: CapturedGraph, node: fx.Node, use: WeightUse) -> str | None:
    """FQN of the (out_features,) parameter that a linear operator adds to its product as it is."""
    name = operator_name(node)
    if name == "linear" or name in CONVOLUTIONS:
        bias = argument(node, "bias", 2)
    elif name == "addmm" and use.reading.features == (-1,) and {node.kwargs.get(key, 1) for key in ("alpha", "beta")} == {1}:
        bias = argument(node, "self", 0)
    else:
        return None
    fqn = captured.parameter_nodes.get(bias.name) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
    return fqn if fqn is not None and captured.parameter(fqn).ndim == 1 else None


def _solved(
    site: PruneSite,
    weight: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    collector: GramCollector,
    options: LeastSquaresOptions,
) -> tuple[SiteUpdate, Tensor]:
    """What became of a site, and its (out_features, in_features) values; with a bias that is one column more."""
    dense, stays = (site.matrix(site.layout.matrices(item)) for item in (weight, kept.to(weight.device)))
    if bias is not None:
        dense = torch.cat([dense, bias.unsqueeze(1).to(dense.dtype)], 1)
        stays = torch.cat([stays, stays.new_ones(len(stays), 1)], 1)
    gram = collector.gram(site)
    left = refused_gram(None if gram is None else gram[:-1, :-1])
    if gram is None or left is not None:
        return SiteUpdate(site.name, 0.0, 0.0, left), torch.where(stays, dense, 0.0)
    solver = LeastSquares(gram if bias is not None else gram[:-1, :-1], options.damping, has_bias=bias is not None)
    result = solver.reconstruct(dense, stays)
    if not result.rows and result.masked_error:
        left = "no row of its output comes closer to the dense one"
    return SiteUpdate(site.name, result.masked_error, result.error, left), result.weight


def _write(captured: CapturedGraph, weights: dict[str, Tensor], site: PruneSite, bias: str | None, matrix: Tensor) -> None:
    """Put the values of a site, and of its bias behind them, among the new ones."""
    if bias is not None:
        weights[bias] = matrix[:, -1].to(_own(captured, bias).dtype).contiguous()
        matrix = matrix[:, :-1]
    weight = weights.get(site.fqn)
    if weight is None:
        weight = _own(captured, site.fqn).clone(memory_format=torch.contiguous_format)
    whole = site.layout.matrices(weight)
    site.matrix(whole).copy_(matrix)
    weights[site.fqn] = site.layout.stored(whole, weight.shape).contiguous()


def _own(captured: CapturedGraph, fqn: str) -> Tensor:
    return captured.parameter(fqn).detach()
