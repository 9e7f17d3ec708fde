"""Repeated blocks: the layers that a model stacks, found from structure and dataflow, never from names.

A block is an item of a ModuleList, Sequential or ModuleDict that uses more than one linear weight, or one of several
attributes of equal structure (class and parameter shapes) of which one feeds another. Where such levels nest, the
outermost level whose items have equal structure and feed one another is taken: in a layer that holds its attentions
in a list of its own, the layer is the block, not the attention. Without such a level the innermost item is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from mfcompile.graph import CapturedGraph, ModuleCall, module_stack
from mfcompile.region import NO_LABELS, Labels, WeightUse

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class BlockFinder:
    """Answers which repeated block a call belongs to.

    Attributes:
        captured: the graph.
        uses: every use of a linear weight.
    """

    captured: CapturedGraph
    uses: tuple[WeightUse, ...]

    def block_of(self, stack: Iterable[str]) -> str | None:
        """Path of the repeated block around a call, None outside of all blocks.

        Args:
            stack: paths of the running submodules, outermost first.
        """
        candidates = [path for path in stack if path and len(self._weights.get(path, ())) > 1]
        for path in candidates:
            if any(self._is_chained(path, sibling) for sibling in self._equal_siblings(path)):
                return path
        items = [path for path in candidates if isinstance(self._parent(path), _CONTAINERS)]
        return items[-1] if items else None

    @cached_property
    def _weights(self) -> dict[str, set[str]]:
        """Path -> linear weights that are used while it runs."""
        found: dict[str, set[str]] = {}
        for use in self.uses:
            for path in use.stack:
                found.setdefault(path, set()).add(use.fqn)
        return found

    def _parent(self, path: str) -> nn.Module:
        return self.captured.module.get_submodule(path.rpartition(".")[0])

    def _equal_siblings(self, path: str) -> list[str]:
        """Other children of the same parent with the same structure, that ran."""
        prefix = path.rpartition(".")[0]
        own = structure(self.captured.module.get_submodule(path))
        siblings = [f"{prefix}.{name}" if prefix else name for name, _ in self._parent(path).named_children()]
        return [
            sibling
            for sibling in siblings
            if sibling != path and sibling in self._weights and structure(self.captured.module.get_submodule(sibling)) == own
        ]

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
                for call in module_stack(node):
                    if call.path in upstream:
                        upstream[call.path] |= incoming
                        own |= self._bits[call.path]
            reached[node] = incoming | own
        return upstream


def structure(module: nn.Module) -> tuple[object, ...]:
    """What makes two submodules equal in structure: classes and parameter shapes in order of registration, no names."""
    classes = tuple(type(item) for item in module.modules())
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    return (classes, shapes)


def leaving_labels(captured: CapturedGraph, labels: Mapping[fx.Node, Labels]) -> dict[ModuleCall, Labels]:
    """For every submodule call, the join of the labels of the values that leave it."""
    leaving: dict[ModuleCall, Labels] = {}
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        stack = module_stack(node)
        for user in node.users:
            around = set(module_stack(user)) if user.op == "call_function" else set()
            for call in stack:
                if call not in around:
                    leaving[call] = leaving.get(call, NO_LABELS) | labels[node]
    return leaving
