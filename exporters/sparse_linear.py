"""The operator SparseLinear: what a node of it holds, and the function that stands in for it in stock onnxruntime.

``Y = X W^T + bias`` with W (N, K) stored as gap8, gap4 or mask (``mfcompile.exporters.packing``). Where the library of
``mfcompile.runtime`` is registered, onnxruntime runs its kernels on the packed weight. Where it is not, onnxruntime puts the
body of the model-local function of the same name in place of the node, and folds the decode when it creates the session.

::

    gaps -> [gap4: halves] -> Cast -> CumSum --+
    values -> Cast ----------------------> ScatterElements -> Reshape -> Transpose --+
    zeros (length) ----------------------------+                        X -> MatMul -> Add (bias) -> Y

SparseLinearMask reads X, mask, values and bias. mask: (ceil(N K / 8),) uint8, bit i (1 << i) of byte j says whether place
8 j + i of W, in row-major order, is kept; bits behind the last place are 0. values: (kept + 1,) float32 or float16, the kept
weights in row-major order and one +0.0 behind them, which the function's body gathers for every pruned place. N K must be a
multiple of 8.

::

    mask -> Cast -> Gather (kept in a byte) -> CumSum (kept before a byte) -> Reshape -+
              +---> Gather (rank in its byte of each place, -2^31 where pruned) -> Add -> Max (-1) --+
    values -> Cast ----------------------------------------------------------------> Gather -> Reshape -> Transpose -> ...

A function has one body and no optional inputs, so every encoding has an operator with a bias and one without.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mfcompile.errors import ExportError
from mfcompile.exporters.stored_weights import DOMAIN as DOMAIN

VERSION = 1
"""Version of the domain."""

OP_TYPES = {"gap8": "SparseLinear", "gap4": "SparseLinearGap4", "mask": "SparseLinearMask"}
"""Operator for each encoding, of layers with a bias."""

ACTIVATIONS = {"": "", "relu": "Relu", "gelu": "Gelu", "gelu_tanh": "GeluTanh", "quick_gelu": "QuickGelu", "silu": "Silu"}
"""What may follow a layer inside its operator, and how the operator's name says so.

