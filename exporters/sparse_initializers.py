"""Masked weights as ``sparse_initializer``, the form of the ONNX specification: kept values and an int64 index for each.

At density d and v bytes per value a weight takes d (v + 8) bytes per place, against v dense: it is larger than dense below a
sparsity of 8 / (v + 8), two thirds in float32, and always larger than packed. onnxruntime makes it dense when it loads it. The
tensors must lie inside the .onnx file, which may hold 2 GB.

onnx.checker passes such a file in its plain check. Its full check also infers shapes, and there a sparse initializer is of type
``sparse_tensor``, which no operator's schema takes ("type case mismatch. existing=tensor_type inferred=sparse_tensor_type"); so
the full check is made of the same graph with the weights as dense inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from mfcompile.errors import InputError
from mfcompile.exporters.onnx_files import FileLayout
from mfcompile.exporters.packing import EncodingPlan
from mfcompile.exporters.weight_placement import MaskedWeight, Placement
from mfcompile.onnx_wire import field_bytes

ENCODING = "onnx-sparse"
INDEX_BYTES = 8
LARGEST_BYTES = 2**31 - 1
"""Protobuf reads no larger file."""

_GRAPH_SPARSE_INITIALIZER = 15
_SPARSE_VALUES, _SPARSE_INDICES, _SPARSE_DIMS = 1, 2, 3


class SparsePlan(EncodingPlan):
    """A weight as sparse initializer: ``entries`` values, each with an index."""

    @property
    def gap_bytes(self) -> int:
        """Bytes of the indices."""
        return INDEX_BYTES * self.entries

    @property
    def folded_bytes(self) -> int:
        """Bytes of the dense weight that onnxruntime makes of it."""
        return self.weight_count * self.dtype.itemsize


def place_sparse(model: ir.Model, weights: Sequence[MaskedWeight], values: str) -> tuple[dict[str, Placement], bytes]:
    """Take masked weights out of the initializers of a graph.

    Args:
        model: changed in place; what reads a weight still does so by its name.
        weights: the masked parameters.
        values: "fp32".

    Returns:
        FQN -> what was decided, and the fields of the weights, to be appended to the serialised graph.

    Raises:
        InputError: other values are asked for.
    """
    if values != "fp32":
        raise InputError(
            f"format='{ENCODING}' stores weights as they are, not as {values}: use values='fp32', or format='packed'"
        )
    placed: dict[str, Placement] = {}
    fields: list[bytes] = []
    for weight in weights:
        tensor = weight.tensor.numpy()
        places = np.flatnonzero(weight.mask())
        plan = SparsePlan(ENCODING, places.size, tensor.dtype, tensor.dtype, tensor.shape, places.size)
        placed[weight.fqn] = Placement(plan, None)
        kept = onnx.TensorProto(name=weight.fqn, data_type=int(weight.tensor.dtype), dims=[places.size])
        kept.raw_data = np.ascontiguousarray(tensor.reshape(-1)[places]).tobytes()
        indices = onnx.TensorProto(name=f"{weight.fqn}.indices", data_type=onnx.TensorProto.INT64, dims=[places.size])
        indices.raw_data = places.astype("<i8").tobytes()
        proto = onnx.SparseTensorProto(values=kept, indices=indices, dims=tensor.shape)
        fields.append(field_bytes(_GRAPH_SPARSE_INITIALIZER, proto.SerializeToString()))
        del model.graph.initializers[weight.fqn]
    return placed, b"".join(fields)


def check_size(layout: FileLayout, name: str) -> None:
    """Refuse a file that protobuf would not read again.

    Raises:
        InputError: says its size.
    """
    if layout.model_size_bytes > LARGEST_BYTES:
        raise InputError(
            f"{name} would take {layout.model_size_bytes:,} bytes as {ENCODING}, and sparse initializers must lie inside of "
            f"the .onnx file, which may hold 2 GB: write it packed or dense"
        )


def check_graph(layout: FileLayout, weights: Sequence[MaskedWeight]) -> None:
    """The full check of the graph with sparse weights as dense inputs; raises what onnx.checker raises.

    Args:
        layout: of the file without the fields of sparse weights.
        weights: the masked parameters.
    """
    model = onnx.ModelProto.FromString(layout.model_proto)
    model.graph.ParseFromString(layout.graph_proto)
    for stored in layout.tensors:
        model.graph.initializer.add().ParseFromString(stored.header)
        if stored.offset is None:
            model.graph.initializer[-1].raw_data = stored.tensor.tobytes()
    tensors = {item.name for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
    inputs = [(weight.fqn, int(weight.tensor.dtype), weight.tensor.shape.numpy()) for weight in weights]
    kept = [item for item in model.graph.initializer if item.name not in tensors]
    inputs += [(item.name, item.data_type, item.dims) for item in model.graph.initializer if item.name in tensors]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(helper.make_tensor_value_info(name, kind, list(shape)) for name, kind, shape in inputs)
    onnx.checker.check_model(model, full_check=True)
