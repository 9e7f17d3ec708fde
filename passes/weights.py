"""Find every use of a stored linear weight in a graph, by following its views.

A parameter reaches the operator that multiplies it through transposes, slices, splits, reshapes and look-ups of whole
matrices. These are run on a meta tensor of the same shape; ``placement`` reads off offset and strides which rows of which
matrices are used. Shapes alone cannot tell, and names are not asked.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mfcompile.graph import CapturedGraph, Diagnostic, module_stack
from mfcompile.passes.operands import convolution_refusal, pairings
from mfcompile.passes.operators import (
    BILINEAR,
    CONTRACTIONS,
    CONVOLUTIONS,
    RECURRENT,
    argument,
    is_view,
    operator_name,
)
from mfcompile.passes.placement import Match, match
from mfcompile.passes.subgraphs import subgraph_weights
from mfcompile.region import WeightUse

_KEEPS_LAYOUT = frozenset({"to", "contiguous", "clone", "detach", "alias", "lift_fresh", "_to_copy", "detach_"})
_PRODUCTS = CONTRACTIONS | CONVOLUTIONS
_SPLITS = frozenset({"split", "chunk", "unbind", "split_with_sizes", "tensor_split"})


@dataclass(frozen=True)
class ParameterView:
    """What a node takes of one stored parameter.

    Attributes:
        fqn: the parameter.
        tensor: on the meta device, where it lies in the parameter.
        gathered_by: the node of indices that picked matrices along dimension 0; ``tensor`` has step 0 along theirs.
    """

    fqn: str
    tensor: Tensor
    gathered_by: fx.Node | None = None


@dataclass(frozen=True)
class WeightFindings:
    """What the contractions of a graph do with its parameters.

    Attributes:
        uses: uses of linear weights in execution order, labels not yet filled in.
        refusals: why a parameter that is multiplied is no linear weight that could be pruned.
        layers: FQN -> node that multiplies it, of the refused that are weights of layers all the same (convolutions,
            bilinear forms, layers inside of control flow).
        readers: FQN -> node that multiplies it, or what is computed of it, of the other refused ones.
    """

    uses: tuple[WeightUse, ...]
    refusals: tuple[Diagnostic, ...]
    layers: Mapping[str, fx.Node]
    readers: Mapping[str, fx.Node]


@dataclass(frozen=True)
class _Candidate:
    """A contraction that can be read as this use; ``other`` is the parameter in place of its activation, if any."""

    use: WeightUse
    other: str | None = None


def find_weight_uses(captured: CapturedGraph) -> WeightFindings:
    """Every contraction of an activation with (rows of) a stored linear weight."""
    views = parameter_views(captured)
    changed = _changed_parameters(captured, views)
    found: dict[str, list[_Candidate]] = {}
    refused: list[Diagnostic] = []
    layers: dict[str, fx.Node] = {}
    readers: dict[str, fx.Node] = {}
    for node in captured.graph.nodes:
        for fqn, reason in (*_refused_layers(node, views, changed), *subgraph_weights(node, captured, _fqns(views))):
            refused.append(Diagnostic(fqn, reason))
            layers.setdefault(fqn, node)
        if operator_name(node) not in _PRODUCTS:
            continue
        candidates = list(_candidates(node, views, captured))
        sure = [item for item in candidates if item.other is None]
        if candidates:
            found[node.name] = sure[:1] or candidates
        elif operator_name(node) in CONTRACTIONS:
            for item in _refusals(node, views, changed, captured):
                refused.append(item)
                readers.setdefault(item.subject, node)
    uses, unclear = _settle(found)
    return WeightFindings(tuple(uses), (*refused, *unclear), layers, readers)


def _settle(found: Mapping[str, list[_Candidate]]) -> tuple[list[WeightUse], list[Diagnostic]]:
    """Decide which of two parameters that meet in a product is the weight: the one that is a weight elsewhere."""
    known = {item.use.fqn for candidates in found.values() for item in candidates if item.other is None}
    uses: list[WeightUse] = []
    unclear: list[Diagnostic] = []
    for node, candidates in found.items():
        chosen = [item for item in candidates if item.other is None or (item.use.fqn in known and item.other not in known)]
        if chosen:
            uses.append(chosen[0].use)
            continue
        for item in candidates:
            reason = f"{node} multiplies it with another parameter, {item.other}: which of the two is the weight cannot be told"
            unclear.append(Diagnostic(item.use.fqn, reason))
    return uses, unclear


def _candidates(node: fx.Node, views: Mapping[fx.Node, ParameterView], captured: CapturedGraph) -> Iterator[_Candidate]:
    """Every way to read a contraction as a use of a stored weight, likelier ones first."""
    name = operator_name(node)
    for pairing in pairings(name, node.args, node.kwargs):
        weight, activation = pairing.weight, pairing.activation
        if not isinstance(weight, fx.Node) or weight not in views or not isinstance(activation, fx.Node):
            continue
        view = views[weight]
        matched = match(pairing, view.tensor, _like(captured.parameter(view.fqn)), view.gathered_by)
        if matched is not None:
            other = views.get(activation)
            # A bare product of two parameters (learned queries times a weight) does not say which is which.
            is_unclear = other is not None and name != "linear" and captured.parameter(other.fqn).ndim == 2
            use = _use(node, view.fqn, activation, matched)
            yield _Candidate(use, other.fqn if is_unclear and other is not None else None)


def _use(node: fx.Node, fqn: str, activation: fx.Node, matched: Match) -> WeightUse:
    routed_by = matched.routed_by
    return WeightUse(
        node=node.name,
        fqn=fqn,
        rows=matched.rows,
        layout=matched.layout,
        activation=activation.name,
        reading=matched.reading,
        stack=tuple(call.path for call in module_stack(node)),
        experts=matched.experts,
        routed_by=routed_by.name if isinstance(routed_by, fx.Node) else None,
    )


def _refused_layers(
    node: fx.Node, views: Mapping[fx.Node, ParameterView], changed: Mapping[fx.Node, tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """(FQN, reason) of the weight of a layer that is no linear one."""
    name = operator_name(node)
    if name in CONVOLUTIONS:
        weight = argument(node, "weight", 1)
        reason = convolution_refusal(name, node.args, node.kwargs)
        if weight in changed:
            yield (
                changed[weight][0],
                f"its values are changed by {changed[weight][1]} before {operator_name(node)} multiplies them",
            )
        elif weight in views and reason is not None:
            yield views[weight].fqn, reason
    elif name in RECURRENT:
        for source in node.all_input_nodes:
            if source in views and views[source].tensor.ndim == 2:
                yield views[source].fqn, f"not a linear weight: a recurrent operator ({name}) multiplies it at every step"
    elif name in BILINEAR:
        for source in node.all_input_nodes:
            if source in views and views[source].tensor.ndim == 3:
                yield views[source].fqn, f"not a linear weight: {node.name} multiplies it by two activations at once"


def _refusals(
    node: fx.Node,
    views: Mapping[fx.Node, ParameterView],
    changed: Mapping[fx.Node, tuple[str, str]],
    captured: CapturedGraph,
) -> Iterator[Diagnostic]:
    """Why the parameters that meet in a contraction are no weights of a linear layer."""
    for source in node.all_input_nodes:
        if source in views and views[source].tensor.ndim > 1:
            fqn, view = views[source].fqn, views[source].tensor
            shape = tuple(captured.parameter(fqn).shape)
            reason = f"{node.name} uses {tuple(view.shape)} of {shape} as no block of whole output rows of a linear layer"
            yield Diagnostic(fqn, reason)
        elif source in changed:
            fqn, name = changed[source]
            yield Diagnostic(fqn, f"its values are changed by {name} before {operator_name(node)} multiplies them")


def _changed_parameters(captured: CapturedGraph, views: Mapping[fx.Node, ParameterView]) -> dict[fx.Node, tuple[str, str]]:
    """Node that computes something from one stored matrix and smaller parameters alone -> (FQN, first operator)."""
    changed: dict[fx.Node, tuple[str, str]] = {}
    constant: set[fx.Node] = set()
    for node in captured.graph.nodes:
        sources = node.all_input_nodes
        if node.op != "get_attr" and not (node.op == "call_function" and sources and constant.issuperset(sources)):
            continue
        if operator_name(node) in CONTRACTIONS or "norm" in operator_name(node).removeprefix("_weight_norm"):
            continue  # an activation that no input reaches (learned queries), not a weight any more
        constant.add(node)
        if node in views:
            continue
        for source in sources:
            if source in changed:
                changed.setdefault(node, changed[source])
            elif source in views and _is_matrix(captured.parameter(views[source].fqn)) and _is_matrix(views[source].tensor):
                changed.setdefault(node, (views[source].fqn, operator_name(node)))
    return changed


def _is_matrix(tensor: Tensor) -> bool:
    """Two dimensions or more count something."""
    return sum(size > 1 for size in tensor.shape) > 1


def _like(parameter: Tensor) -> Tensor:
    """A contiguous tensor of the same shape without memory: what views of a parameter are followed on."""
    return torch.empty(tuple(parameter.shape), device="meta")


def _fqns(views: Mapping[fx.Node, ParameterView]) -> dict[fx.Node, str]:
    return {node: view.fqn for node, view in views.items()}


def parameter_views(captured: CapturedGraph) -> dict[fx.Node, ParameterView]:
    """What every node takes of one stored parameter, for nodes that take no more than that."""
    views: dict[fx.Node, tuple[str, Any, fx.Node | None]] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            fqn = captured.parameter_nodes.get(node.name)
            if fqn is not None and captured.parameter(fqn).is_floating_point():
                views[node] = (fqn, _like(captured.parameter(fqn)), None)
        elif node.op == "call_function" and node.all_input_nodes:
            followed = _follow(node, views)
            if followed is not None:
                views[node] = followed
    return {node: ParameterView(fqn, view, by) for node, (fqn, view, by) in views.items() if isinstance(view, Tensor)}


def _follow(node: fx.Node, views: Mapping[fx.Node, tuple[str, Any, fx.Node | None]]) -> tuple[str, Any, fx.Node | None] | None:
    """The view that a node takes of a followed parameter, None when it is something else than a view."""
    source = node.all_input_nodes[0]
    if source not in views or not node.args or node.args[0] is not source:
        return None
    fqn, view, gathered_by = views[source]
    name = operator_name(node)
    if len(node.all_input_nodes) == 2:
        indices = _matrix_indices(node, name)
        if indices is None or gathered_by is not None or not isinstance(view, Tensor) or view.ndim < 3:
            return None
        return fqn, gathered(view, tuple(indices.meta["val"].shape)), indices
    if len(node.all_input_nodes) != 1:
        return None
    if node.target is operator.getitem:
        return fqn, view[node.args[1]], gathered_by
    if name in _KEEPS_LAYOUT:
        return fqn, view, gathered_by
    if not (is_view(node) or name in _SPLITS) or not callable(node.target):
        return None
    result = node.target(view, *node.args[1:], **node.kwargs)
    shares = all(part.untyped_storage()._cdata == view.untyped_storage()._cdata for part in _parts(result))
    return (fqn, result, gathered_by) if shares else None


def _matrix_indices(node: fx.Node, name: str) -> fx.Node | None:
    """The node of integers by which a look-up picks whole matrices along dimension 0."""
    given: Any = None
    if name in {"index", "_unsafe_index"}:
        listed = argument(node, "indices", 1)
        given = listed[0] if isinstance(listed, (list, tuple)) and len(listed) == 1 else None
    elif name == "index_select" and argument(node, "dim", 1) == 0:
        given = argument(node, "index", 2)
    value = given.meta.get("val") if isinstance(given, fx.Node) else None
    dtype = getattr(value, "dtype", None)
    if dtype is None or dtype == torch.bool or dtype.is_floating_point or not isinstance(given, fx.Node):
        return None
    return given


def gathered(view: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where matrices that were looked up lie: at the first of the stack, with step 0 along the dimensions of the indices.

    Args:
        view: (experts, ...) of a parameter.
        shape: sizes of the indices.

    Returns:
        (*shape, ...), no copy.
    """
    first = view.select(0, 0)
    return first.expand(*shape, *first.shape)


def _parts(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
