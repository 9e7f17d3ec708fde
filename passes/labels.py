"""Labels: which modalities reach each value of the graph.

Labels start at the inputs and flow forward as sets. A value's label is the union of its operands' labels, except
where an operand only steers (a mask, a condition, an index into labelled content) or the result carries no content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mfcompile.graph import CapturedGraph
from mfcompile.passes.operators import CONTENT_FREE, SOFTMAX_ATTENTION, argument, is_view, operator_name, written_arguments
from mfcompile.region import NO_LABELS, Labels

LabelOf = Callable[[Any], Labels]


@dataclass(frozen=True)
class LabelFlow:
    """The labels of a graph in which operators may write in place.

    Attributes:
        computed: node -> modalities that reach its value when it is computed.
        reread: (node, user) -> modalities of that value when the user reads it, where a write in between added some.
        owner: view -> the node whose tensor it is a view of.
    """

    computed: Mapping[fx.Node, Labels]
    reread: Mapping[tuple[fx.Node, fx.Node], Labels]
    owner: Mapping[fx.Node, fx.Node]

    def at(self, node: fx.Node, user: fx.Node) -> Labels:
        """Label of a node's value when ``user`` reads it."""
        return self.reread.get((node, user), self.computed[node])


def flow_labels(
    captured: CapturedGraph,
    seeds: Mapping[str, Labels],
    carries: Callable[[fx.Node], bool] | None = None,
) -> LabelFlow:
    """The modalities that reach every node.

    Args:
        captured: a captured graph; its operators may write in place.
        seeds: input name -> its labels; an input that is missing has none.
        carries: whether a node's value can carry labels at all; None for everything but truth values and shapes.

    Returns:
        Labels of every value, when it is computed and when it is read.
    """
    carries = carries or _is_content
    by_node = {spec.node: seeds.get(spec.name, NO_LABELS) for spec in captured.inputs}
    computed: dict[fx.Node, Labels] = {}
    reread: dict[tuple[fx.Node, fx.Node], Labels] = {}
    owner: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, Labels] = {}

    def label_of(value: Any) -> Labels:
        if isinstance(value, fx.Node):
            return computed.get(value, NO_LABELS) | written.get(owner.get(value, value), NO_LABELS)
        if isinstance(value, (list, tuple)):
            return NO_LABELS.union(*(label_of(item) for item in value))
        return NO_LABELS

    for node in captured.graph.nodes:
        if written:
            for source in node.all_input_nodes:
                now = label_of(source)
                if now != computed[source]:
                    reread[source, node] = now
        if node.op in {"placeholder", "get_attr"}:
            computed[node] = by_node.get(node.name, NO_LABELS)
        elif node.op == "output":
            computed[node] = label_of(list(node.all_input_nodes))
        else:
            computed[node] = (carries(node) and node_label(node, label_of)) or NO_LABELS
            if is_view(node) and node.all_input_nodes:
                source = node.all_input_nodes[0]
                owner[node] = owner.get(source, source)
            for target in written_arguments(node):
                root = owner.get(target, target)
                written[root] = written.get(root, NO_LABELS) | computed[node]
                owner.setdefault(node, root)
    return LabelFlow(computed, reread, owner)


def _is_content(node: fx.Node) -> bool:
    """Bool results say what is where, not what it is."""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return operator_name(node) not in CONTENT_FREE and dtype != torch.bool


def node_label(node: fx.Node, label_of: LabelOf) -> Labels:
    """The label of one call_function node, from the labels of its operands."""
    name = operator_name(node).rstrip("_") or operator_name(node)
    if name == "where":
        return label_of([argument(node, "self", 1), argument(node, "other", 2)])
    if name in {"type_as", "view_as", "reshape_as", "expand_as"} or (name == "to" and "other" in _named(node)):
        return label_of(argument(node, "self", 0))
    if name == "masked_fill":
        return label_of([argument(node, "self", 0), argument(node, "value", 2)])
    if name == "masked_scatter":
        return label_of([argument(node, "self", 0), argument(node, "source", 2)])
    if name in {"index_put", "_index_put_impl"}:
        return label_of([argument(node, "self", 0), argument(node, "values", 2)])
    if name in {"scatter", "scatter_add", "index_copy", "index_add", "slice_scatter", "select_scatter", "scatter_reduce"}:
        sources = [node.args[0], *[value for key, value in _named(node).items() if key in {"src", "source", "value"}]]
        return label_of(sources) or label_of(_named(node).get("index"))
    if operator_name(node) in SOFTMAX_ATTENTION:
        return label_of([argument(node, "query", 0), argument(node, "key", 1), argument(node, "value", 2)])
    if name in {"gather", "index_select", "take", "take_along_dim"}:
        return label_of(argument(node, "self", 0)) or label_of(_named(node).get("index", _named(node).get("indices")))
    if name in {"index", "_unsafe_index"}:
        return label_of(argument(node, "self", 0)) or label_of(argument(node, "indices", 1))
    if name in {"embedding", "embedding_bag"}:
        return label_of(argument(node, "weight", 0)) or label_of(argument(node, "indices", 1))
    return label_of(list(node.all_input_nodes))


def _named(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    names = [item.name for item in schema.arguments] if schema is not None else []
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
