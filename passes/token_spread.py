"""Where one axis of a tensor comes from, and where it gets to, as far as the rules of operators say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from mfcompile.passes.operators import operator_name
from mfcompile.passes.token_places import Place, node_sizes, place_in_view
from mfcompile.passes.token_rules import rule_of
from mfcompile.passes.token_ties import Tie

VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"})


def spread(start: fx.Node, axis: int, within: Iterable[fx.Node]) -> dict[fx.Node, frozenset[Place]]:
    """Where one axis of a node gets to inside a set of nodes, as far as it can be followed.

    Args:
        start: any node.
        axis: of its tensor.
        within: nodes in the order of the graph.
    """
    size = node_sizes(start)[axis]
    found = {start: frozenset({Place(axis)})}
    for node in within:
        places: set[Place] = set()
        for operand in node.all_input_nodes:
            for place in found.get(operand, ()):
                places |= places_behind(node, operand, place, size)
        if places:
            found[node] = found.get(node, frozenset()) | places
    return found


def places_behind(node: fx.Node, operand: fx.Node, place: Place, size: Any) -> set[Place]:
    """Where a followed axis of an operand is in the result; nowhere where it ends."""
    if operator_name(node) in VIEWS:
        moved = place_in_view(node_sizes(operand), node_sizes(node), place, size) if node.args[0] is operand else None
        return set() if moved is None else {moved}
    rule = rule_of(node)
    if rule is None:
        return set()
    return {
        replace(place, axis=group.out)
        for group in rule.groups
        if (operand, place.axis) in group.members and group.tie is Tie.KEEP and group.out is not None
    }


def sources_of(node: fx.Node, place: Place, size: Any) -> list[tuple[fx.Node, Place]]:
    """The operands that a followed axis of a result comes from, with its place in each; none where it begins."""
    if operator_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
        before = place_in_view(node_sizes(node), node_sizes(node.args[0]), place, size)
        return [] if before is None else [(node.args[0], before)]
    rule = rule_of(node)
    groups = [] if rule is None else [item for item in rule.groups if item.out == place.axis and item.tie is Tie.KEEP]
    return [
        (operand, replace(place, axis=axis))
        for group in groups
        for operand, axis in group.members
        if node_sizes(operand)[axis] == node_sizes(node)[place.axis]
    ]
