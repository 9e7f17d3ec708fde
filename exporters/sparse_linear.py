"""The operator SparseLinear: what a node of it holds, and the function that stands in for it in stock onnxruntime.

``Y = X W^T + bias`` with W (N, K) stored as gap8 or gap4 (``mfcompile.exporters.packing``). Where the library of
``mfcompile.runtime`` is registered, onnxruntime runs its kernels on the packed weight. Where it is not, onnxruntime puts the
body of the model-local function of the same name in place of the node, and folds the decode when it creates the session.

::

    gaps -> [gap4: halves] -> Cast -> CumSum --+
    values -> Cast ----------------------> ScatterElements -> Reshape -> Transpose --+
    zeros (length) ----------------------------+                        X -> MatMul -> Add (bias) -> Y
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mfcompile.errors import ExportError

DOMAIN = "mfcompile"
"""Domain of the operators."""

VERSION = 1
"""Version of the domain."""

OP_TYPES = {"gap8": "SparseLinear", "gap4": "SparseLinearGap4"}
"""Operator for each encoding; a function has one body, so each encoding has its own."""

INT32_PLACES = 2**31 - 1


def sparse_linear_node(
    encoding: str, inputs: Sequence[str], output: str, shape: tuple[int, int], name: str = ""
) -> onnx.NodeProto:
    """A node that multiplies by a packed weight.

    Args:
        encoding: "gap8" or "gap4".
        inputs: names of X (..., K) float32, gaps (bytes,) uint8, values (entries,) float32 or float16, and bias (N,)
            float32. Gaps and values must be initializers. The function needs a bias: give zeros where there is none.
        output: name of Y (..., N) float32.
        shape: (N, K) of the weight.
        name: name of the node.

    Raises:
        ExportError: the encoding has no operator, an input is missing, or the weight has 2^31 places or more.
    """
    if encoding not in OP_TYPES:
        raise ExportError(
            f"{name or output}: {encoding!r} has no sparse operator; encode the weight as {' or '.join(OP_TYPES)}"
        )
    if len(inputs) != 4 or not all(inputs):
        raise ExportError(
            f"{name or output}: a sparse linear node reads X, gaps, values and bias, and was given {list(inputs)}"
        )
    rows, columns = shape
    if rows * columns > INT32_PLACES:
        raise ExportError(f"{name or output}: a weight of shape {shape} has 2^31 places or more; leave it dense")
    return helper.make_node(
        OP_TYPES[encoding], list(inputs), [output], name=name, domain=DOMAIN, shape=[rows, columns], length=[rows * columns]
    )


def sparse_linear_function(encoding: str, opset: int) -> onnx.FunctionProto:
    """The model-local function of one encoding's operator.

    Args:
        encoding: "gap8" or "gap4".
        opset: version of the standard operators that the model imports, 17 or later.

    Raises:
        ExportError: the encoding has no operator.
    """
    if encoding not in OP_TYPES:
        raise ExportError(f"{encoding!r} has no sparse operator; there is one for {' and '.join(OP_TYPES)}")
    nodes = [
        _attribute_constant("shape"),
        _attribute_constant("length"),
        _constant("axis", np.array(0, np.int64)),
        *(_half_byte_nodes() if encoding == "gap4" else []),
        helper.make_node("Cast", ["steps" if encoding == "gap4" else "gaps"], ["distances"], to=onnx.TensorProto.INT32),
        helper.make_node("CumSum", ["distances", "axis"], ["positions"]),
        helper.make_node("Cast", ["values"], ["kept"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ConstantOfShape", ["length"], ["zeros"], value=numpy_helper.from_array(np.zeros(1, np.float32))),
        helper.make_node("ScatterElements", ["zeros", "positions", "kept"], ["flat"], axis=0),
        helper.make_node("Reshape", ["flat", "shape"], ["weight"]),
        helper.make_node("Transpose", ["weight"], ["weight_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["X", "weight_t"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["Y"]),
    ]
    return helper.make_function(
        DOMAIN, OP_TYPES[encoding], ["X", "gaps", "values", "bias"], ["Y"], nodes, [helper.make_opsetid("", opset)],
        attributes=["shape", "length"], doc_string=f"Y = X W^T + bias, W stored as {encoding}",
    )  # fmt: skip


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
