"""ONNX models of one sparse int8 layer, and the layer in NumPy from the equations of the operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mfcompile.exporters.quantization import BLOCKS, GAP4, GAP8, encode_int8, plan_int8
from mfcompile.exporters.sparse_linear import DOMAIN, VERSION
from mfcompile.exporters.sparse_linear_int8 import int8_function, int8_node
from tests.sparse_models import OPSET, Floats

Ints = NDArray[np.int8]


def random_int8(rng: np.random.Generator, rows: int, columns: int, density: float, block: int = 1) -> Ints:
    """(rows, columns) with blocks of 1 x ``block`` kept with that probability, zero elsewhere."""
    kept = np.repeat(rng.random((rows, -(-columns // block))) < density, block, axis=1)[:, :columns]
    return np.where(kept, rng.integers(-127, 128, (rows, columns)), 0).astype(np.int8)


def quantized(x: Floats) -> tuple[NDArray[np.int64], np.float32, int]:
    """uint8 of X, scale and zero point, by the definition of DynamicQuantizeLinear, in float32 as it is computed."""
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32((high - low) / np.float32(255)) or np.float32(1)
    zero = int(np.rint(np.clip(-low / scale, 0, 255)))
    return np.clip(np.rint(x / scale).astype(np.int64) + zero, 0, 255), scale, zero


def expected_int8(x: Floats, weight: Ints, scales: Floats, bias: Floats) -> Floats:
    """Y (tokens, N): exact integer sums, then float32 operations one after the other."""
    values, scale, zero = quantized(x)
    sums = (values - zero) @ weight.T.astype(np.int64)
    assert np.abs(sums).max(initial=0) < 2**31
    with np.errstate(over="ignore"):
        result: Floats = sums.astype(np.int32).astype(np.float32) * (scale * scales) + bias
    return result


def int8_model(
    weight: Ints,
    scales: Floats,
    bias: Floats,
    *,
    encoding: str | None = None,
    block: int | None = None,
    with_function: bool = True,
    replaced: dict[str, NDArray[Any]] | None = None,
    attributes: dict[str, Any] | None = None,
    rank: int = 2,
) -> onnx.ModelProto:
    """One packed layer; ``replaced`` overwrites stored tensors, ``attributes`` those of the node."""
    mask = weight != 0
    plan = plan_int8(
        mask, encodings=(GAP8, GAP4) if encoding is None else (encoding,), blocks=BLOCKS if block is None else (block,)
    )
    encoded = encode_int8(weight, mask, plan)
    rows, columns = weight.shape
    tensors: dict[str, NDArray[Any]] = {
        "gaps": encoded.gaps, "values": encoded.values, "scales": scales, "bias": bias, **(replaced or {}),
    }  # fmt: skip
    inputs = ["X", "gaps", "values", "scales", "bias"]
    node = int8_node(plan.encoding, inputs, "Y", (rows, columns), plan.block, name="layer")
    for name, value in (attributes or {}).items():
        node.attribute.remove(next(item for item in node.attribute if item.name == name))
        node.attribute.append(helper.make_attribute(name, value))
    leading = [f"d{axis}" for axis in range(rank - 1)]
    graph = helper.make_graph(
        [node], "sparse", [helper.make_tensor_value_info("X", TensorProto.FLOAT, [*leading, columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [*leading, rows])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    functions = [int8_function(plan.encoding, OPSET)] if with_function else []
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=8)
