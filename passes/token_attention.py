"""Attentions of a graph as token pruning needs them: where the weights come from, and the residual add behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mfcompile.passes.operators import CONTRACTIONS, SOFTMAXES, argument, operator_name
from mfcompile.passes.token_places import Place, node_sizes

NEGLIGIBLE = -500.0
"""Logits below are masked: beside any logit above -396 the softmax gives zero for them in float32, whatever form the mask
has (False, -inf, the smallest float, -10000)."""

_CASTS = frozenset({"to", "_to_copy", "dropout", "clone", "contiguous", "alias", "detach", "type_as"})


@dataclass(frozen=True)
class Attention:
    """One softmax attention.

    Attributes:
        name: the submodule that computes it, with a count where it is called again.
        node: gives the weighted values.
        written: the logits, where it is not one operator.
        masked: some tokens may not look at some others.
    """

    name: str
    node: fx.Node
    written: fx.Node | None
    masked: bool

    @property
    def fused(self) -> bool:
        """It is one operator."""
        return self.written is None

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """(query, key) or (query, key, mask) of a fused attention as they are now, (logits,) of one that is written out."""
        if self.written is not None:
            return (self.written,)
        given = (*self.node.args[:2], argument(self.node, "attn_mask", 3))
        return tuple(item for item in given if isinstance(item, fx.Node))

    @property
    def query_and_key(self) -> tuple[tuple[fx.Node, int], tuple[fx.Node, int]]:
        """(node, token axis) of the queries and of the keys: of the logits where these are written out."""
        if self.fused:
            return tuple((item, len(node_sizes(item)) - 2) for item in self.operands[:2])  # type: ignore[return-value]
        rank = len(node_sizes(self.operands[0]))
        return (self.operands[0], rank - 2), (self.operands[0], rank - 1)

    def logits(self, *values: Tensor) -> Tensor:
        """(..., queries, keys) before the softmax, from the values of ``operands``; masked ones are below NEGLIGIBLE."""
        if not self.fused:
            return values[0].float()
        query, key = values[0].float(), values[1].float()
        if key.shape[1] != query.shape[1] and argument(self.node, "enable_gqa", 7, False):
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = argument(self.node, "scale", 6)
        logits: Tensor = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        lowest = 4 * NEGLIGIBLE
        if len(values) > 2:
            mask = values[2]
            logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask.float()
        if argument(self.node, "is_causal", 5, False):
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~seen, lowest)
        return logits


def find_attentions(nodes: Iterable[fx.Node], weights: Mapping[str, str]) -> list[Attention]:
    """Every softmax attention, in order: fused ones, and softmaxes whose result weighs something.

    Args:
        nodes: of a graph.
        weights: placeholder -> FQN of the parameter that it holds; names attentions of graphs that know no submodules.
    """
    found: list[Attention] = []
    counts: dict[str, int] = {}
    for node in nodes:
        attention = _fused(node) if operator_name(node) == "scaled_dot_product_attention" else _written_out(node)
        if attention is None:
            continue
        path = module_path(node) or _path_by_weight(node, weights) or "attention"
        counts[path] = counts.get(path, 0) + 1
        name = path if counts[path] == 1 else f"{path}@{counts[path] - 1}"
        found.append(Attention(name, *attention))
    return found


def _path_by_weight(node: fx.Node, weights: Mapping[str, str]) -> str:
    """The submodule around the projection that an attention's queries come from."""
    pending, seen = [node.args[0]], 0
    while pending and seen < 64:
        current = pending.pop(0)
        seen += 1
        if not isinstance(current, fx.Node):
            continue
        if operator_name(current) in CONTRACTIONS:
            fqns = [weights[item.name] for item in current.all_input_nodes if item.name in weights]
            if fqns:
                return fqns[0].rpartition(".")[0].rpartition(".")[0]
        pending += current.all_input_nodes[:1]
    return ""


