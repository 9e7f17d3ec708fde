"""Structural units of a program: hidden channels and attention heads that can be removed, and why others cannot be.

A unit is what one weight W_out sums over, where nothing else reads it: the hidden channels of a feed-forward layer, the heads
of an attention (Eq. 2 of CoMP, CVPR 2026). Which channels are one element is not asked of the layer's kind, it follows from
what the operators between tie together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from mfcompile.passes.operators import CONTRACTIONS, CONVOLUTIONS, SOFTMAX_ATTENTION, SOFTMAXES, operator_name
from mfcompile.passes.structured_closure import Closure, InseparableError
from mfcompile.passes.structured_labels import NONE, Labels, dependent_axes
from mfcompile.passes.structured_readings import Cone, Reading, is_lookup, is_stack, parameter_behind
from mfcompile.passes.structured_relations import relations_of
from mfcompile.passes.token_attention import ancestors, find_attentions, module_path
from mfcompile.passes.token_places import node_sizes
from mfcompile.passes.token_ties import Rule, Tie

CHANNELS, HEADS = "channels", "heads"


@dataclass(frozen=True)
class StructuralUnit:
    """Elements of a model of which some can be removed.

    Attributes:
        name: the submodule that computes it, with "@1" where there is another of that name.
        kind: "channels" (hidden channels of a feed-forward layer), or "heads" (of an attention: with grouped queries, a key
            and value head with all its query heads).
        count: elements; at least one stays.
        region: modality that the output weight serves, "fusion" where several do.
        output_weight: FQN of W_out, which sums over the elements.
        inputs: for each element, the inputs of W_out that belong to it.
        weights: FQNs of all parameters and buffers that get smaller.
    """

    name: str
    kind: str
    count: int
    region: str
    output_weight: str
    inputs: tuple[tuple[int, ...], ...] = field(repr=False)
    weights: tuple[str, ...] = field(default=(), repr=False)

    def columns(self, element: int) -> tuple[int, ...]:
        """The inputs of W_out (columns of (out_features, in_features)) that belong to an element."""
        return self.inputs[element]

    def __str__(self) -> str:
        return f"{self.name}: {self.count} {self.kind} ({self.region}), read by {self.output_weight}"


@dataclass(frozen=True)
class RefusedUnit:
    """Something that looks like a unit, of which nothing can be removed.

    Attributes:
        name: the submodule.
        kind: "channels" or "heads".
        node: where the search ended, with its operator.
        reason: why.
    """

    name: str
    kind: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}) at {self.node}: {self.reason}"


@dataclass(frozen=True)
class StructuralUnits:
    """What ``find_units`` found.

    Attributes:
        units: in the order of computation.
        refused: what looks like a unit and is none.
    """

    units: tuple[StructuralUnit, ...]
    refused: tuple[RefusedUnit, ...]

    def unit(self, name: str) -> StructuralUnit:
        """The unit of that name.

        Raises:
            KeyError: there is none.
        """
        return {unit.name: unit for unit in self.units}[name]

    def __str__(self) -> str:
        lines = [f"{len(self.units)} units", *(f"  {unit}" for unit in self.units)]
        lines += [f"{len(self.refused)} refused", *(f"  {item}" for item in self.refused)] if self.refused else []
        return "\n".join(lines)


@dataclass(frozen=True)
class UnitPlan:
    """A unit as the transform needs it; nodes are those of one graph.

    Attributes:
        unit: what is told of it.
        labels: node -> the element of every position of its tensor, along the one axis that they depend on.
        beside: (reader, operand) -> the same of an operand that is cut where it is read.
    """

    unit: StructuralUnit
    labels: Mapping[fx.Node, Labels]
    beside: Mapping[tuple[fx.Node, fx.Node], Labels]


def plan_units(program: ExportedProgram, regions: Mapping[str, str]) -> tuple[list[UnitPlan], list[RefusedUnit]]:
    """Every unit of a program, and what looks like one and is none.

    Args:
        program: without operators that write into tensors.
        regions: FQN of a weight -> its region.
    """
    return _Finder(program, regions).run()


class _Finder:
    """One search through a program."""

    def __init__(self, program: ExportedProgram, regions: Mapping[str, str]) -> None:
        signature = program.graph_signature
        self.graph: fx.Graph = program.graph
        self.regions = regions
        self.order = {node: position for position, node in enumerate(self.graph.nodes)}
        self.live = ancestors(next(node for node in reversed(self.graph.nodes) if node.op == "output"))
        self.held = {
            spec.arg.name: str(spec.target)
            for spec in signature.input_specs
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        }
        self.mutated = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
        self.same = _same_tensors(program, self.graph)
        self.attentions = find_attentions(self.graph.nodes, signature.inputs_to_parameters)
        self.parameters = set(signature.inputs_to_parameters)
        self.apart = self._without_products()
        self.taken: dict[str, int] = {}

    def run(self) -> tuple[list[UnitPlan], list[RefusedUnit]]:
        """Try every weight once."""
        plans: list[UnitPlan] = []
        refused: dict[fx.Node, RefusedUnit] = {}
        seen: set[fx.Node] = set()
        for reading in self._readings():
            if reading.weight in seen:
                continue
            seen |= {reading.weight, *self.same.get(reading.weight, ())}
            cone = Cone(reading.activation, self.parameters, self.held)
            if not cone.is_middle:
                continue
            try:
                plans.append(self._plan(self._closure(reading), reading))
            except InseparableError as error:
                if not cone.crosses_normalisation or (cone.is_private and not cone.joins):
                    refused.setdefault(reading.activation, self._refuse(error, reading, cone))
        return plans, list(refused.values())

    def _closure(self, reading: Reading) -> Closure:
        """What is cut with the inputs of a weight; positions and masks that several parts read only as a second choice."""
        try:
            return self._spread(reading, frozenset())
        except InseparableError as error:
            try:
                return self._spread(reading, self.apart)
            except InseparableError:
                raise error from None

    def _spread(self, reading: Reading, apart: frozenset[fx.Node]) -> Closure:
        closure = Closure(self.order, self.live, self.same, apart)
        closure.spread(reading.activation, reading.axes)
        self._check(closure, reading)
        return closure

    def _without_products(self) -> frozenset[fx.Node]:
        """What comes from positions, masks, tables and inputs without a product; views of weights are not among it."""
        found: set[fx.Node] = set()
        weights = {node for node in self.graph.nodes if node.op == "placeholder" and node.name in self.held}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                is_apart = node not in weights
            elif parameter_behind(node, self.parameters) is not None:
                weights.add(node)
                is_apart = False
            else:
                is_product = operator_name(node) in CONTRACTIONS | CONVOLUTIONS | SOFTMAX_ATTENTION and not is_lookup(node)
                is_apart = (
                    node.op == "call_function" and not is_product and found.issuperset(set(node.all_input_nodes) - weights)
                )
            if is_apart:
                found.add(node)
        return frozenset(found)

    def _readings(self) -> Iterator[Reading]:
        for node in self.graph.nodes:
            if node in self.live and operator_name(node) in CONTRACTIONS | CONVOLUTIONS:
                for relation in relations_of(node):
                    if isinstance(relation, Rule):
                        yield from self._read_by(node, relation)

    def _read_by(self, node: fx.Node, rule: Rule) -> Iterator[Reading]:
        sums = [group for group in rule.groups if group.tie is Tie.SUM]
        operands = dict.fromkeys(item for group in sums for item, _ in group.members)
        weights = {item: parameter_behind(item, self.parameters) for item in operands}
        activations = [item for item, weight in weights.items() if weight is None]
        held = [item for item, weight in weights.items() if weight is not None]
        if len(activations) != 1 or len(held) != 1 or is_stack(held[0], rule):
            return
        (activation,) = activations
        axes = tuple(sorted(axis for group in sums for item, axis in group.members if item is activation))
        weight = weights[held[0]]
        assert weight is not None  # chosen by that
        yield Reading(node, activation, axes, weight)

    def _check(self, closure: Closure, reading: Reading) -> None:
        """Nothing but W_out sums over the elements, and all that is cut can be."""
        own = {reading.weight, *self.same.get(reading.weight, ())}
        for node, operands in closure.sums.items():
            if not any(parameter_behind(item, self.parameters) in own for item in operands):
                raise InseparableError(node, "sums over the elements too, so that more than W_out reads them")
        for reader, operand in closure.beside:
            (axis,) = dependent_axes(closure.beside[reader, operand])
            if not isinstance(node_sizes(operand)[axis], int):
                raise InseparableError(reader, f"{operand.name} would be cut along an axis of free size")
        for node in closure.labels:
            if node.op == "placeholder" and node.name not in self.held:
                raise InseparableError(node, "it is an input of the model")
            if node.op == "placeholder" and self.held[node.name] in self.mutated:
                raise InseparableError(node, "it is a buffer that the model writes to")

    def _plan(self, closure: Closure, reading: Reading) -> UnitPlan:
        given = closure.labels[reading.activation].reshape(-1)
        names = list(dict.fromkeys(int(item) for item in given))
        if NONE in names:
            raise InseparableError(reading.activation, "some of what W_out sums over cannot be followed")
        numbers = np.full(closure.elements.size, NONE, dtype=np.int64)
        numbers[names] = np.arange(len(names))

        def numbered(item: Labels) -> Labels:
            return np.where(item >= 0, numbers[np.maximum(item, 0)], NONE)

        labels = {node: numbered(item) for node, item in closure.labels.items()}
        inputs = tuple(
            tuple(map(int, np.flatnonzero(labels[reading.activation].reshape(-1) == index))) for index in range(len(names))
        )
        fqns = tuple(dict.fromkeys(self.held[node.name] for node in labels if node.op == "placeholder"))
        tied = [self.held[node.name] for node in (reading.weight, *self.same.get(reading.weight, ()))]
        fqn = next((name for name in tied if name in self.regions), tied[0])  # the name that regions and statistics use
        attention = self._attention_in(closure)
        name = self._name(attention, reading, fqns)
        unit = StructuralUnit(
            name, CHANNELS if attention is None else HEADS, len(names), self.regions.get(fqn, ""), fqn, inputs, fqns
        )
        return UnitPlan(unit, labels, {key: numbered(item) for key, item in closure.beside.items()})

    def _attention_in(self, closure: Closure) -> str | None:
        """Path of the first attention whose weights are labelled."""
        names = {item.written or item.node: item.name.partition("@")[0] for item in self.attentions}
        for node in sorted(closure.labels, key=self.order.__getitem__):
            name, labels = operator_name(node), closure.labels[node]
            if name in SOFTMAXES or (name in SOFTMAX_ATTENTION and max(labels.shape[:-2]) > 1):
                return names.get(node) or names.get(node.all_input_nodes[0]) or module_path(node)
        return None

    def _name(self, attention: str | None, reading: Reading, fqns: tuple[str, ...]) -> str:
        owner = self.held[reading.weight.name].rpartition(".")[0]
        path = attention or _common_path([fqn.rpartition(".")[0] for fqn in fqns]) or owner
        self.taken[path] = self.taken.get(path, 0) + 1
        return path if self.taken[path] == 1 else f"{path}@{self.taken[path] - 1}"

    def _refuse(self, error: InseparableError, reading: Reading, cone: Cone) -> RefusedUnit:
        path = module_path(reading.node).rpartition(".")[0] or self.held[reading.weight.name].rpartition(".")[0]
        where = f"{error.node.name} ({operator_name(error.node) or error.node.op})"
        return RefusedUnit(path, HEADS if cone.has_attention else CHANNELS, where, error.reason)


def _same_tensors(program: ExportedProgram, graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """Placeholder -> other placeholders that hold the very same tensor."""
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    stored = {**program.constants, **program.state_dict}
    for spec in program.graph_signature.input_specs:
        tensor = stored.get(str(spec.target)) if spec.kind is not InputKind.USER_INPUT else None
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.device.type != "meta":
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            groups.setdefault(key, []).append(nodes[spec.arg.name])
    return {node: frozenset(items) - {node} for items in groups.values() if len(items) > 1 for node in items}


def _common_path(paths: list[str]) -> str:
    """The longest submodule path that all of the paths are in or are."""
    parts = [path.split(".") for path in paths]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
