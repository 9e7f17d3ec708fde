"""Weights that are used inside of sub-graphs: the branches and bodies of control-flow operators, checkpoints and wraps.

A captured graph rarely holds such operators, since the recorder runs them eagerly; a graph from elsewhere may. What flows
through one is labelled by all its operands; a weight that multiplies inside is listed and left dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from mfcompile.graph import CapturedGraph
from mfcompile.passes.operators import BILINEAR, CONTRACTIONS, CONVOLUTIONS, is_view, operator_name

_MULTIPLIES = CONTRACTIONS | CONVOLUTIONS | BILINEAR


def subgraph_weights(node: fx.Node, captured: CapturedGraph, parameters: Mapping[fx.Node, str]) -> Iterator[tuple[str, str]]:
    """(FQN, reason) of every weight that an operator of functions multiplies inside of them.

    Args:
        node: any node; only one that calls an operator of functions gives something.
        captured: the graph that it is in.
        parameters: node -> FQN, for nodes that are views of one parameter.
    """
    if not isinstance(node.target, HigherOrderOperator):
        return
    names = {id(parameter): fqn for fqn, parameter in captured.module.named_parameters()}
    reason = f"it is used inside the sub-graph of {operator_name(node)} ({node.name}), which is not rewritten"
    found: dict[str, None] = {}
    for used in _multiplied(node, captured.graph_module):
        fqn = parameters.get(used) if isinstance(used, fx.Node) else names.get(id(used))
        if fqn is not None and captured.parameter(fqn).ndim > 1:
            found[fqn] = None
    yield from ((fqn, reason) for fqn in found)


def _multiplied(node: fx.Node, owner: fx.GraphModule) -> Iterator[fx.Node | Tensor]:
    """Operands of the operator, and tensors that its functions hold, that contractions inside of them read."""
    given = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, (fx.Node, fx.GraphModule))]
    functions = {leaf: body for leaf in given if (body := _function(leaf, owner)) is not None}
    operands = [leaf for leaf in given if leaf not in functions]
    for body in functions.values():
        placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        # A condition comes before the operands, and no function takes it.
        bound: dict[fx.Node, Any] = dict(zip(reversed(placeholders), reversed(operands), strict=False))
        for inner in body.graph.nodes:
            used: list[fx.Node | Tensor] = []
            if isinstance(inner.target, HigherOrderOperator):
                used = list(_multiplied(inner, body))
            elif operator_name(inner) in _MULTIPLIES:
                used = list(inner.all_input_nodes)
            for source in used:
                origin = _origin(source)
                if isinstance(origin, fx.Node) and origin.op == "get_attr":
                    origin = _attribute(body, str(origin.target))
                origin = bound.get(origin, origin) if isinstance(origin, fx.Node) else origin
                if isinstance(origin, (fx.Node, Tensor)):
                    yield origin


def _origin(source: fx.Node | Tensor) -> fx.Node | Tensor:
    """What a chain of views is a view of."""
    while isinstance(source, fx.Node) and source.op == "call_function" and is_view(source) and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return source


def _function(leaf: fx.Node | fx.GraphModule, owner: fx.GraphModule) -> fx.GraphModule | None:
    """The function that an argument is, if it is one."""
    if isinstance(leaf, fx.Node):
        found = _attribute(owner, str(leaf.target)) if leaf.op == "get_attr" else None
        return found if isinstance(found, fx.GraphModule) else None
    return leaf


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner
