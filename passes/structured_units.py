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

from mfcompile.passes.operators import CONTRACTIONS, CONVOLUTIONS, SOFTMAX_ATTENTION, SOFTMAXES, argument, operator_name
from mfcompile.passes.structured_closure import Closure, InseparableError
from mfcompile.passes.structured_labels import NONE, Labels, dependent_axes
from mfcompile.passes.structured_relations import SPLITS, dims, relations_of
from mfcompile.passes.token_attention import ancestors, find_attentions, module_path
from mfcompile.passes.token_places import node_sizes
from mfcompile.passes.token_spread import VIEWS
from mfcompile.passes.token_ties import Group, Rule, Tie, operands_of

CHANNELS, HEADS = "channels", "heads"

_MOVES = VIEWS | SPLITS | {
    "t", "numpy_T", "adjoint", "mT", "transpose", "swapaxes", "permute", "squeeze", "unsqueeze", "slice", "select", "getitem",
    "to", "_to_copy", "contiguous", "clone", "alias", "detach", "type_as", "narrow",
}  # fmt: skip
"""Operators that a weight may pass on its way to what multiplies by it."""

_NORMALISATIONS = frozenset({"layer_norm", "rms_norm", "_fused_rms_norm", "group_norm"})


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


@dataclass(frozen=True)
class _Reading:
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
        refused: list[RefusedUnit] = []
        seen: set[fx.Node] = set()
        for reading in self._readings():
            if reading.weight in seen:
                continue
            seen |= {reading.weight, *self.same.get(reading.weight, ())}
            cone = _Cone(reading.activation, self.parameters, self.held)
            if not cone.is_middle:
                continue
            try:
                plans.append(self._plan(self._closure(reading), reading))
            except InseparableError as error:
                if not cone.crosses_normalisation or (cone.is_private and not cone.joins):
                    refused.append(self._refuse(error, reading, cone))
        return plans, refused

    def _closure(self, reading: _Reading) -> Closure:
        """What is cut with the inputs of a weight; positions and masks that several parts read only as a second choice."""
        try:
            return self._spread(reading, frozenset())
        except InseparableError as error:
            try:
                return self._spread(reading, self.apart)
            except InseparableError:
                raise error from None

    def _spread(self, reading: _Reading, apart: frozenset[fx.Node]) -> Closure:
        closure = Closure(self.order, self.live, self.same, apart)
        closure.spread(reading.activation, reading.axes)
        self._check(closure, reading)
        return closure

    def _without_products(self) -> frozenset[fx.Node]:
        """What comes from positions, masks, tables and inputs without a product; views of weights are not among it."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                is_apart = node.name not in self.held
            else:
                is_product = operator_name(node) in CONTRACTIONS | CONVOLUTIONS | SOFTMAX_ATTENTION
                given = [item for item in node.all_input_nodes if item.op != "placeholder" or item.name not in self.held]
                is_view = _parameter_behind(node, self.parameters) is not None
                is_apart = node.op == "call_function" and not is_product and not is_view and found.issuperset(given)
            if is_apart:
                found.add(node)
        return frozenset(found)

    def _readings(self) -> Iterator[_Reading]:
        for node in self.graph.nodes:
            if node in self.live and operator_name(node) in CONTRACTIONS | CONVOLUTIONS:
                for relation in relations_of(node):
                    if isinstance(relation, Rule):
                        yield from self._read_by(node, relation)

    def _read_by(self, node: fx.Node, rule: Rule) -> Iterator[_Reading]:
        sums = [group for group in rule.groups if group.tie is Tie.SUM]
        operands = dict.fromkeys(item for group in sums for item, _ in group.members)
        weights = {item: _parameter_behind(item, self.parameters) for item in operands}
        activations = [item for item, weight in weights.items() if weight is None]
        held = [item for item, weight in weights.items() if weight is not None]
        if len(activations) != 1 or len(held) != 1 or _is_stack(held[0], rule):
            return
        (activation,) = activations
        axes = tuple(sorted(axis for group in sums for item, axis in group.members if item is activation))
        weight = weights[held[0]]
        assert weight is not None  # chosen by that
        yield _Reading(node, activation, axes, weight)

    def _check(self, closure: Closure, reading: _Reading) -> None:
        """Nothing but W_out sums over the elements, and all that is cut can be."""
        own = {reading.weight, *self.same.get(reading.weight, ())}
        for node, operands in closure.sums.items():
            if not any(_parameter_behind(item, self.parameters) in own for item in operands):
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

    def _plan(self, closure: Closure, reading: _Reading) -> UnitPlan:
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
        fqn = self.held[reading.weight.name]
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

    def _name(self, attention: str | None, reading: _Reading, fqns: tuple[str, ...]) -> str:
        owner = self.held[reading.weight.name].rpartition(".")[0]
        path = attention or _common_path([fqn.rpartition(".")[0] for fqn in fqns]) or owner
        self.taken[path] = self.taken.get(path, 0) + 1
        return path if self.taken[path] == 1 else f"{path}@{self.taken[path] - 1}"

    def _refuse(self, error: InseparableError, reading: _Reading, cone: _Cone) -> RefusedUnit:
        path = module_path(reading.node).rpartition(".")[0] or self.held[reading.weight.name].rpartition(".")[0]
        where = f"{error.node.name} ({operator_name(error.node) or error.node.op})"
        return RefusedUnit(path, HEADS if cone.has_attention else CHANNELS, where, error.reason)


class _Cone:
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
            if name in CONTRACTIONS and any(_parameter_behind(item, parameters) is not None for item in node.all_input_nodes):
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


def _parameter_behind(node: fx.Node, parameters: set[str]) -> fx.Node | None:
    """The placeholder of the parameter that a node is a view of."""
    while node.op == "call_function" and operator_name(node) in _MOVES and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.op == "placeholder" and node.name in parameters else None


def _is_stack(weight: fx.Node, rule: Rule) -> bool:
    """A weight holds several matrices, each for an input of its own (experts)."""
    shared = [group for group in rule.groups if _has(group, weight) and len(group.members) > 1 and group.tie is Tie.KEEP]
    sizes = dims(weight)
    return any(
        sizes[axis] > 1 for group in shared for item, axis in group.members if item is weight and not _is_bias(group, item)
    )


def _has(group: Group, node: fx.Node) -> bool:
    return any(item is node for item, _ in group.members)


def _is_bias(group: Group, weight: fx.Node) -> bool:
    """All other members are vectors: a bias beside the rows of the weight."""
    return all(len(dims(item)) == 1 for item, _ in group.members if item is not weight)


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
