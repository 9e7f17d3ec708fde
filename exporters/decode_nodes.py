"""The standard ONNX operators that decode a packed weight; onnxruntime folds them when it creates the session.

::

    <fqn>.gaps (uint8) -> [gap4: Cast -> Gather in a table -> Reshape] -> Cast -> CumSum ---+
    <fqn>.values -> [fp16: Cast] ------------------------------------------------> ScatterElements -> Reshape -> <fqn>
    zeros of the weight's length, shared by all weights of that length ------------+

    mask: see ``mfcompile.exporters.sparse_linear``, with tables that all weights share
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir

from mfcompile.exporters.packing import Array, EncodedWeight, EncodingPlan
from mfcompile.exporters.sparse_linear import kept_in_byte, ranks_in_byte

INT32_PLACES = 2**31 - 1


@dataclass(frozen=True)
class SharedConstants:
    """Constants that the decode nodes of several weights read; each is made once.

    Attributes:
        graph: where initializers are registered.
        made: name -> value.
        nodes: nodes that compute shared constants, in order.
    """

    graph: ir.Graph
    made: dict[str, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer of that name, made on first use."""
        if name not in self.made:
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            self.graph.initializers.add(value)
            self.made[name] = value
        return self.made[name]

    def zeros(self, length: int, dtype: ir.DataType) -> ir.Value:
        """(length,) of +0.0."""
        name = f"zeros.{dtype.name.lower()}.{length}"
        if name not in self.made:
            size = self.constant(f"length.{length}", np.array([length], np.int64))
            zero = ir.tensor([0], dtype=dtype)
            output = ir.val(name, dtype, [length])
            self.nodes.append(ir.node("ConstantOfShape", [size], {"value": zero}, outputs=[output], name=name))
            self.made[name] = output
        return self.made[name]


class AddNode(Protocol):
    """Adds a node named after its output, and returns that."""

    def __call__(self, op_type: str, inputs: list[ir.Value], output: ir.Value, **attributes: int) -> ir.Value:  # noqa: D102
        ...


@dataclass(frozen=True)
class PackedWeight:
    """What replaces the initializer of one weight.

    Attributes:
        value: the decoded weight, under the FQN of the parameter.
        nodes: the nodes that decode it, in order.
        initializers: the stored tensors.
    """

    value: ir.Value
    nodes: tuple[ir.Node, ...]
    initializers: tuple[ir.Value, ...]


def pack_weight(name: str, plan: EncodingPlan, load: Callable[[], EncodedWeight], shared: SharedConstants) -> PackedWeight:
    """Stored tensors and decode nodes of one weight.

    Args:
        name: FQN of the weight; the decoded value has this name.
        plan: the encoding, and how many entries it stores.
        load: encodes the weight; called when the file is written, so that only one weight is in memory at a time.
        shared: constants that several weights read.
    """
    dtype, stored = ir.DataType.from_numpy(plan.dtype), ir.DataType.from_numpy(plan.values_dtype)
    entries = list(plan.shape) if plan.encoding == "dense" else [plan.entries]
    decoded = ir.val(name, dtype, list(plan.shape))
    if plan.encoding == "dense" and stored == dtype:
        decoded.const_value = _lazy(name, stored, entries, lambda: load().values)
        return PackedWeight(decoded, (), (decoded,))
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], output: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes, outputs=[output], name=output.name))
        return output

    if plan.encoding == "dense":
        values = _stored(f"{name}.values", stored, entries, lambda: load().values)
        add("Cast", [values], decoded, to=int(dtype))
        return PackedWeight(decoded, tuple(nodes), (values,))
    gaps, values = stored_tensors(name, plan, load)
    kept = values
    if stored != dtype:
        kept = add("Cast", [values], ir.val(f"{name}.kept", dtype, entries), to=int(dtype))
    steps = _mask_steps if plan.encoding == "mask" else _gap_steps
    is_flat = len(plan.shape) == 1 and plan.encoding != "mask"
    flat_shape = [plan.gap_bytes, 8] if plan.encoding == "mask" else [plan.weight_count]
    flat = decoded if is_flat else ir.val(f"{name}.flat", dtype, flat_shape)
    steps(name, plan, gaps, kept, flat, shared, add)
    if not is_flat:
        text = "x".join(map(str, plan.shape))
        shape = shared.constant(f"shape.{text}", np.array(plan.shape, np.int64))
        add("Reshape", [flat, shape], decoded, allowzero=1)
    return PackedWeight(decoded, tuple(nodes), (gaps, values))


