"""Repeated blocks: the layers that a model stacks, found from structure and dataflow, never from names.

A block is a submodule that uses more than one linear weight and is repeated: an item of a ModuleList, Sequential or
ModuleDict, or one of several attributes of equal structure (class and parameter shapes), of which one feeds another.
A whole layer that is the only item of a list is a block as well, and so is one that is applied again to its own results.
So is, where nothing repeated lies around it, a whole layer that is there once (a single fusion layer, a pooling head with
attention and MLP).

A submodule that computes a linear map and nothing else (a linear layer with a low-rank addition) is no whole layer: it
is a part of the layer around it.

Where such levels nest, the innermost that is a whole layer is taken, one that holds an attention and more than the
attention's own projections: in a layer that holds its attentions in a list of its own, or as attributes that look
alike, the layer is the block, not the attention. Where no level is a whole layer (attentions and feed-forwards in one
flat list, layers without attention), the outermost repeated one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from mfcompile.graph import CapturedGraph, ModuleCall, module_stack
from mfcompile.passes.attention import is_attention_projection
from mfcompile.passes.labels import LabelFlow
from mfcompile.passes.operators import is_linear_map, written_arguments
from mfcompile.region import NO_LABELS, Labels, WeightUse

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class CallStacks:
    """The submodule calls around every node, with the containers that are never called themselves.

    A ModuleList that holds the functions of one layer is not called, only its items are; its path is still the path
    of a layer. It counts as called whenever an item is, under the number of the item's call.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        stacks = {module_stack(node) for node in captured.graph.nodes}
        self._called = {call.path for stack in stacks for call in stack}
        self._known = {stack: self._extend(stack) for stack in stacks}

    def around(self, node: fx.Node) -> tuple[ModuleCall, ...]:
        """Calls around a node, outermost first."""
        return self._known[module_stack(node)]

    def _extend(self, stack: tuple[ModuleCall, ...]) -> tuple[ModuleCall, ...]:
        extended: list[ModuleCall] = []
        for call in stack:
            parts = call.path.split(".")
            above = extended[-1].path if extended else ""
            for length in range(1, len(parts)):
                prefix = ".".join(parts[:length])
                if prefix not in self._called and (not above or prefix.startswith(above + ".")):
                    extended.append(ModuleCall(prefix, call.call))
            extended.append(call)
        return tuple(dict.fromkeys(extended))