gelu: x (1 + erf(x / sqrt 2)) / 2; gelu_tanh: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; quick_gelu:
x sigmoid(1.702 x); silu: x sigmoid(x).
"""

INT32_PLACES = 2**31 - 1


def operator_type(encoding: str, *, has_bias: bool, activation: str = "") -> str:
    """The operator that multiplies by a weight of this encoding, and applies one of ``ACTIVATIONS`` to the sums.

    Raises:
        ExportError: the encoding or the activation has none.
    """
    if activation not in ACTIVATIONS:
        raise ExportError(
            f"{activation!r} is no activation of a sparse operator; there are {', '.join(filter(None, ACTIVATIONS))}"
        )
    if encoding not in OP_TYPES:
        raise ExportError(f"{encoding!r} has no sparse operator; there is one for {' and '.join(OP_TYPES)}")
    return f"{OP_TYPES[encoding]}{ACTIVATIONS[activation]}{'' if has_bias else 'NoBias'}"


def sparse_linear_node(
    encoding: str, inputs: Sequence[str], output: str, shape: tuple[int, int], name: str = "", *, activation: str = ""
) -> onnx.NodeProto:
    """A node that multiplies by a packed weight.

    Args:
        encoding: "gap8", "gap4" or "mask".
        inputs: names of X (..., K) float32, gaps or mask (bytes,) uint8, values (entries,) float32 or float16, and, where the
            layer has one, bias (N,) float32. Gaps and values must be initializers.
        output: name of Y (..., N) float32.
        shape: (N, K) of the weight.
        name: name of the node.
        activation: one of ``ACTIVATIONS``, applied to Y.

    Raises:
        ExportError: the encoding has no operator, an input is missing, the weight has 2^31 places or more, or those of a mask
            do not fill whole bytes.
    """
    if encoding not in OP_TYPES:
        raise ExportError(
            f"{name or output}: {encoding!r} has no sparse operator; encode the weight as {' or '.join(OP_TYPES)}"
        )
    if len(inputs) not in (3, 4) or not all(inputs):
        raise ExportError(
            f"{name or output}: a sparse linear node reads X, gaps, values and perhaps a bias, and was given {list(inputs)}"
        )
    rows, columns = shape
    if rows * columns > INT32_PLACES:
        raise ExportError(f"{name or output}: a weight of shape {shape} has 2^31 places or more; leave it dense")
    if encoding == "mask" and rows * columns % 8:
        raise ExportError(f"{name or output}: the {rows * columns} places of a mask do not fill whole bytes; encode it as gap8")
    op_type = operator_type(encoding, has_bias=len(inputs) == 4, activation=activation)
    return helper.make_node(
        op_type, list(inputs), [output], name=name, domain=DOMAIN, shape=[rows, columns], length=[rows * columns]
    )


def sparse_linear_function(encoding: str, opset: int, *, has_bias: bool = True, activation: str = "") -> onnx.FunctionProto:
    """The model-local function of one encoding's operator.

    Args:
        encoding: "gap8", "gap4" or "mask".
        opset: version of the standard operators that the model imports, 13 or later.
        has_bias: the operator with a bias, or the one without.
        activation: one of ``ACTIVATIONS``.

    Raises:
        ExportError: the encoding or the activation has no operator.
    """
    op_type = operator_type(encoding, has_bias=has_bias, activation=activation)
    result = "sums" if activation else "Y"
    nodes = [
        _attribute_constant("shape"),
        _attribute_constant("length"),
        _constant("axis", np.array(0, np.int64)),
        helper.make_node("Cast", ["values"], ["kept"], to=onnx.TensorProto.FLOAT),
        *(_mask_nodes() if encoding == "mask" else _gap_nodes(encoding)),
        helper.make_node("Reshape", ["flat", "shape"], ["weight"]),
        helper.make_node("Transpose", ["weight"], ["weight_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["X", "weight_t"], ["product" if has_bias else result]),
        *([helper.make_node("Add", ["product", "bias"], [result])] if has_bias else []),
        *_activation_nodes(activation),
    ]
    inputs = ["X", "mask" if encoding == "mask" else "gaps", "values", *(["bias"] if has_bias else [])]
    return helper.make_function(
        DOMAIN, op_type, inputs, ["Y"], nodes, [helper.make_opsetid("", opset)], attributes=["shape", "length"],
        doc_string=f"Y = {activation or 'identity'}(X W^T{' + bias' if has_bias else ''}), W stored as {encoding}",
    )  # fmt: skip


def _activation_nodes(activation: str) -> list[onnx.NodeProto]:
    """From sums to Y, in the operators of opset 13, which onnxruntime fuses."""
    node = helper.make_node
    if activation == "relu":
        return [node("Relu", ["sums"], ["Y"])]
    if activation == "gelu":
        return [
            _number("root", 2**0.5), _number("one", 1), _number("half", 0.5),
            node("Div", ["sums", "root"], ["scaled"]), node("Erf", ["scaled"], ["erf"]), node("Add", ["erf", "one"], ["gate"]),
            node("Mul", ["sums", "gate"], ["gated"]), node("Mul", ["gated", "half"], ["Y"]),
        ]  # fmt: skip
    if activation in ("gelu_tanh", "quick_gelu", "silu"):  # (1 + tanh u) / 2 = sigmoid(2 u)
        slopes = {
            "silu": [], "quick_gelu": [_number("slope", 1.702), node("Mul", ["sums", "slope"], ["scaled"])],
            "gelu_tanh": [
                _number("cubic", 2 * (2 / np.pi) ** 0.5 * 0.044715), _number("linear", 2 * (2 / np.pi) ** 0.5),
                node("Mul", ["sums", "sums"], ["squares"]), node("Mul", ["squares", "cubic"], ["curve"]),
                node("Add", ["curve", "linear"], ["slope"]), node("Mul", ["sums", "slope"], ["scaled"]),
            ],
        }[activation]  # fmt: skip
        inner = "sums" if activation == "silu" else "scaled"
        return [*slopes, node("Sigmoid", [inner], ["gate"]), node("Mul", ["sums", "gate"], ["Y"])]
    return []


def _gap_nodes(encoding: str) -> list[onnx.NodeProto]:
    """From gaps and kept to flat."""
    return [
        *(_half_byte_nodes() if encoding == "gap4" else []),
        helper.make_node("Cast", ["steps" if encoding == "gap4" else "gaps"], ["distances"], to=onnx.TensorProto.INT32),
        helper.make_node("CumSum", ["distances", "axis"], ["positions"]),
        helper.make_node("ConstantOfShape", ["length"], ["zeros"], value=numpy_helper.from_array(np.zeros(1, np.float32))),
        helper.make_node("ScatterElements", ["zeros", "positions", "kept"], ["flat"], axis=0),
    ]


def _mask_nodes() -> list[onnx.NodeProto]:
    """From mask and kept to flat, (bytes, 8)."""
    return [
        _constant("counts_table", kept_in_byte()),
        _constant("ranks_table", ranks_in_byte()),
        _constant("column", np.array([-1, 1], np.int64)),
        _constant("last", np.array(-1, np.int32)),
        helper.make_node("Cast", ["mask"], ["codes"], to=onnx.TensorProto.INT32),
        helper.make_node("Gather", ["counts_table", "codes"], ["counts"]),
        helper.make_node("CumSum", ["counts", "axis"], ["before"], exclusive=1),
        helper.make_node("Reshape", ["before", "column"], ["before_column"]),
        helper.make_node("Gather", ["ranks_table", "codes"], ["ranks"]),
        helper.make_node("Add", ["ranks", "before_column"], ["ordinals"]),
        helper.make_node("Max", ["ordinals", "last"], ["places"]),
        helper.make_node("Gather", ["kept", "places"], ["flat"]),
    ]


def kept_in_byte() -> NDArray[np.int32]:
    """(256,) how many bits of every byte are 1."""
    counts: NDArray[np.int32] = _bits().sum(axis=1, dtype=np.int32)
    return counts


def ranks_in_byte() -> NDArray[np.int32]:
    """(256, 8) how many bits of a byte are 1 below each that is 1; -2^31 for those that are 0."""
    bits = _bits()
    ranks: NDArray[np.int32] = np.where(bits == 1, np.cumsum(bits, axis=1) - 1, -(1 << 31)).astype(np.int32)
    return ranks


def _bits() -> NDArray[np.int32]:
    """(256, 8) the bits of every byte, the lowest first."""
    return (np.arange(256, dtype=np.int32)[:, None] >> np.arange(8, dtype=np.int32)) & 1


def _half_byte_nodes() -> list[onnx.NodeProto]:
    """Every byte gives two distances, the high half first.

    With scalars instead of a table: onnxruntime tells that two bodies have equal scalars (int32, not uint8), and so decodes a
    weight that several nodes read only once.
    """
    return [
        _constant("column", np.array([-1, 1], np.int64)),
        _constant("all", np.array([-1], np.int64)),
        _constant("four", np.array(4, np.int32)),
        _constant("sixteen", np.array(16, np.int32)),
        helper.make_node("Cast", ["four"], ["bits"], to=onnx.TensorProto.UINT8),
        helper.make_node("Cast", ["sixteen"], ["base"], to=onnx.TensorProto.UINT8),
        helper.make_node("Reshape", ["gaps", "column"], ["codes"]),
        helper.make_node("BitShift", ["codes", "bits"], ["high"], direction="RIGHT"),
        helper.make_node("Mod", ["codes", "base"], ["low"]),
        helper.make_node("Concat", ["high", "low"], ["halves"], axis=1),
        helper.make_node("Reshape", ["halves", "all"], ["steps"]),
    ]


def _constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def _number(name: str, value: float) -> onnx.NodeProto:
    return _constant(name, np.array(value, np.float32))


def _attribute_constant(name: str) -> onnx.NodeProto:
    """A constant whose value is the attribute of that name of the node."""
    node = helper.make_node("Constant", [], [name])
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "value_ints", name, onnx.AttributeProto.INTS
    return node
