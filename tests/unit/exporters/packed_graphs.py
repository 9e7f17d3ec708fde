"""Small ONNX graphs of masked weights, dense and packed, and what onnxruntime makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mfcompile.exporters.weight_placement import MaskedWeight, Placement, PlacementOptions, place_weights
from mfcompile.masks import MaskSet, PackedMask

Array = NDArray[Any]
DECODING = {"ScatterElements", "CumSum", "ConstantOfShape"}


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    tensors: Mapping[str, Array],
    *,
    opset: int = 18,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A checked float32 model with inferred shapes; outputs are of whatever shape they come out in."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return inferred


@dataclass(frozen=True)
class Packed:
    """A model with packed weights.

    Attributes:
        proto: the model.
        placed: weight -> what was decided.
        dense: the same model with zeros in its weights.
    """

    proto: onnx.ModelProto
    placed: dict[str, Placement]
    dense: onnx.ModelProto

    @property
    def sparse_nodes(self) -> list[onnx.NodeProto]:
        """Nodes of the package's domain."""
        return [node for node in self.proto.graph.node if node.domain == "mfcompile"]


def pack(
    model: onnx.ModelProto, masks: Mapping[str, Array], *, sizes: Mapping[str, int] | None = None, **options: Any
) -> Packed:
    """Mask weights and pack them; the result passes the full check."""
    mask_set = MaskSet({name: PackedMask.pack(torch.from_numpy(mask)) for name, mask in masks.items()})
    graph = ir.from_proto(model)
    weights = []
    for name in masks:
        value = graph.graph.initializers[name]
        assert value.const_value is not None
        weights.append(MaskedWeight(name, value, value.const_value, mask_set))
    placed, _ = place_weights(
        graph, weights, PlacementOptions(**{"format": "packed", "values": "fp32", "sizes": sizes, **options})
    )
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    dense = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in dense.graph.initializer:
        if tensor.name in masks:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.where(masks[tensor.name], array, 0).astype(array.dtype), tensor.name))
    return Packed(proto, placed, dense)


def session(model: onnx.ModelProto, library: str | None = None, optimised: str = "") -> onnxruntime.InferenceSession:
    """A session of one thread; ``optimised`` is where the optimised model is written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if library is not None:
        options.register_custom_ops_library(library)
    if optimised:
        options.optimized_model_filepath = optimised
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
