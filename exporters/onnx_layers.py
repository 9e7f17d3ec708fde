"""The graph of an ONNX file as it is stored, and what replaces its nodes where layers become sparse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import onnx
import onnx_ir as ir

from mfcompile.exporters.onnx_splicing import Chunk, as_array
from mfcompile.exporters.sparse_linear import DOMAIN, VERSION, sparse_linear_function, sparse_linear_node
from mfcompile.exporters.split_build import dimension_sizes
from mfcompile.exporters.stored_weights import StoredWeight
from mfcompile.exporters.weight_placement import MaskedWeight, Placement, PlacementOptions, decide
from mfcompile.inputs import ExampleInputs
from mfcompile.masks import MaskSet
from mfcompile.onnx_file import OnnxFile, inferred_types, is_injected
from mfcompile.onnx_heads import skeleton

MODEL_FUNCTION, MODEL_OPSET = 25, 8
"""Fields of a ModelProto."""


class StoredGraph:
    """The main graph of a file, node by node as the file has it; large tensors have shapes and no values.

    Args:
        file: the opened file.
        example: inputs whose sizes stand for named dimensions.
    """

    def __init__(self, file: OnnxFile, example: ExampleInputs) -> None:
        self._file, record = file, file.record
        proto = onnx.ModelProto.FromString(
            skeleton(record, frozenset(name for name, item in record.tensors.items() if is_injected(item)))
        )
        del proto.graph.value_info[:]
        known = inferred_types(proto)
        present = {item.name for item in (*proto.graph.input, *proto.graph.output)}
        for name, kind in known.items():
            if name not in present:
                proto.graph.value_info.add(name=name, type=kind)
        self.model = ir.from_proto(proto)
        self.sizes = dimension_sizes(self.model, example.tensors())
        self.is_extended = DOMAIN in {item.domain for item in proto.opset_import}
        self._places = {node: index for index, node in enumerate(self.model.graph)}
        self._values = {value.name: value for node in self.model.graph for value in node.outputs}
        self._values |= dict(self.model.graph.initializers)

    def decide(self, masks: MaskSet, options: PlacementOptions) -> dict[str, Placement]:
        """How masked weights are encoded, and which SparseLinear nodes read; none do in a file that has some already."""
        options = replace(options, inline=options.inline or self.is_extended)
        weights = []
        for fqn in masks.packed:
            name = self._file.stored_names[fqn]
            tensor = ir.tensor(as_array(self._file.get_parameter(fqn)), name=name)
            weights.append(MaskedWeight(fqn, self._values[name], tensor, masks))
        return decide(self.model, weights, options)

    def place(self, node: ir.Node) -> int:
        """Which node of the graph it is."""
        return self._places[node]


@dataclass
class NodeChanges:
    """Nodes that give way to others, by their place in the graph.

    Attributes:
        dropped: places of nodes that go.
        added: place -> the node that stands there now.
        functions: local functions that the new nodes need.
    """

    dropped: set[int] = field(default_factory=set)
    added: dict[int, onnx.NodeProto] = field(default_factory=dict)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)

    def add_layer(self, graph: StoredGraph, placement: Placement, tensors: Iterable[str]) -> None:
        """Put SparseLinear nodes in place of every layer of a weight.

        Args:
            graph: the file's.
            placement: of the weight; it has a layer.
            tensors: names of its gaps and values.
        """
        layer, plan = placement.layer, placement.plan
        assert layer is not None  # sparse nodes read it
        shape = plan.shape[0], plan.shape[1]
        for number, use in enumerate(layer.uses, start=1):
            names = [str(use.x.name), *tensors, *([] if use.bias is None else [str(use.bias.name)])]
            name = str(layer.value.name) if number == 1 else f"{layer.value.name}.{number}"
            self.dropped |= {graph.place(node) for node in use.nodes}
            self.added[graph.place(use.nodes[-1])] = sparse_linear_node(plan.encoding, names, str(use.output.name), shape, name)
            function = sparse_linear_function(plan.encoding, graph.model.graph.opset_imports[""], has_bias=use.bias is not None)
            self.functions[function.name] = function
        self.dropped |= {graph.place(node) for node in layer.transposes}

    @property
    def model_fields(self) -> Mapping[int, list[bytes]]:
        """Field of the model -> what it holds more."""
        if not self.functions:
            return {}
        opset = onnx.helper.make_opsetid(DOMAIN, VERSION)
        functions = [item.SerializeToString() for item in self.functions.values()]
        return {MODEL_OPSET: [opset.SerializeToString()], MODEL_FUNCTION: functions}


@dataclass
class PackedParts:
    """What stands in a file for its replaced weights.

    Attributes:
        nodes: nodes that decode, serialised, for the front of the graph.
        fields: stored tensors, as fields of the graph.
        changes: nodes that become SparseLinear.
        weights: name of a weight -> where it is.
    """

    nodes: list[bytes] = field(default_factory=list)
    fields: list[Chunk] = field(default_factory=list)
    changes: NodeChanges = field(default_factory=NodeChanges)
    weights: dict[str, StoredWeight] = field(default_factory=dict)
