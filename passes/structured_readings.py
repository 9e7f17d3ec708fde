"""Products of an activation with a parameter, and whether what they read is the middle of something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from mfcompile.passes.operators import CONTRACTIONS, CONVOLUTIONS, SOFTMAX_ATTENTION, argument, operator_name
from mfcompile.passes.structured_relations import SPLITS, dims
from mfcompile.passes.token_spread import VIEWS
from mfcompile.passes.token_ties import Group, Rule, Tie, operands_of

_MOVES = VIEWS | SPLITS | {
    "t", "numpy_T", "adjoint", "mT", "transpose", "swapaxes", "permute", "squeeze", "unsqueeze", "slice", "select", "getitem",
    "to", "_to_copy", "contiguous", "clone", "alias", "detach", "type_as", "narrow",
}  # fmt: skip
"""Operators that a weight may pass on its way to what multiplies by it."""

_NORMALISATIONS = frozenset({"layer_norm", "rms_norm", "_fused_rms_norm", "group_norm"})


@dataclass(frozen=True)
class Reading:
    """A contraction of an activation with a parameter.

    Attributes:
        node: the operator.
        activation: what it sums over, with the axes.
        axes: of the activation.
        weight: the placeholder of the parameter.
    """

    node: fx.Node
    activation: fx.Node
    axes: tuple[int, ...]
    weight: fx.Node


class Cone:
    """What a contraction reads, back to the contractions before it: whether it is the middle of something.

    Attributes:
        is_middle: it comes from weights' products alone; no residual stream, no input of the model.
        is_private: nothing else reads any of it.
        has_attention: an attention is among these products.
        crosses_normalisation: something on the way normalises.
        joins: what different products gave is added on the way, as to a residual stream.
    """

    def __init__(self, start: fx.Node, parameters: set[str], held: Mapping[str, str]) -> None:
        self.has_attention = False
        self.crosses_normalisation = False
        self.joins = False
        inside: set[fx.Node] = set()
        made = False
        is_stream = False
        pending = [start]
        while pending and not is_stream:
            node = pending.pop()
            if node in inside:
                continue
            inside.add(node)
            name = operator_name(node)
            self.has_attention |= name in SOFTMAX_ATTENTION
            self.crosses_normalisation |= name in _NORMALISATIONS
            given = [item for item in operands_of(node) if not _is_constant(item, held)]
            if name in CONTRACTIONS and any(parameter_behind(item, parameters) is not None for item in node.all_input_nodes):
                made = True
                continue
            if name in CONVOLUTIONS and not _is_apart(node):
                made, is_stream = made or _is_pointwise(node), is_stream or not _is_pointwise(node)
                continue
            if node.op == "placeholder" or name == "embedding":
                is_stream = is_stream or name != "" or node.name not in held
                continue
            if name in {"add", "add_", "sub"} and len(given) > 1 and not self.has_attention:
                self.joins |= self._roots(given[0]) != self._roots(given[1])
            if name in CONTRACTIONS | SOFTMAX_ATTENTION:
                self.has_attention = True
                pending += node.all_input_nodes[2:3] if name in SOFTMAX_ATTENTION else node.all_input_nodes[1:2]
                continue
            pending += given
        self.is_middle = made and not is_stream
        outside = [user for node in inside if node.op != "placeholder" for user in node.users if user not in inside]
        self.is_private = len({user for user in outside if user.op != "placeholder"}) <= 1

    def _roots(self, node: fx.Node) -> set[fx.Node]:
        """The nearest products, or other nodes that compute across features, that a node comes from."""
        found: set[fx.Node] = set()
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            is_root = operator_name(current) in CONTRACTIONS | CONVOLUTIONS | SOFTMAX_ATTENTION | _NORMALISATIONS
            if is_root or current.op == "placeholder":
                found |= {current} if is_root else set()
                continue
            new = [item for item in current.all_input_nodes if item not in seen]
            seen.update(new)
            pending += new
        return found


def _is_pointwise(node: fx.Node) -> bool:
    """A convolution that is a linear layer of each place."""
    return all(size == 1 for size in dims(node.args[1])[2:])  # type: ignore[arg-type]  # its weight


def _is_apart(node: fx.Node) -> bool:
    """A convolution that treats each channel alone."""
    return bool(argument(node, "groups", 6, 1) == dims(node.args[1])[0] > 1)  # type: ignore[arg-type]  # its weight


def _is_constant(node: fx.Node, held: Mapping[str, str]) -> bool:
    """Made of weights and constants alone, as far as a few steps tell."""
    pending, seen = [node], 0
    while pending and seen < 32:
        current = pending.pop()
        seen += 1
        if current.op == "placeholder" and current.name not in held:
            return False
        pending += current.all_input_nodes
    return not pending


def parameter_behind(node: fx.Node, parameters: set[str]) -> fx.Node | None:
    """The placeholder of the parameter that a node is a view of."""
    while node.op == "call_function" and operator_name(node) in _MOVES and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.op == "placeholder" and node.name in parameters else None


def is_stack(weight: fx.Node, rule: Rule) -> bool:
    """A weight holds several matrices, each for an input of its own (experts)."""
    shared = [group for group in rule.groups if _has(group, weight) and len(group.members) > 1 and group.tie is Tie.KEEP]
    sizes = dims(weight)
    return any(
        sizes[axis] > 1 for group in shared for item, axis in group.members if item is weight and not _is_bias(group, item)
    )


def is_lookup(product: fx.Node) -> bool:
    """A product with one-hot rows, which reads a table."""
    source = product.args[0] if product.args else None
    while isinstance(source, fx.Node) and operator_name(source) in {"to", "_to_copy", "type_as", "float"}:
        source = source.args[0]
    return isinstance(source, fx.Node) and operator_name(source) in {"one_hot", "eq", "scatter"}


def _has(group: Group, node: fx.Node) -> bool:
    return any(item is node for item, _ in group.members)


def _is_bias(group: Group, weight: fx.Node) -> bool:
    """All other members are vectors: a bias beside the rows of the weight."""
    return all(len(dims(item)) == 1 for item, _ in group.members if item is not weight)
