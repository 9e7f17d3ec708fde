"""ONNX models of one sparse linear layer, for tests of the runtime and of the operator's function."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mfcompile.exporters.packing import encode
from mfcompile.exporters.sparse_linear import DOMAIN, VERSION, sparse_linear_function, sparse_linear_node

Floats = NDArray[np.float32]
OPSET = 17


def random_weight(rng: np.random.Generator, rows: int, columns: int, density: float, block_rows: int = 1) -> Floats:
    """(rows, columns) with blocks of ``block_rows`` x 1 kept with that probability, zero elsewhere."""
    kept = rng.random((-(-rows // block_rows), columns)) < density
    mask = np.repeat(kept, block_rows, axis=0)[:rows]
    return np.where(mask, rng.standard_normal((rows, columns)), 0).astype(np.float32)


def sparse_model(
    weight: Floats,
    bias: Floats | None = None,
    *,
    encoding: str = "gap8",
    values: str = "fp32",
    with_function: bool = True,
    replaced: dict[str, NDArray[Any]] | None = None,
    attributes: dict[str, Any] | None = None,
    opset: int = OPSET,
    rank: int = 2,
    activation: str = "",
) -> onnx.ModelProto:
    """Y = activation(X W^T + bias), W packed; ``replaced`` overwrites stored tensors, ``attributes`` those of the node."""
    encoded = encode(weight, weight != 0, values, encoding=encoding)
    assert encoded.gaps is not None
    rows, columns = weight.shape
    tensors: dict[str, NDArray[Any]] = {
        "gaps": encoded.gaps, "values": encoded.values, "bias": np.zeros(rows, np.float32) if bias is None else bias,
        **(replaced or {}),
    }  # fmt: skip
    node = sparse_linear_node(
        encoding, ["X", *("gaps", "values", "bias")], "Y", (rows, columns), name="layer", activation=activation
    )
    for name, value in (attributes or {}).items():
        node.attribute.remove(next(item for item in node.attribute if item.name == name))
        node.attribute.append(helper.make_attribute(name, value))
    leading = [f"d{axis}" for axis in range(rank - 1)]
    graph = helper.make_graph(
        [node], "sparse", [helper.make_tensor_value_info("X", TensorProto.FLOAT, [*leading, columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [*leading, rows])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    functions = [sparse_linear_function(encoding, opset, activation=activation)] if with_function else []
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=8)


def session_of(
    model: onnx.ModelProto, library: str | None = None, threads: int = 1, profile: str | None = None
) -> onnxruntime.InferenceSession:
    """A session of the model, with the library registered or without."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, x: Floats) -> Floats:
    """The output for X."""
    output: Floats = session.run(None, {"X": x})[0]
    return output
