"""Dividing the nodes of an ONNX graph into parts: one per modality, and their fusion.

A node that one modality alone reaches belongs to that modality's part, everything that several reach to the fusion, and
what no content reaches (masks, positions) to every part that needs it. Reachability only grows along the graph, so a
part never needs a value of a later one; parts of modalities need nothing of each other.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mfcompile.errors import ExportError
from mfcompile.exporters.split_cut import EXPENSIVE, TENSOR_BYTES, narrowest_cut, tensor_bytes
from mfcompile.exporters.split_reach import (
    Axis,
    Reach,
    bodies,
    find_reach,
    is_weight,
    late_weights,
    localise_sizes,
    read_values,
    read_weights,
    unused,
)
from mfcompile.split import SplitRequest

FUSION = "fusion"

HEAVY_BYTES = 1 << 16
"""Weights above this are not stored a second time only to compute a value without content in two parts."""

_KINDS = {"b": "mask", "i": "indices", "u": "indices"}


@dataclass(frozen=True)
class PartPlan:
    """One part of a graph, in terms of the whole graph's nodes and values.

    Attributes:
        name: name of the part.
        nodes: its nodes, in the graph's order; some are in several parts.
        inputs: graph inputs that it reads, in order, then values of earlier parts.
        outputs: graph outputs that it gives, in order, then values for later parts.
        sizes: value that holds one size -> the input, and the dimension of it, that this part asks.
    """

    name: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    sizes: Mapping[ir.Value, tuple[ir.Value, int]]


@dataclass(frozen=True)
class Partition:
    """A graph divided into parts.

    Attributes:
        parts: in running order.
        crossings: value handed from one part to a later one -> name of the part that gives it.
        notes: what was decided against the plain rule.
    """

    parts: tuple[PartPlan, ...]
    crossings: Mapping[ir.Value, str]
    notes: tuple[str, ...]


def partition(model: ir.Model, request: SplitRequest) -> Partition:
    """Divide a graph by the modalities that reach its nodes.

    Sizes are localised and values that cross parts are renamed, both in place; what the graph computes stays.

    Raises:
        ExportError: there is nothing to divide, or a control flow operator mixes modalities and holds weights of one.
    """
    graph = model.graph
    axes = localise_sizes(graph)
    plain = find_reach(graph, axes, request.modalities)
    late = late_weights(graph, plain, request.regions)
    reach = find_reach(graph, axes, request.modalities, late)
    _refuse_mixed_bodies(graph, reach, request)
    names = list(dict.fromkeys(label for value in graph.inputs for label in sorted(reach.content[value])))
    homes = {node: _home(node, reach) for node in graph}
    notes = _merge_trivial(graph, homes, names, reach)
    division = _Division(graph, reach, axes, homes, names, request)
    notes += division.keep_heavy_once()
    parts, crossings = division.parts()
    _refuse_single(parts, names, graph, request)
    _name_crossings(graph, crossings, division.part_name)
    return Partition(parts, crossings, tuple(notes))


def _home(node: ir.Node, reach: Reach) -> str | None:
    """The part of a node; None for one that may be computed anywhere."""
    content = frozenset[str]().union(*(reach.content[value] for value in node.outputs))
    if not content:
        return None
    labels = frozenset[str]().union(*(reach.reach[value] for value in node.outputs))
    return next(iter(labels)) if len(labels) == 1 else FUSION_HOME


FUSION_HOME = "\0fusion"
"""Home of nodes that several modalities reach; no modality can be called so."""


class _Division:
    """The state of one division: where nodes live, and which values no part may compute a second time."""

    def __init__(
        self,
        graph: ir.Graph,
        reach: Reach,
        axes: Mapping[ir.Value, Axis],
        homes: dict[ir.Node, str | None],
        names: list[str],
        request: SplitRequest,
    ) -> None:
        self.graph, self.reach, self.axes, self.homes, self.request = graph, reach, axes, homes, request
        self.names = [name for name in names if name in set(homes.values())]
        self.part_name = _part_names(self.names)
        self.weights = read_weights(graph, reach)
        self.kept: dict[ir.Node, str] = {}  # heavy nodes without content -> the modality that keeps them
        self.owned: dict[ir.Value, frozenset[str]] = {}
        self.direct: set[ir.Value] = set()  # inputs that the fusion reads in any case

    def keep_heavy_once(self) -> list[str]:
        """Nodes without content that read large weights stay in one modality's part, which hands their value on."""
        notes = []
        fused = self._reached_back(self._results(FUSION_HOME), FUSION_HOME)
        read = [value for value in self._read_by(fused) if self._is_foreign(value, FUSION_HOME)]
        needed = {}
        for name in self.names:
            own = [value for value in read if self._result_home(value) == name]
            needed[name] = self._reached_back([*self._results(name), *own], name)
        for node in self.graph:
            size = sum(tensor_bytes(value, {}) for value in self.weights[node])
            is_free = self.homes[node] is None and any(value in self.reach.varies for value in node.outputs)
            if not is_free or size <= HEAVY_BYTES or node not in fused:
                continue
            if size <= sum(tensor_bytes(value, self.request.sizes) for value in node.outputs):
                continue
            owner = next((name for name in self.names if node in needed[name]), None)
            if owner is not None:
                self.kept[node] = owner
                notes.append(
                    f"{node.name} holds {size:,} bytes of weights and no content: {self.part_name[owner]} computes it and "
                    f"hands it on"
                )
        self._find_owners()
        return notes

    def parts(self) -> tuple[tuple[PartPlan, ...], dict[ir.Value, str]]:
        """Every part with its nodes and interface, and the values that cross."""
        fused = self._reached_back(self._results(FUSION_HOME), FUSION_HOME)
        read = self._read_by(fused) + self._results(FUSION_HOME)
        self.direct = {value for value in read if value.is_graph_input()}
        wanted = [value for value in read if self._is_foreign(value, FUSION_HOME)]
        cut = narrowest_cut(wanted, self._rebuild, self._cost)
        order = {value: number for number, value in enumerate(_values_in_order(self.graph))}
        crossing = [(self._owner(value), value) for value in cut if not value.is_graph_input()]
        crossing.sort(key=lambda item: (self.names.index(item[0]), order[item[1]]))
        crossings = {value: self.part_name[owner] for owner, value in crossing}
        found = []
        for home in [*self.names, FUSION_HOME]:
            name = self.part_name[home]
            given = self._results(home)
            given += [value for value, owner in crossings.items() if owner == name and value not in given]
            taken = crossings if home == FUSION_HOME else None
            nodes = self._reached_back(given, home, stop=taken)
            if nodes or given:
                found.append(self._plan(name, nodes, given, taken or {}))
        return tuple(found), crossings

    def _read_by(self, nodes: set[ir.Node]) -> list[ir.Value]:
        """What nodes read, in the graph's order; sizes can be had of any input that has the axis."""
        reading = [node for node in self.graph if node in nodes and node.outputs[0] not in self.axes]
        return [value for node in reading for value in read_values(node)]

    def _plan(self, name: str, nodes: set[ir.Node], given: list[ir.Value], taken: Mapping[ir.Value, str]) -> PartPlan:
        ordered = tuple(node for node in self.graph if node in nodes)
        made = {value for node in ordered for value in node.outputs}
        sizes = [value for value in made if value in self.axes]
        read = {value for node in ordered if node.outputs[0] not in self.axes for value in read_values(node)} | set(given)
        inputs = [value for value in self.graph.inputs if value in read]
        inputs += [value for value in taken if value in read]
        asked = {value: self._size_source(self.axes[value], inputs) for value in sizes}
        extra = {source for source, _ in asked.values()} - set(inputs)
        inputs = [*(value for value in self.graph.inputs if value in extra), *inputs]
        return PartPlan(name, ordered, tuple(inputs), tuple(given), asked)

    def _size_source(self, axis: Axis, inputs: list[ir.Value]) -> tuple[ir.Value, int]:
        """An input of the part that has the axis; else a control input, else any input of the graph."""
        for value in inputs:
            for dim, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and size.value == axis.symbol:
                    return value, dim
        return min(axis.places, key=lambda place: len(self.reach.content[place[0]]))

    def _results(self, home: str) -> list[ir.Value]:
        """The graph's outputs that this part gives."""
        return [value for value in self.graph.outputs if self._result_home(value) == home]

    def _result_home(self, value: ir.Value) -> str:
        producer = value.producer()
        home = self.homes[producer] if producer is not None else None
        if home is not None:
            return home
        labels = self.reach.reach[value]
        fits = [name for name in self.names if labels <= {name}]
        has_fusion = FUSION_HOME in self.homes.values()
        return fits[0] if fits and (labels or not has_fusion) else FUSION_HOME

    def _is_foreign(self, value: ir.Value, home: str) -> bool:
        """Computed by another part, or from what another part alone keeps."""
        producer = value.producer()
        if producer is None:
            return False
        own = self.homes[producer]
        if own is not None:
            return own != home
        return bool(self._owners(value)) and home == FUSION_HOME

    def _owners(self, value: ir.Value) -> frozenset[str]:
        """The modalities that keep heavy nodes which a value without content depends on."""
        return self.owned.get(value, frozenset())

    def _find_owners(self) -> None:
        for node in self.graph:
            if self.homes[node] is not None:
                continue
            owners = frozenset[str]().union(*(self._owners(source) for source in read_values(node)))
            owners = frozenset({self.kept[node]}) if node in self.kept else owners
            if owners:
                self.owned.update(dict.fromkeys(node.outputs, owners))

    def _owner(self, value: ir.Value) -> str:
        producer = value.producer()
        assert producer is not None  # graph inputs do not cross
        home = self.homes[producer]
        return home if home is not None else min(self._owners(value), key=self.names.index)

    def _rebuild(self, value: ir.Value) -> list[ir.Value] | None:
        """What the fusion needs to compute a foreign value itself; None where it must not."""
        producer = value.producer()
        if producer is None or producer in self.kept or producer.op_type in EXPENSIVE or bodies(producer):
            return None
        if self.weights[producer]:
            return None
        return [source for source in read_values(producer) if self._is_foreign(source, FUSION_HOME) or self._is_content(source)]

    def _is_content(self, value: ir.Value) -> bool:
        return value.is_graph_input() and bool(self.reach.content[value])

    def _cost(self, value: ir.Value) -> int:
        if value in self.direct:
            return 1
        has_name = value.is_graph_output() or value.is_graph_input()
        return tensor_bytes(value, self.request.sizes) + (0 if has_name else TENSOR_BYTES)

    def _reached_back(self, values: Iterable[ir.Value], home: str, stop: Container[ir.Value] | None = None) -> set[ir.Node]:
        """The nodes that a part must run to give these values.

        The walk ends at the values of ``stop``, or, without it, at what other parts compute.
        """
        found: set[ir.Node] = set()
        pending = list(values)
        while pending:
            value = pending.pop()
            producer = value.producer()
            is_wall = self._is_foreign(value, home) if stop is None else value in stop
            if producer is not None and producer not in found and not is_wall:
                found.add(producer)
                pending.extend(read_values(producer))
        return found