def module_path(node: fx.Node) -> str:
    """The innermost submodule that a node of a program belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path).partition("@")[0] for key, (path, _) in stack.items() if "_empty_nn_module_stack" not in str(key)]
    return paths[-1] if paths else ""


def _fused(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    has_mask = isinstance(argument(node, "attn_mask", 3), fx.Node)
    return node, None, has_mask or bool(argument(node, "is_causal", 5, False))


def _written_out(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool] | None:
    """softmax(q k') v: the logits come from a product of activations, and the weights are the left factor of one."""
    logits = node.args[0] if node.args else None
    if operator_name(node) not in SOFTMAXES or not isinstance(logits, fx.Node):
        return None
    rank = len(node_sizes(node))
    if rank < 3 or int(argument(node, "dim", 1)) % rank != rank - 1:
        return None
    is_masked = _is_masked(logits)
    weighted = _weighted_by(node)
    return None if is_masked is None or weighted is None else (weighted, logits, is_masked)


def _is_masked(logits: fx.Node) -> bool | None:
    """Whether something is added to, or filled into, the product that logits are; None where they are no product."""
    masked, node = False, logits
    for _ in range(16):
        name = operator_name(node)
        if name in CONTRACTIONS:
            return None if name == "linear" else masked or name in {"baddbmm", "addmm"}
        sources = [item for item in node.all_input_nodes if len(node_sizes(item)) >= 3]
        masked = masked or name not in _CASTS | {"mul", "div", "view", "reshape", "expand"} or len(node.all_input_nodes) > 1
        following = [item for item in sources if _leads_to_product(item)]
        if not following:
            return None
        node = following[0]
    return None


def _leads_to_product(node: fx.Node) -> bool:
    seen, pending = {node}, [node]
    while pending and len(seen) < 32:
        current = pending.pop(0)
        if operator_name(current) in CONTRACTIONS:
            if operator_name(current) != "linear":
                return True
            continue
        new = [item for item in current.all_input_nodes if len(node_sizes(item)) >= 3 and item not in seen]
        seen.update(new)
        pending += new
    return False


def _weighted_by(softmax: fx.Node) -> fx.Node | None:
    current = softmax
    for _ in range(8):
        users = [item for item in current.users if operator_name(item) in CONTRACTIONS]
        for user in users:
            if user.args[0] is current and operator_name(user) != "linear":
                return user
        casts = [item for item in current.users if operator_name(item) in _CASTS | {"view", "reshape", "expand", "masked_fill"}]
        if not casts:
            return None
        current = casts[0]
    return None


def ancestors(*nodes: fx.Node) -> set[fx.Node]:
    """Everything that the nodes depend on, and they themselves."""
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return seen


def residual_add(attention: Attention, order: Mapping[fx.Node, int], others: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The first add behind an attention whose other operand is what the queries are made of.

    Args:
        attention: the attention.
        order: position of every node.
        others: result nodes of the other attentions: the search ends there.

    Returns:
        (the add, the stream that enters it); None where there is none.
    """
    query = attention.query_and_key[0][0]
    made_of = ancestors(query)
    reached = {attention.node}
    for node in order:
        if order[node] <= order[attention.node] or not any(item in reached for item in node.all_input_nodes):
            continue
        if node in others or node.op == "output":
            return None
        reached.add(node)
        operands = [item for item in node.args[:2] if isinstance(item, fx.Node)]
        if operator_name(node) in {"add", "add_"} and len(operands) == 2:
            outside = [item for item in operands if item not in reached]
            if len(outside) == 1 and outside[0] in made_of and node_sizes(outside[0]) == node_sizes(node):
                return node, outside[0]
    return None


def at_axis(places: Iterable[Place], axis: int) -> bool:
    """A whole axis is among the places."""
    return Place(axis) in set(places)


def first_place(places: Iterable[Place], axis: int) -> Place | None:
    """The place at an axis that starts it."""
    return next((item for item in places if item.axis == axis and item.outer == 1), None)
