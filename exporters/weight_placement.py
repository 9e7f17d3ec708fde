"""Masked weights in the place of initializers: dense, as SparseLinear nodes, or as nodes that decode them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mfcompile.artifact import TensorEncoding
from mfcompile.errors import InputError
from mfcompile.exporters.decode_nodes import SharedConstants, pack_weight, stored_tensors
from mfcompile.exporters.packing import (
    ENCODINGS,
    EncodedWeight,
    EncodingPlan,
    choose_encodings,
    encode,
    possible_encodings,
)
from mfcompile.exporters.sparse_crossover import least_sparsity
from mfcompile.exporters.sparse_rewriting import (
    LinearWeight,
    find_linear,
    holds_functions,
    use_sparse_linear,
)
from mfcompile.exporters.stored_weights import StoredWeight
from mfcompile.masks import MaskSet


def checked_budget(load_budget: float | None) -> float:
    """A load budget, ``LOAD_BUDGET`` for None.

    Raises:
        InputError: it is below 1, which not even dense tensors fit.
    """
    if load_budget is None:
        return LOAD_BUDGET
    if isinstance(load_budget, bool) or not load_budget >= 1:
        raise InputError(
            f"load_budget={load_budget!r} is less than the dense tensors take: give at least 1, in multiples of their bytes"
        )
    return load_budget


INLINE = "plain nodes were asked for"

LOAD_BUDGET = 8.0
"""Memory that stock onnxruntime may take to create a session, in multiples of the bytes of the dense tensors.

Every encoding fits it, so that a file is as small as it can be, within 5 %: mask takes about 7 times the dense bytes, gap4 and
gap8 4 to 5 (``packing``; measured by ``python -m benchmarks.formats``), so a budget of 5 leaves masks to few weights.
"""


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
        values: "fp32" or "fp16"; "int8" where ``int8_placement`` reads them.
        inline: plain nodes only, for runtimes that refuse model-local functions.
        sizes: named dimension -> its size in the example inputs.
        load_budget: see ``LOAD_BUDGET``; for less, encodings are taken that are decoded with less memory and store more bytes.
    """

    format: str
    values: str
    inline: bool = False
    sizes: Mapping[str, int] | None = None
    load_budget: float = LOAD_BUDGET


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

    def stored(self, tensors: Sequence[ir.Value]) -> StoredWeight:
        """What the file says of it; ``tensors`` are the initializers that hold it."""
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
    shared = SharedConstants(graph)
    placed: dict[str, Placement] = {}
    stored: dict[str, StoredWeight] = {}
    nodes: list[ir.Node] = []
    decided = decide(model, weights, options)
    for weight in weights:
        placement = decided[weight.fqn]
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
            stored[weight.fqn] = placement.stored(tensors)
    nodes = [*shared.nodes, *nodes]
    if nodes:
        graph.insert_before(graph[0], nodes)
    return placed, stored


def decide(model: ir.Model, weights: Sequence[MaskedWeight], options: PlacementOptions) -> dict[str, Placement]:
    """How masked weights are encoded, and which of them SparseLinear nodes read.

    Args:
        model: theirs; not changed.
        weights: the masked parameters.
        options: how to store them.

    Returns:
        FQN -> what was decided.
    """
    size = _weight_bytes(model)
    layers: dict[str, tuple[LinearWeight, str]] = {}
    possible: dict[str, tuple[EncodingPlan, ...]] = {}
    for weight in weights:
        mask, dtype = weight.mask(), weight.tensor.dtype.numpy()
        layer, reason = LinearWeight(weight.initializer, ()), ""
        if options.format == "packed":
            layer = find_linear(weight.initializer, model.graph)
            reason = INLINE if options.inline else _why_dense(model, layer, mask, options, size)
        allowed: tuple[str, ...] = ENCODINGS if options.format == "packed" else ("dense",)
        if len(layer.uses) > 1 and not reason:  # stock onnxruntime would decode a mask once for each
            allowed = tuple(encoding for encoding in allowed if encoding != "mask")
        is_swapped = layer.is_transposed and not reason
        possible[weight.fqn] = possible_encodings(mask.T if is_swapped else mask, dtype, options.values, allowed=allowed)
        layers[weight.fqn] = (layer, reason)
    chosen = choose_under_budget(possible, size, options.load_budget)
    return {fqn: _placement(plan, *layers[fqn]) for fqn, plan in chosen.items()}


def choose_under_budget(
    possible: Mapping[str, Sequence[EncodingPlan]], dense_bytes: int, load_budget: float
) -> dict[str, EncodingPlan]:
    """Encodings with which stock onnxruntime creates a session in ``load_budget`` times the bytes of the dense tensors.

    Args:
        possible: FQN -> what it can be, dense first.
        dense_bytes: all tensors of the dense model.
        load_budget: see ``LOAD_BUDGET``.
    """
    others = dense_bytes - sum(plans[0].weight_count * plans[0].dtype.itemsize for plans in possible.values())
    return choose_encodings(possible, lambda plan: plan.stored_bytes + plan.folded_bytes, load_budget * dense_bytes - others)


def _placement(plan: EncodingPlan, layer: LinearWeight, reason: str) -> Placement:
    if plan.encoding == "dense":
        own = plan.shape[::-1] if layer.is_transposed and not reason else plan.shape
        return Placement(replace(plan, shape=own), None, reason or ("" if not layer.uses else "packing it saves too little"))
    return Placement(plan, None, reason) if reason else Placement(plan, layer)


def _why_dense(
    model: ir.Model, layer: LinearWeight, mask: NDArray[np.bool_], options: PlacementOptions, model_bytes: int
) -> str:
    if not layer.uses:
        return layer.refusal
    if not holds_functions(model):
        return "the file is too old to hold functions"
    tokens = layer.token_count(options.sizes or {})
    sparsity = 1 - np.count_nonzero(mask) / max(1, mask.size)
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