def _gap_steps(
    name: str, plan: EncodingPlan, gaps: ir.Value, kept: ir.Value, flat: ir.Value, shared: SharedConstants, add: AddNode
) -> None:
    """From gaps and kept values to the flat weight: a sum gives places, a scatter fills them."""
    index_type = ir.DataType.INT32 if plan.weight_count <= INT32_PLACES else ir.DataType.INT64
    steps = gaps
    if plan.encoding == "gap4":
        codes = add("Cast", [gaps], ir.val(f"{name}.codes", ir.DataType.INT32, [plan.gap_bytes]), to=int(ir.DataType.INT32))
        halves = ir.val(f"{name}.halves", ir.DataType.UINT8, [plan.gap_bytes, 2])
        add("Gather", [shared.constant("gap4.table", _half_bytes()), codes], halves, axis=0)
        everything = shared.constant("flat", np.array([-1], np.int64))
        steps = add("Reshape", [halves, everything], ir.val(f"{name}.steps", ir.DataType.UINT8, [plan.entries]))
    wide = add("Cast", [steps], ir.val(f"{name}.distances", index_type, [plan.entries]), to=int(index_type))
    axis = shared.constant("axis.0", np.array(0, np.int64))
    positions = add("CumSum", [wide, axis], ir.val(f"{name}.positions", index_type, [plan.entries]))
    zeros = shared.zeros(plan.weight_count, ir.DataType.from_numpy(plan.dtype))
    add("ScatterElements", [zeros, positions, kept], flat, axis=0)


def _mask_steps(
    name: str, plan: EncodingPlan, mask: ir.Value, kept: ir.Value, flat: ir.Value, shared: SharedConstants, add: AddNode
) -> None:
    """From mask and kept values to (bytes, 8): every place gathers its value, a pruned one the zero behind them."""
    int32, size = ir.DataType.INT32, plan.gap_bytes
    codes = add("Cast", [mask], ir.val(f"{name}.codes", int32, [size]), to=int(int32))
    counts = ir.val(f"{name}.counts", int32, [size])
    add("Gather", [shared.constant("mask.counts", kept_in_byte()), codes], counts, axis=0)
    axis = shared.constant("axis.0", np.array(0, np.int64))
    before = add("CumSum", [counts, axis], ir.val(f"{name}.before", int32, [size]), exclusive=1)
    column = shared.constant("column", np.array([-1, 1], np.int64))
    before_column = add("Reshape", [before, column], ir.val(f"{name}.before.column", int32, [size, 1]))
    ranks = ir.val(f"{name}.ranks", int32, [size, 8])
    add("Gather", [shared.constant("mask.ranks", ranks_in_byte()), codes], ranks, axis=0)
    ordinals = add("Add", [ranks, before_column], ir.val(f"{name}.ordinals", int32, [size, 8]))
    last = shared.constant("mask.last", np.array(-1, np.int32))
    places = add("Max", [ordinals, last], ir.val(f"{name}.places", int32, [size, 8]))
    add("Gather", [kept, places], flat, axis=0)


def stored_tensors(name: str, plan: EncodingPlan, load: Callable[[], EncodedWeight]) -> tuple[ir.Value, ir.Value]:
    """``<name>.gaps`` (of a mask ``<name>.mask``) and ``<name>.values`` of a packed weight, made when they are written."""
    load = _KeptOnce(load)
    stored = ir.DataType.from_numpy(plan.values_dtype)
    places = "mask" if plan.encoding == "mask" else "gaps"
    gaps = _stored(f"{name}.{places}", ir.DataType.UINT8, [plan.gap_bytes], lambda: _gaps(load()))
    return gaps, _stored(f"{name}.values", stored, [plan.entries], lambda: load().values)


class _KeptOnce:
    """What a function encodes: gaps and values are written one after the other, so the result is kept for one more use."""

    def __init__(self, load: Callable[[], EncodedWeight]) -> None:
        self._load = load
        self._kept: EncodedWeight | None = None

    def __call__(self) -> EncodedWeight:
        if self._kept is not None:
            encoded, self._kept = self._kept, None
            return encoded
        encoded = self._load()
        self._kept = None if encoded.gaps is None else encoded
        return encoded


def _gaps(encoded: EncodedWeight) -> Array:
    assert encoded.gaps is not None  # the plan of this weight is not dense
    return encoded.gaps


def _half_bytes() -> Array:
    """(256, 2) uint8: the high and the low half of every byte."""
    byte = np.arange(256, dtype=np.uint8)
    return np.stack([byte >> 4, byte & 15], axis=1)


def _stored(name: str, dtype: ir.DataType, shape: list[int], load: Callable[[], Array]) -> ir.Value:
    return ir.val(name, dtype, shape, const_value=_lazy(name, dtype, shape, load))


def _lazy(name: str, dtype: ir.DataType, shape: list[int], load: Callable[[], Array]) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.tensor(load(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
