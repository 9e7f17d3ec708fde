"""Masked weights in the place of initializers: dense, as SparseLinear nodes, or as nodes that decode them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mfcompile.artifact import TensorEncoding
from mfcompile.exporters.decode_nodes import SharedConstants, pack_weight, stored_tensors
from mfcompile.exporters.packing import EncodedWeight, EncodingPlan, encode, plan_encoding
from mfcompile.exporters.sparse_crossover import least_sparsity
from mfcompile.exporters.sparse_linear import OP_TYPES
from mfcompile.exporters.sparse_rewriting import (
    LinearWeight,
    find_linear,
    holds_functions,
    use_sparse_linear,
)
from mfcompile.exporters.stored_weights import StoredWeight
from mfcompile.masks import MaskSet

INLINE = "plain nodes were asked for"


@dataclass(frozen=True)
class MaskedWeight:
    """One masked parameter and the initializer that holds it.

    Attributes:
        fqn: the parameter, as the masks name it.
        initializer: its value in the graph.
        tensor: the unmasked weight, sharing memory with the user's module.
        masks: where its mask is.
    """

    fqn: str
    initializer: ir.Value
    tensor: ir.TensorProtocol
    masks: MaskSet

    def mask(self) -> NDArray[np.bool_]:
        """The mask as a bool array, in the layout of the parameter."""
        mask: NDArray[np.bool_] = self.masks[self.fqn].numpy()
        return mask


@dataclass(frozen=True)
class PlacementOptions:
    """How weights are stored.

    Attributes:
        format: "packed" or "dense".
        values: "fp32" or "fp16".
        inline: plain nodes only, for runtimes that refuse model-local functions.
        sizes: named dimension -> its size in the example inputs.
    """

    format: str
    values: str
    inline: bool = False
    sizes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Placement:
    """One masked weight, decided.

    Attributes:
        plan: how it is encoded; of the transpose where the layers store it transposed.
        layer: its layers, where SparseLinear nodes read it.
        why_dense: why a dense product is computed with it, "" where none is.
    """

    plan: EncodingPlan
    layer: LinearWeight | None
    why_dense: str = ""

    @property
    def is_transposed(self) -> bool:
        """The stored tensors hold the transpose of the parameter."""
        return self.layer is not None and self.layer.is_transposed

    def encoding(self, fqn: str) -> TensorEncoding:
        """What an artefact says of it."""
        plan = self.plan
        return TensorEncoding(
            fqn, plan.encoding, plan.stored_bytes, 4 * plan.weight_count, plan.kept_count, plan.weight_count,
            self.layer is not None, self.why_dense,
        )  # fmt: skip

    def stored(self, fqn: str, tensors: Sequence[ir.Value]) -> StoredWeight:
        """What the file says of it."""
        shape = self.plan.shape[::-1] if self.is_transposed else self.plan.shape
        names = tuple(str(value.name) for value in tensors)
        return StoredWeight(self.plan.encoding, shape, names, self.is_transposed, self.layer is not None)


def place_weights(
    model: ir.Model, weights: Sequence[MaskedWeight], options: PlacementOptions
) -> tuple[dict[str, Placement], dict[str, StoredWeight]]:
    """Put masked tensors in place of initializers; they are computed when the file is written.

    Args:
        model: changed in place; initializers of the weights have the names of the parameters.
        weights: the masked parameters.
        options: how to store them.

    Returns:
        FQN -> what was decided; and of the packed ones, where the file has them.
    """
    graph = model.graph
    size = _weight_bytes(model)
    shared = SharedConstants(graph)
    placed: dict[str, Placement] = {}
    stored: dict[str, StoredWeight] = {}
    nodes: list[ir.Node] = []
    for weight in weights:
        placement = decide(model, weight.initializer, weight.mask(), options, size)
        plan, layer = placement.plan, placement.layer
        load = partial(_encode, weight, plan.encoding, options.values, placement.is_transposed)
        placed[weight.fqn] = placement
        if layer is not None:
            tensors: Sequence[ir.Value] = stored_tensors(weight.fqn, plan, load)
            use_sparse_linear(model, layer, plan.encoding, *tensors)
        else:
            packed = pack_weight(weight.fqn, plan, load, shared)
            weight.initializer.replace_all_uses_with(packed.value, replace_graph_outputs=True)
            tensors = packed.initializers
            nodes += packed.nodes
        del graph.initializers[weight.fqn]
        for tensor in tensors:
            graph.initializers.add(tensor)
        if plan.encoding != "dense":
            stored[weight.fqn] = placement.stored(weight.fqn, tensors)
    nodes = [*shared.nodes, *nodes]
    if nodes:
        graph.insert_before(graph[0], nodes)
    return placed, stored


def decide(
    model: ir.Model, weight: ir.Value, mask: NDArray[np.bool_], options: PlacementOptions, model_bytes: int
) -> Placement:
    """How a masked weight is encoded, and whether SparseLinear nodes read it.

    Args:
        model: the weight's; not changed.
        weight: its initializer.
        mask: in the layout of the initializer, 1 = kept.
        options: how to store it.
        model_bytes: of all dense weights of the model.
    """
    assert weight.dtype is not None  # initializers have types
    dtype = weight.dtype.numpy()
    if options.format == "dense":
        return Placement(plan_encoding(mask, dtype, options.values, allowed=("dense",)), None)
    layer = find_linear(weight, model.graph)
    own = mask.T if layer.is_transposed else mask
    plan = plan_encoding(own, dtype, options.values, allowed=("dense", *OP_TYPES))
    if plan.encoding not in OP_TYPES:
        return Placement(plan_encoding(mask, dtype, options.values), None, "packing it saves too little")
    reason = INLINE if options.inline else _why_dense(model, layer, plan, options, model_bytes)
    if reason:
        return Placement(plan_encoding(mask, dtype, options.values), None, reason)
    return Placement(plan, layer)


def _why_dense(model: ir.Model, layer: LinearWeight, plan: EncodingPlan, options: PlacementOptions, model_bytes: int) -> str:
    if not layer.uses:
        return layer.refusal
    if not holds_functions(model):
        return "the file is too old to hold functions"
    tokens = layer.token_count(options.sizes or {})
    sparsity = 1 - plan.kept_count / plan.weight_count
    least = least_sparsity(tokens, model_bytes)
    if sparsity < least:
        count = "many" if tokens is None else f"{tokens:,}"
        return f"with {count} tokens dense is faster up to a sparsity of {least:.0%}, and it has {sparsity:.0%}"
    return ""


def _weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _encode(weight: MaskedWeight, encoding: str, values: str, is_transposed: bool) -> EncodedWeight:
    array, mask = weight.tensor.numpy(), weight.mask()
    if is_transposed:
        array, mask = array.T, mask.T
    return encode(array, mask, values, encoding=encoding, name=weight.fqn)
