"""Layers of a graph whose nodes name no submodules (an ONNX file without names), found from dataflow alone.

Every softmax attention is an anchor: the projections around it belong to it, and so does each linear layer whose nearest
attention upstream it is, up to the last one whose result is added to what went in (the residual sum that closes a layer;
what follows is a head). An attention without such a linear layer of its own shares the layer of the next one, as self- and
cross-attention do. Without any attention, the linear layers up to each residual sum are a layer, where such layers repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from mfcompile.graph import CapturedGraph, ModuleCall, module_stack
from mfcompile.onnx_file import OnnxFile
from mfcompile.passes.attention import is_attention_projection
from mfcompile.passes.operators import CONTRACTIONS, SOFTMAX_ATTENTION, operator_name
from mfcompile.passes.weights import find_weight_uses
from mfcompile.region import WeightUse

LAYERS_FOUND = "layers were found in the graph, from attentions and residual sums, since the file names no submodules"
"""What ``CapturedGraph.specialised`` says of such a graph."""

NO_LAYERS = "the file names no submodules, and no repeated layers were found in the graph: no weight lies in a repeated block"
"""What it says where none were found."""

_RESIDUAL_REACH = 12
"""Nodes between a linear layer and its residual sum: bias, dropout, scale, reshape."""


@dataclass
class _Layer:
    """Uses of linear weights that make up a layer.

    Attributes:
        projections: those around its attentions.
        others: the rest, in order.
    """

    projections: list[WeightUse] = field(default_factory=list)
    others: list[WeightUse] = field(default_factory=list)

    @property
    def uses(self) -> list[WeightUse]:
        """All of them."""
        return [*self.projections, *self.others]


def with_layers(captured: CapturedGraph) -> CapturedGraph:
    """Give nodes the paths of layers, where no node has one; part of capture, before anybody else has the graph.

    Args:
        captured: a captured ONNX file; its nodes get ``module_stack`` and its module empty submodules of these paths.
    """
    if any(len(module_stack(node)) > 1 for node in captured.graph.nodes):
        return captured
    finder = _LayerFinder(captured)
    layers = finder.layers()
    if not layers:
        return replace(captured, specialised=(*captured.specialised, NO_LAYERS))
    file = captured.module
    assert isinstance(file, OnnxFile)  # only files come without paths
    for path, layer in _paths(file, layers, finder).items():
        file.add_path(path)
        for node in finder.inside(layer):
            node.meta["module_stack"] = (*module_stack(node), ModuleCall(path, 0))
    return replace(captured, specialised=(*captured.specialised, LAYERS_FOUND))


class _LayerFinder:
    """Looks for layers in one graph."""

    def __init__(self, captured: CapturedGraph) -> None:
        self._order = {node: index for index, node in enumerate(captured.graph.nodes)}
        self._by_name = {node.name: node for node in captured.graph.nodes}
        self._uses = [
            use for use in find_weight_uses(captured).uses if use.layout.outputs == (0,) or use.layout.outputs == (1,)
        ]
        self._shapes = {use.fqn: tuple(captured.parameter(use.fqn).shape) for use in self._uses}
        self._attention = [
            is_attention_projection(self._by_name[use.node], self._by_name[use.activation]) for use in self._uses
        ]

    def layers(self) -> list[_Layer]:
        """The layers, in order of execution."""
        closing = {id(use): self._closes(use) for use in self._uses}
        if any(self._attention):
            found = self._around_attentions(closing)
        else:
            found = self._between_sums(closing)
        counts: dict[object, int] = {}
        for layer in found:
            counts[self.signature(layer)] = counts.get(self.signature(layer), 0) + 1
        # A whole layer, attention and what follows it, is one also where no other is like it.
        return [layer for layer in found if counts[self.signature(layer)] > 1 or (layer.projections and layer.others)]

    def signature(self, layer: _Layer) -> tuple[object, ...]:
        """What makes two layers equal in structure."""
        return (
            tuple((use.rows, self._shapes[use.fqn]) for use in layer.projections),
            tuple((use.rows, self._shapes[use.fqn]) for use in layer.others),
        )

    def inside(self, layer: _Layer) -> list[fx.Node]:
        """The linear nodes of a layer, and every node on a way from one of them to another."""
        own = {self._by_name[use.node] for use in layer.uses}
        before: set[fx.Node] = set()
        for node in self._order:
            if node in own or any(source in before for source in node.all_input_nodes):
                before.add(node)
        after: set[fx.Node] = set()
        for node in reversed(self._order):
            if node in own or any(user in after for user in node.users):
                after.add(node)
        return [node for node in self._order if node in before and node in after and node.op == "call_function"]

    def feeds(self, one: _Layer, other: _Layer) -> bool:
        """Values of one layer reach the other."""
        start = {self._by_name[use.node] for use in one.uses}
        goal = {self._by_name[use.node] for use in other.uses}
        reached: set[fx.Node] = set()
        for node in self._order:
            if node in start or any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return bool(reached & goal)

    def _around_attentions(self, closing: dict[int, bool]) -> list[_Layer]:
        anchors = self._anchors()
        nearest = self._nearest(anchors)
        groups: dict[int, _Layer] = {}
        for use, is_projection in zip(self._uses, self._attention, strict=True):
            number = self._anchor_of(use, anchors) if is_projection else nearest[self._by_name[use.activation]]
            if number is not None:
                group = groups.setdefault(number, _Layer())
                (group.projections if is_projection else group.others).append(use)
        for group in groups.values():
            last = max((index for index, use in enumerate(group.others) if closing[id(use)]), default=-1)
            del group.others[last + 1 :]
        return self._join([groups[number] for number in sorted(groups)])

    def _join(self, groups: Sequence[_Layer]) -> list[_Layer]:
        """Attentions without linear layers of their own, and the next attention that they feed."""
        found: list[_Layer] = []
        waiting: list[_Layer] = []
        for group in groups:
            for earlier in [item for item in waiting if group.projections and self.feeds(item, group)]:
                group = _Layer([*earlier.projections, *group.projections], group.others)
                waiting.remove(earlier)
            (found if group.others else waiting).append(group)
        return found

    def _between_sums(self, closing: dict[int, bool]) -> list[_Layer]:
        found, current = [], _Layer()
        for use in self._uses:
            current.others.append(use)
            if closing[id(use)]:
                found.append(current)
                current = _Layer()
        return [layer for layer in found if len(layer.others) > 1]

    def _anchors(self) -> dict[fx.Node, int]:
        """Every product that is weights times values, and every whole attention -> its number."""
        found: dict[fx.Node, int] = {}
        for node in self._order:
            name = operator_name(node)
            if name in SOFTMAX_ATTENTION or (name in CONTRACTIONS and _weighs(node)):
                found[node] = len(found)
        return found

    def _anchor_of(self, use: WeightUse, anchors: dict[fx.Node, int]) -> int | None:
        """The attention that a projection feeds, or the one whose result it projects."""
        upstream = _first_upstream(self._by_name[use.activation], anchors)
        if upstream is not None:
            return anchors[upstream]
        queue, seen = list(self._by_name[use.node].users), set(self._by_name[use.node].users)
        for node in queue:
            if node in anchors:
                return anchors[node]
            if operator_name(node) != "linear":
                queue += [user for user in node.users if user not in seen]
                seen.update(node.users)
        return None

    def _nearest(self, anchors: dict[fx.Node, int]) -> dict[fx.Node, int | None]:
        """Node -> the latest attention that reaches it."""
        found: dict[fx.Node, int | None] = {}
        for node in self._order:
            known = [number for source in node.all_input_nodes if (number := found[source]) is not None]
            found[node] = anchors.get(node, max(known, default=None))
        return found

    def _closes(self, use: WeightUse) -> bool:
        """Its result is added to something that reached it: a residual sum."""
        node = self._by_name[use.node]
        current = node
        for _ in range(_RESIDUAL_REACH):
            if len(current.users) != 1:
                return False
            following = next(iter(current.users))
            if operator_name(following) == "add":
                others = [item for item in following.all_input_nodes if item is not current]
                if others and others[0].op != "get_attr" and _reaches(others[0], node, self._order):
                    return True
                if others and others[0].op != "get_attr" and not _is_stored(others[0]):
                    return False
            elif operator_name(following) in CONTRACTIONS:
                return False
            current = following
        return False


def _weighs(node: fx.Node) -> bool:
    """One operand is a softmax, perhaps after a cast or a reshape."""
    for operand in node.all_input_nodes:
        current = operand
        for _ in range(8):
            if operator_name(current) == "softmax":
                return True
            sources = current.all_input_nodes
            if len(sources) != 1 or operator_name(current) in CONTRACTIONS:
                break
            current = sources[0]
    return False


def _first_upstream(node: fx.Node, wanted: Iterable[fx.Node]) -> fx.Node | None:
    """The first of the wanted nodes upstream along first operands, not past another product."""
    current = node
    while True:
        if current in wanted:
            return current
        if operator_name(current) in CONTRACTIONS or not current.all_input_nodes:
            return None
        current = current.all_input_nodes[0]


def _is_stored(node: fx.Node) -> bool:
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(_is_stored(item) for item in node.all_input_nodes))


def _reaches(start: fx.Node, goal: fx.Node, order: dict[fx.Node, int]) -> bool:
    queue, seen = [goal], {goal}
    for node in queue:
        if node is start:
            return True
        fresh = [item for item in node.all_input_nodes if item not in seen and order[item] >= order[start]]
        seen.update(fresh)
        queue += fresh
    return False


def _paths(file: nn.Module, layers: Sequence[_Layer], finder: _LayerFinder) -> dict[str, _Layer]:
    """Layers of one structure that feed one another are items of one list."""
    stacks: list[list[_Layer]] = []
    for layer in layers:
        for stack in stacks:
            if finder.signature(stack[-1]) == finder.signature(layer) and finder.feeds(stack[-1], layer):
                stack.append(layer)
                break
        else:
            stacks.append([layer])
    prefix = "stack"
    while any(name.startswith(prefix) for name, _ in file.named_children()):
        prefix = f"_{prefix}"
    return {f"{prefix}_{number}.{index}": layer for number, stack in enumerate(stacks) for index, layer in enumerate(stack)}
