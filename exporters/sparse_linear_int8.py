"""The operator SparseLinearInt8: what a node of it holds, and the function that stands in for it in stock onnxruntime.

``Y = x_scale scale[n] (Xq - zero) Wq^T + bias`` with Wq (N, K) int8 stored as ``mfcompile.exporters.quantization`` says, and X
quantized on every run as DynamicQuantizeLinear of ONNX defines it, one scale for all of X. Where the library of
``mfcompile.runtime`` is registered, onnxruntime runs its kernels on the packed weight; elsewhere it folds the decode to a dense
int8 weight when it creates the session, and fuses the rest to its own DynamicQuantizeMatMul. Both compute the same integers.

::

    gaps -> [gap4: halves] -> Cast -> CumSum -> Cast -> Unsqueeze --+
    values (entries, block) --------------------------------> ScatterND -> Reshape (N, K) -> Transpose --+
    zeros (places, block) ------------------------------------------+                                    |
    X -> DynamicQuantizeLinear -> Xq, zero -------------------------------------------------> MatMulInteger -> Cast --+
                            +---> x_scale --> Mul (scales) ---------------------------------------------------------> Mul -> Add

**NaN and infinity.** One scale serves all of X, so an X that holds one has no quantization. The kernel makes every output NaN;
DynamicQuantizeLinear leaves the case open, and stock onnxruntime gives finite numbers for a NaN, and NaN or infinities for an
infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mfcompile.errors import ExportError
from mfcompile.exporters.quantization import GAP4, GAP8
from mfcompile.exporters.sparse_linear import DOMAIN, INT32_PLACES

OP_TYPES = {GAP8: "SparseLinearInt8", GAP4: "SparseLinearInt8Gap4"}
"""Operator for each encoding; a function has one body, so each encoding has its own."""

INPUTS = ("X", "gaps", "values", "scales", "bias")


def int8_attributes(shape: tuple[int, int], block: int) -> dict[str, list[int]]:
    """Attributes of a node for a weight of ``shape`` (N, K) that is stored in blocks of 1 or 4 inputs.

    Raises:
        ExportError: the weight has 2^31 places or more, or blocks do not fill its inputs.
    """
    rows, columns = shape
    if rows * columns > INT32_PLACES or columns % block:
        raise ExportError(f"a weight of shape {shape} is not stored in int8 blocks of {block}; leave it dense")
    return {"shape": [rows, columns], "places": [rows * columns // block, block]}


def int8_node(
    encoding: str, inputs: Sequence[str], output: str, shape: tuple[int, int], block: int, name: str = ""
) -> onnx.NodeProto:
    """A node that multiplies by a packed int8 weight.

    Args:
        encoding: "int8-gap8" or "int8-gap4".
        inputs: names of X (..., K) float32, gaps (bytes,) uint8, values (entries, block) int8, scales (N,) and bias (N,)
            float32. All but X and the bias must be initializers.
        output: name of Y (..., N) float32.
        shape: (N, K) of the weight.
        block: 1 or 4.
        name: name of the node.

    Raises:
        ExportError: the encoding has no operator, an input is missing, or the weight does not fit.
    """
    if encoding not in OP_TYPES or len(inputs) != len(INPUTS) or not all(inputs):
        raise ExportError(
            f"{name or output}: an int8 sparse linear node stores its weight as {' or '.join(OP_TYPES)} and reads "
            f"{', '.join(INPUTS)}; it was given {encoding!r} and {list(inputs)}"
        )
    node: onnx.NodeProto = helper.make_node(OP_TYPES[encoding], list(inputs), [output], name=name, domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in int8_attributes(shape, block).items())
    return node


def int8_function(encoding: str, opset: int) -> onnx.FunctionProto:
    """The model-local function of one encoding's operator.

    Args:
        encoding: "int8-gap8" or "int8-gap4".
        opset: version of the standard operators that the model imports, 13 or later.

    Raises:
        ExportError: the encoding has no operator.
    """
    if encoding not in OP_TYPES:
        raise ExportError(f"{encoding!r} has no int8 operator; there is one for {' and '.join(OP_TYPES)}")
    nodes = [
        _attribute_constant("shape"),
        _attribute_constant("places"),
        _constant("axis", np.array(0, np.int64)),
        _constant("last", np.array([1], np.int64)),
        *(_half_byte_nodes() if encoding == GAP4 else []),
        helper.make_node("Cast", ["steps" if encoding == GAP4 else "gaps"], ["distances"], to=onnx.TensorProto.INT32),
        helper.make_node("CumSum", ["distances", "axis"], ["summed"]),
        helper.make_node("Cast", ["summed"], ["positions"], to=onnx.TensorProto.INT64),
        helper.make_node("Unsqueeze", ["positions", "last"], ["indices"]),
        helper.make_node("ConstantOfShape", ["places"], ["zeros"], value=numpy_helper.from_array(np.zeros(1, np.int8))),
        helper.make_node("ScatterND", ["zeros", "indices", "values"], ["blocks"]),
        helper.make_node("Reshape", ["blocks", "shape"], ["weight"]),
        helper.make_node("Transpose", ["weight"], ["weight_t"], perm=[1, 0]),
        *dense_int8_nodes("X", "weight_t", "scales", "bias", "Y"),
    ]
    return helper.make_function(
        DOMAIN, OP_TYPES[encoding], list(INPUTS), ["Y"], nodes, [helper.make_opsetid("", opset)],
        attributes=["shape", "places"], doc_string=f"Y = X W^T + bias, W int8 stored as {encoding}, X quantized as it comes",
    )  # fmt: skip


def dense_int8_nodes(x: str, weight_t: str, scales: str, bias: str, output: str) -> list[onnx.NodeProto]:
    """Y = X W^T + bias for W^T (K, N) int8, in the form that onnxruntime fuses to one DynamicQuantizeMatMul."""
    return [
        helper.make_node("DynamicQuantizeLinear", [x], ["x_quantized", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["x_quantized", weight_t, "x_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", scales], ["factors"]),
        helper.make_node("Mul", ["wide", "factors"], ["product"]),
        helper.make_node("Add", ["product", bias], [output]),
    ]


def _half_byte_nodes() -> list[onnx.NodeProto]:
    """Every byte gives two distances, the high half first."""
    byte = np.arange(256, dtype=np.uint8)
    return [
        _constant("table", np.stack([byte >> 4, byte & 15], axis=1)),
        _constant("all", np.array([-1], np.int64)),
        helper.make_node("Cast", ["gaps"], ["codes"], to=onnx.TensorProto.INT32),
        helper.make_node("Gather", ["table", "codes"], ["halves"], axis=0),
        helper.make_node("Reshape", ["halves", "all"], ["steps"]),
    ]


def _constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def _attribute_constant(name: str) -> onnx.NodeProto:
    """A constant whose value is the attribute of that name of the node."""
    node = helper.make_node("Constant", [], [name])
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "value_ints", name, onnx.AttributeProto.INTS
    return node