@dataclass(frozen=True)
class BlockFinder:
    """Answers which repeated block a call belongs to.

    Attributes:
        captured: the graph.
        uses: every use of a linear weight.
        stacks: the calls around every node.
        flow: labels, for what writes into what.
    """

    captured: CapturedGraph
    uses: tuple[WeightUse, ...]
    stacks: CallStacks
    flow: LabelFlow

    def block_of(self, stack: Iterable[ModuleCall]) -> ModuleCall | None:
        """Call of the repeated block among the calls around a node, None outside of all blocks."""
        called = tuple(stack)
        repeated = [call for call in called if call.path in self._repeated]
        layers = [call for call in repeated if call.path in self._whole_layers]
        if layers:
            return layers[-1]
        alone = [call for call in called if call.path in self._layers_alone]
        if alone:
            return alone[-1]
        chained = [call for call in repeated if self._repeated[call.path]]
        return chained[0] if chained else repeated[-1] if repeated else None

    @cached_property
    def _layers_alone(self) -> set[str]:
        """Paths of whole layers that are not repeated: they hold no other layer, and no stack of anything but attentions."""
        inner = set(self._whole_layers)
        for path in self._repeated:
            if False in self._roles[path] and isinstance(self._module(path.rpartition(".")[0]), CONTAINERS):
                inner.add(path)
        return {
            path
            for path in self._whole_layers
            if path and not any(other != path and other.startswith(path + ".") for other in inner)
        }

    @cached_property
    def _repeated(self) -> dict[str, bool]:
        """Path of every repeated submodule -> whether it repeats one of equal structure, or itself."""
        found: dict[str, bool] = {}
        for path in sorted(self._weights, key=len, reverse=True):
            if not path or len(self._weights[path]) < 2:
                continue
            others = self._siblings(path)
            chained = [other for other in others if self._is_chained(path, other)]
            repeats_another = any(self._structure(other) == self._structure(path) for other in chained)
            if repeats_another or (path in self._recurrent and not self._holds_layer(path, found)):
                found[path] = True
            elif self._is_item_of_stack(path, others, chained, found):
                found[path] = False
        return found

    def _is_item_of_stack(self, path: str, others: list[str], chained: list[str], repeated: Mapping[str, bool]) -> bool:
        """An item of a container that stacks it with items of another structure, or that holds it alone."""
        container = self._module(path.rpartition(".")[0])
        if not isinstance(container, CONTAINERS):
            return False
        if any(type(self._module(other)) is type(self._module(path)) for other in chained):
            return True
        if self._holds_layer(path, repeated):
            return False
        if path in self._whole_layers:
            return bool(chained) or not others
        return bool(chained) and isinstance(container, nn.ModuleList)

    def _holds_layer(self, path: str, repeated: Mapping[str, bool]) -> bool:
        """A whole layer lies inside: then the submodule is a tower, not a layer."""
        return any(inner.startswith(path + ".") and inner in self._whole_layers for inner in repeated)

    @cached_property
    def _recurrent(self) -> set[str]:
        """Paths of whole layers of which one call feeds another."""
        calls: dict[ModuleCall, int] = {}
        of_path: dict[str, int] = {}
        for node in self.captured.graph.nodes:
            for call in self.stacks.around(node):
                if call.path in self._whole_layers and call not in calls:
                    calls[call] = 1 << len(calls)
                    of_path[call.path] = of_path.get(call.path, 0) | calls[call]
        reached: dict[fx.Node, int] = {}
        found: set[str] = set()
        for node in self.captured.graph.nodes:
            bits = 0
            for source in node.all_input_nodes:
                bits |= reached[source]
            for call in self.stacks.around(node):
                if call in calls:
                    if bits & of_path[call.path] & ~calls[call]:
                        found.add(call.path)
                    bits |= calls[call]
            reached[node] = bits
        return found

    @cached_property
    def _whole_layers(self) -> set[str]:
        """Paths that use projections of an attention and other weights too."""
        return {path for path, found in self._roles.items() if len(found) == 2 and path in self._nonlinear}

    @cached_property
    def _nonlinear(self) -> set[str]:
        """Paths that compute more than a linear map of one activation."""
        found: set[str] = set()
        for node in self.captured.graph.nodes:
            if node.op == "call_function" and not is_linear_map(node):
                found.update(call.path for call in self.stacks.around(node))
        return found

    @cached_property
    def _roles(self) -> dict[str, set[bool]]:
        """Path -> whether the weights it uses are projections of an attention: all, none or some of them."""
        roles: dict[str, set[bool]] = {}
        nodes = {node.name: node for node in self.captured.graph.nodes}
        for use in self.uses:
            node = nodes[use.node]
            is_projection = is_attention_projection(node, nodes[use.activation])
            for call in self.stacks.around(node):
                roles.setdefault(call.path, set()).add(is_projection)
        return roles

    @cached_property
    def _weights(self) -> dict[str, set[str]]:
        """Path -> linear weights that are used while it runs."""
        nodes = {node.name: node for node in self.captured.graph.nodes}
        found: dict[str, set[str]] = {}
        for use in self.uses:
            for call in self.stacks.around(nodes[use.node]):
                found.setdefault(call.path, set()).add(use.fqn)
        return found

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.captured.module.named_modules(remove_duplicate=False))

    def _module(self, path: str) -> nn.Module:
        return self._modules[path]

    @cached_property
    def _structures(self) -> dict[str, tuple[object, ...]]:
        return {}

    def _structure(self, path: str) -> tuple[object, ...]:
        if path not in self._structures:
            self._structures[path] = structure(self._module(path))
        return self._structures[path]

    def _siblings(self, path: str) -> list[str]:
        """Other children of the same parent that use a linear weight."""
        prefix = path.rpartition(".")[0]
        names = [f"{prefix}.{name}" if prefix else name for name, _ in self._module(prefix).named_children()]
        return [name for name in names if name != path and len(self._weights.get(name, ())) > 1]

    def _is_chained(self, one: str, other: str) -> bool:
        """Values computed in one of the two reach the other."""
        first, second = self._bits[one], self._bits[other]
        return bool(self._upstream[other] & first or self._upstream[one] & second)

    @cached_property
    def _bits(self) -> dict[str, int]:
        """Path -> one bit of its own."""
        return {path: 1 << index for index, path in enumerate(sorted(self._weights))}

    @cached_property
    def _upstream(self) -> dict[str, int]:
        """Path -> bits of all paths in which a value was computed that reaches it."""
        reached: dict[fx.Node, int] = {}
        upstream = dict.fromkeys(self._bits, 0)
        for node in self.captured.graph.nodes:
            incoming = 0
            for source in node.all_input_nodes:
                incoming |= reached[source]
            own = 0
            if node.op == "call_function":
                for call in self.stacks.around(node):
                    if call.path in upstream:
                        upstream[call.path] |= incoming
                        own |= self._bits[call.path]
            reached[node] = incoming | own
            for target in written_arguments(node):
                reached[self.flow.owner.get(target, target)] |= reached[node]
        return upstream


def structure(module: nn.Module) -> tuple[object, ...]:
    """What makes two submodules equal in structure: classes and parameter shapes in order of registration, no names."""
    classes = tuple(type(item) for item in module.modules())
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    return (classes, shapes)


def leaving_labels(captured: CapturedGraph, flow: LabelFlow, stacks: CallStacks) -> dict[ModuleCall, Labels]:
    """For every submodule call, the join of the labels of the values that leave it.

    A value leaves when something outside reads it, or when it is written into a tensor that was made outside.
    """
    leaving: dict[ModuleCall, Labels] = {}

    def leave(node: fx.Node, stays: tuple[ModuleCall, ...], labels: Labels) -> None:
        inside = set(stays)
        for call in stacks.around(node):
            if call not in inside:
                leaving[call] = leaving.get(call, NO_LABELS) | labels

    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        for user in node.users:
            leave(node, stacks.around(user) if user.op == "call_function" else (), flow.at(node, user))
        for target in written_arguments(node):
            leave(node, stacks.around(flow.owner.get(target, target)), flow.computed[node])
    return leaving