def _merge_trivial(graph: ir.Graph, homes: dict[ir.Node, str | None], names: list[str], reach: Reach) -> list[str]:
    """A part without a single weight would only cast and compare: the fusion does that."""
    weights = read_weights(graph, reach)
    notes = []
    for name in names:
        own = [node for node, home in homes.items() if home == name]
        if own and not any(weights[node] for node in own):
            notes.append(f"{name} has no weights of its own: the fusion computes what it needs of it")
            homes.update(dict.fromkeys(own, FUSION_HOME))
    return notes


def _refuse_mixed_bodies(graph: ir.Graph, reach: Reach, request: SplitRequest) -> None:
    """Control flow that several modalities reach and that holds weights of one of them cannot be divided.

    Raises:
        ExportError: names the operator and the weights.
    """
    every = set().union(*reach.content.values()) if reach.content else set()
    for node in graph:
        if not bodies(node):
            continue
        labels = frozenset[str]().union(*(reach.content[value] for value in node.outputs))
        names = [str(value.name) for value in _body_weights(node)]
        single = [name for name in names if request.regions.get(name) in every]
        if len(labels) > 1 and single:
            shown = ", ".join(f"{name} ({request.regions[name]})" for name in single[:3])
            raise ExportError(
                f"the model cannot be split: {' and '.join(sorted(labels))} both enter the {node.op_type} operator "
                f"{node.name}, which holds weights of one region: {shown}. Move this computation out of the loop or "
                f"condition, or export the model as one file"
            )


