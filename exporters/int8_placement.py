"""Linear layers in int8: every weight matrix that layers multiply by, pruned or not, in the place of its initializer.

::

    X -> MatMul (W) -> Add (bias) -> Y

    pruned, packed:  X, <fqn>.gaps, <fqn>.values, <fqn>.scales, bias -> SparseLinearInt8 -> Y
    otherwise:       X -> DynamicQuantizeLinear -> MatMulInteger (<fqn>.values) -> Cast -> Mul (x_scale <fqn>.scales)
                       -> Add (bias) -> Y

Layers are found by structure (``sparse_rewriting.find_linear``). Weights that are read in any other way (embeddings,
convolutions) stay in floating point, masked ones packed as ever. Layers of one X share its quantization. onnxruntime fuses
what it is given here to DynamicQuantizeMatMul, or to MatMulIntegerToFloat where an X is shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mfcompile.exporters.packing import Array
from mfcompile.exporters.quantization import (
    DENSE,
    GAP4,
    GAP8,
    LARGEST_INPUTS,
    Int8Plan,
    QuantizedWeight,
    encode_int8,
    plan_int8,
    quantize_rows,
)
from mfcompile.exporters.sparse_linear import DOMAIN, VERSION
from mfcompile.exporters.sparse_linear_int8 import OP_TYPES, int8_attributes, int8_function
from mfcompile.exporters.sparse_rewriting import LinearUse, LinearWeight, find_linear, holds_functions
from mfcompile.exporters.stored_weights import INT8_KEY, StoredWeight
from mfcompile.exporters.weight_placement import INLINE, MaskedWeight, Placement, PlacementOptions, place_weights


@dataclass
class _Weight:
    """A weight and its layers.

    Attributes:
        name: FQN of a masked weight, the initializer's name of another.
        tensor: as the graph has it, unmasked.
        layer: with uses.
        masked: where its mask is; None keeps everything.
    """

    name: str
    tensor: ir.TensorProtocol
    layer: LinearWeight
    masked: MaskedWeight | None = None
    _quantized: QuantizedWeight | None = field(default=None, repr=False)

    def mask(self) -> NDArray[np.bool_]:
        """(N, K), 1 = kept."""
        if self.masked is None:
            return np.ones(self.shape, bool)
        mask = self.masked.mask()
        return mask.T if self.layer.is_transposed else mask

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.tensor.shape.numpy()
        return (columns, rows) if self.layer.is_transposed else (rows, columns)

    def quantized(self) -> QuantizedWeight:
        """The masked weight in int8. Values and scales are written one after the other: it is kept for one more use."""
        if self._quantized is not None:
            found, self._quantized = self._quantized, None
            return found
        weight = self.tensor.numpy()
        matrix = weight.T if self.layer.is_transposed else weight
        self._quantized = quantize_rows(np.where(self.mask(), matrix, np.zeros((), matrix.dtype)), self.name)
        return self._quantized


@dataclass(frozen=True)
class _Activation:
    """X in uint8, shared by all layers that read it."""

    values: ir.Value
    scale: ir.Value
    zero: ir.Value


def place_int8(
    model: ir.Model, weights: Sequence[MaskedWeight], options: PlacementOptions
) -> tuple[dict[str, Placement], dict[str, StoredWeight]]:
    """Put int8 layers in place of all linear layers, and other masked weights in place as ``place_weights`` does.

    Args:
        model: changed in place; initializers of masked weights have the names of the parameters.
        weights: the masked parameters.
        options: how to store them; values are "int8".

    Returns:
        FQN -> what was decided, of masked weights; and of the packed ones that a reader may decode, where the file has them.
    """
    graph = model.graph
    is_packed = options.format == "packed" and not options.inline and holds_functions(model)
    placed: dict[str, Placement] = {}
    rest, own = [], {weight.fqn for weight in weights}
    writer = _Writer(model)
    for weight in weights:
        layer = find_linear(weight.initializer, graph)
        if not _fits(layer):
            rest.append(weight)
            continue
        found = _Weight(weight.fqn, weight.tensor, layer, weight)
        plan = plan_int8(found.mask(), encodings=(DENSE, GAP8, GAP4) if is_packed else (DENSE,))
        reason = INLINE if options.inline else "packing it saves too little"
        why_dense = reason if options.format == "packed" and plan.encoding == DENSE else ""
        placed[weight.fqn] = Placement(plan, layer if plan.encoding != DENSE else None, why_dense)
        writer.write(found, plan)
    for name, value in list(graph.initializers.items()):
        other = find_linear(value, graph) if name not in own else None
        if other is not None and value.const_value is not None and _fits(other):
            found = _Weight(name, value.const_value, other)
            writer.write(found, plan_int8(np.ones(found.shape, bool), encodings=(DENSE,)))
    others, stored = place_weights(model, rest, replace(options, values="fp32"))
    return {weight.fqn: (placed | others)[weight.fqn] for weight in weights}, stored


def describe_int8(placed: Mapping[str, Placement]) -> dict[str, str]:
    """What the metadata of a file say of weights that SparseLinearInt8 nodes read; {} where there are none."""
    found = {
        fqn: {"encoding": item.plan.encoding, "block": item.plan.block, "shape": list(item.plan.shape)}
        for fqn, item in placed.items()
        if isinstance(item.plan, Int8Plan) and item.layer is not None
    }
    return {INT8_KEY: json.dumps(found, separators=(",", ":"))} if found else {}


def _fits(layer: LinearWeight) -> bool:
    """There are layers, and their sums fit int32."""
    if not layer.uses or layer.value.shape is None:
        return False
    columns = layer.value.shape.numpy()[0 if layer.is_transposed else 1]
    return 0 < columns <= LARGEST_INPUTS and all(size > 0 for size in layer.value.shape.numpy())


@dataclass
class _Writer:
    """Replaces layers of one model.

    Attributes:
        model: changed in place.
        activations: X -> its quantization.
    """

    model: ir.Model
    activations: dict[ir.Value, _Activation] = field(default_factory=dict)

    def write(self, weight: _Weight, plan: Int8Plan) -> None:
        """Int8 nodes in place of every layer of a weight; its initializer and transposes go."""
        del self.model.graph.initializers[str(weight.layer.value.name)]
        scales = self._tensor(f"{weight.name}.scales", ir.DataType.FLOAT, [weight.shape[0]], lambda: weight.quantized().scales)
        write_layer = self._dense(weight, scales) if plan.encoding == DENSE else self._sparse(weight, plan, scales)
        for number, use in enumerate(weight.layer.uses, start=1):
            name = weight.name if number == 1 else f"{weight.name}.{number}"
            output = ir.Value(name=use.output.name, shape=use.output.shape, type=use.output.type)
            for node in write_layer(use, name, output):
                self.model.graph.insert_before(use.nodes[-1], node)
            use.output.replace_all_uses_with(output, replace_graph_outputs=True)
            for replaced in reversed(use.nodes):
                self.model.graph.remove(replaced, safe=True)
            self._follow(use.output, output)
        for swap in weight.layer.transposes:
            self.model.graph.remove(swap, safe=True)

    def _sparse(self, weight: _Weight, plan: Int8Plan, scales: ir.Value) -> Callable[[LinearUse, str, ir.Value], list[ir.Node]]:
        gaps = self._tensor(
            f"{weight.name}.gaps", ir.DataType.UINT8, [plan.gap_bytes],
            lambda: encode_int8(np.zeros(weight.shape, np.int8), weight.mask(), plan).gaps,  # the mask alone decides
        )  # fmt: skip
        values = self._tensor(
            f"{weight.name}.values", ir.DataType.INT8, [plan.entries, plan.block],
            lambda: encode_int8(weight.quantized().values, weight.mask(), plan).values,
        )  # fmt: skip
        function = ir.serde.deserialize_function(int8_function(plan.encoding, self.model.graph.opset_imports[""]))
        self.model.functions.setdefault(function.identifier(), function)
        self.model.graph.opset_imports[DOMAIN] = VERSION

        def write_layer(use: LinearUse, name: str, output: ir.Value) -> list[ir.Node]:
            bias = use.bias if use.bias is not None else self._zeros(weight.shape[0])
            attributes = int8_attributes(weight.shape, plan.block)
            inputs = [use.x, gaps, values, scales, bias]
            return [ir.node(OP_TYPES[plan.encoding], inputs, attributes, domain=DOMAIN, outputs=[output], name=name)]

        return write_layer

    def _dense(self, weight: _Weight, scales: ir.Value) -> Callable[[LinearUse, str, ir.Value], list[ir.Node]]:
        rows, columns = weight.shape
        values = self._tensor(
            f"{weight.name}.values", ir.DataType.INT8, [columns, rows],
            lambda: np.ascontiguousarray(weight.quantized().values.T),
        )  # fmt: skip

        def write_layer(use: LinearUse, name: str, output: ir.Value) -> list[ir.Node]:
            x, nodes = self._activation(use.x), []

            def add(op_type: str, inputs: list[ir.Value], last: str, dtype: ir.DataType, **attributes: int) -> ir.Value:
                is_output = not last
                result = output if is_output else ir.Value(name=f"{name}.{last}", type=ir.TensorType(dtype))
                node_name = name if is_output else str(result.name)
                nodes.append(ir.node(op_type, inputs, attributes, outputs=[result], name=node_name))
                return result

            sums = add("MatMulInteger", [x.values, values, x.zero], "sums", ir.DataType.INT32)
            wide = add("Cast", [sums], "wide", ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
            factors = add("Mul", [x.scale, scales], "factors", ir.DataType.FLOAT)
            product = add("Mul", [wide, factors], "" if use.bias is None else "product", ir.DataType.FLOAT)
            if use.bias is not None:
                add("Add", [product, use.bias], "", ir.DataType.FLOAT)
            return nodes

        return write_layer

    def _activation(self, x: ir.Value) -> _Activation:
        if x not in self.activations:
            names = (f"{x.name}.{part}" for part in ("quantized", "scale", "zero"))
            dtypes = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            shapes = (x.shape, ir.Shape([]), ir.Shape([]))
            outputs = [
                ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
                for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
            ]
            node = ir.node("DynamicQuantizeLinear", [x], outputs=outputs, name=f"{x.name}.quantize")
            producer = x.producer()
            if producer is None:
                self.model.graph.insert_before(self.model.graph[0], node)
            else:
                self.model.graph.insert_after(producer, node)
            self.activations[x] = _Activation(*outputs)
        return self.activations[x]

    def _follow(self, old: ir.Value, new: ir.Value) -> None:
        """The X of later layers may be the output of this one."""
        if old in self.activations:
            self.activations[new] = self.activations.pop(old)

    def _zeros(self, length: int) -> ir.Value:
        """(length,) float32 for a layer without a bias: a function cannot have an optional input."""
        name = f"mfcompile.zeros.{length}"
        if name not in self.model.graph.initializers:
            zeros = np.zeros(length, np.float32)
            self.model.graph.initializers.add(ir.val(name, const_value=ir.tensor(zeros, name=name)))
        return self.model.graph.initializers[name]

    def _tensor(self, name: str, dtype: ir.DataType, shape: list[int], load: Callable[[], Array]) -> ir.Value:
        """An initializer that is computed when it is written."""
        taken = self.model.graph.initializers
        name = name if name not in taken else f"mfcompile.{name}"
        lazy = ir.LazyTensor(lambda: ir.tensor(load(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
        value = ir.val(name, dtype, shape, const_value=lazy)
        taken.add(value)
        return value
