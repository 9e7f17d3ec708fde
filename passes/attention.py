"""Reading attention off the graph: the softmax product that a projection feeds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from torch import fx

from mfcompile.passes.operators import CONTRACTIONS, SOFTMAX_ATTENTION, SOFTMAXES, operator_name
from mfcompile.region import NO_LABELS, Labels

_REACH = 64
"""Nodes looked at downstream of a projection: rotary embeddings and head splits take about twenty."""


def attention_label(node: fx.Node, labels: Mapping[fx.Node, Labels]) -> Labels:
    """Label of the softmax attention whose query, key or value a projection computes; empty when it feeds none.

    Only softmax attention counts: the product of two embeddings that gives contrastive logits fuses nothing.
    """
    for product in _first_products(node):
        if operator_name(product) in SOFTMAX_ATTENTION:
            return labels[product]
        if _reaches_softmax_backwards(product):
            return labels[product]
        for softmax in _through_elementwise(product, stop=SOFTMAXES):
            if operator_name(softmax) in SOFTMAXES:
                for weighted in _first_products(softmax):
                    return labels[weighted]
    return NO_LABELS


def is_attention_projection(node: fx.Node, activation: fx.Node) -> bool:
    """The contraction computes queries, keys or values of a softmax attention, or projects what one gives."""
    return any(_is_attention(product) for product in _first_products(node)) or _comes_from_attention(activation)


def _is_attention(product: fx.Node) -> bool:
    """The product is part of a softmax attention: weights times values, or logits whose softmax weighs something."""
    if operator_name(product) in SOFTMAX_ATTENTION or _reaches_softmax_backwards(product):
        return True
    following = _through_elementwise(product, stop=SOFTMAXES)
    return any(_first_products(node) for node in following if operator_name(node) in SOFTMAXES)


def _comes_from_attention(activation: fx.Node) -> bool:
    """The nearest contraction upstream, along first operands, is a softmax attention."""
    current = activation
    for _ in range(_REACH):
        name = operator_name(current)
        if name in SOFTMAX_ATTENTION:
            return True
        if name in CONTRACTIONS:
            return _reaches_softmax_backwards(current)
        if not current.all_input_nodes:
            return False
        current = current.all_input_nodes[0]
    return False


def downstream_label(node: fx.Node, labels: Mapping[fx.Node, Labels]) -> Labels:
    """Label of the nearest labelled value that depends on a node, breadth first."""
    queue, seen = deque(node.users), set(node.users)
    while queue:
        current = queue.popleft()
        if labels.get(current):
            return labels[current]
        for user in current.users:
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return NO_LABELS


def _first_products(node: fx.Node) -> list[fx.Node]:
    """The first contractions and attentions downstream, through views and elementwise operators."""
    stop = CONTRACTIONS | SOFTMAX_ATTENTION
    wanted = stop - {"linear"}
    return [found for found in _through_elementwise(node, stop) if operator_name(found) in wanted]


def _through_elementwise(node: fx.Node, stop: frozenset[str]) -> list[fx.Node]:
    """Nodes downstream, not past contractions, attentions or the operators named in ``stop``."""
    queue, seen, found = deque(node.users), set(node.users), []
    while queue and len(seen) < _REACH:
        current = queue.popleft()
        found.append(current)
        name = operator_name(current)
        if name in stop or name in CONTRACTIONS or name in SOFTMAX_ATTENTION:
            continue
        for user in current.users:
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return found


def _reaches_softmax_backwards(product: fx.Node) -> bool:
    """One operand of the product is a softmax, perhaps after dropout, casts and reshapes: it is weights times values."""
    for operand in product.all_input_nodes:
        current = operand
        for _ in range(8):
            if operator_name(current) in SOFTMAXES:
                return True
            sources = current.all_input_nodes
            if len(sources) != 1 or operator_name(current) in CONTRACTIONS:
                break
            current = sources[0]
    return False