def _body_weights(node: ir.Node) -> list[ir.Value]:
    inside = [value for body in bodies(node) for value in body.initializers.values()]
    return [value for value in (*read_values(node), *inside) if is_weight(value)]


def _refuse_single(parts: tuple[PartPlan, ...], names: list[str], graph: ir.Graph, request: SplitRequest) -> None:
    """One part is the whole model.

    Raises:
        ExportError: says which inputs of which modality reach the outputs.
    """
    if len(parts) > 1:
        return
    told = ", ".join(f"{value.name} ({request.modalities.get(str(value.name)) or 'control'})" for value in graph.inputs)
    reason = f"all of it is {parts[0].name}" if parts else "no output depends on an input"
    if len(names) > 1:
        reason += f", although it has inputs of {' and '.join(names)}"
    raise ExportError(
        f"the model has nothing to split: {reason}. Its inputs are {told}. Export it as one file, or say what its inputs "
        f"hold (modalities={{...}}, --modality NAME=...)"
    )


def _part_names(names: list[str]) -> dict[str, str]:
    taken: set[str] = set()
    found = {FUSION_HOME: unused(FUSION, taken)}
    for name in names:
        plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
        found[name] = unused(plain or "part", taken)
    return found


def _values_in_order(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _name_crossings(graph: ir.Graph, crossings: Mapping[ir.Value, str], part_name: Mapping[str, str]) -> None:
    """``vision_features``, ``text_mask``, ...: numbered where a part hands over several of a kind; outputs keep their name."""
    groups: dict[str, list[ir.Value]] = {}
    for value, part in crossings.items():
        if value.dtype is None:
            node = value.producer()
            raise ExportError(
                f"the model cannot be split: the element type of {value.name}, which "
                f"{node.op_type if node else 'nothing'} gives, is unknown. Export the model as one file; this is a bug"
            )
        if not value.is_graph_output():
            kind = _KINDS.get(value.dtype.numpy().kind, "features")
            groups.setdefault(f"{part}_{kind}", []).append(value)
    taken = {str(value.name) for value in _all(graph)} | set(part_name.values())
    for name, values in groups.items():
        for number, value in enumerate(values, 1):
            value.name = unused(name if len(values) == 1 else f"{name}_{number}", taken)
    for value in crossings:
        if value.shape is not None:
            dims = enumerate(value.shape)
            value.shape = ir.Shape([f"{value.name}_dim_{dim}" if _is_unknown(size) else size for dim, size in dims])


def _is_unknown(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is None


def _all(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph.all_nodes() for value in node.outputs)]
