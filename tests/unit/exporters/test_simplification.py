from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mfcompile.exporters.simplification import simplify


def model_of(weight: np.ndarray) -> ir.Model:
    """x times the transposed weight, by a chain that folds, with the input as an output as well."""
    x = ir.val("x", ir.DataType.FLOAT, ["n", 4])
    w = ir.val("layer.weight", const_value=ir.tensor(weight, name="layer.weight"))
    w.dtype, w.shape = ir.DataType.FLOAT, ir.Shape(weight.shape)
    unread = ir.val("layer.unread", const_value=ir.tensor(weight, name="layer.unread"))
    turned = ir.node("Transpose", [w], {"perm": [1, 0]}, name="t")
    two = ir.node("Constant", [], {"value_float": 2.0}, name="c")
    four = ir.node("Mul", [two.outputs[0], two.outputs[0]], name="four")
    product = ir.node("MatMul", [x, turned.outputs[0]], name="m")
    scaled = ir.node("Mul", [product.outputs[0], four.outputs[0]], name="s")
    scaled.outputs[0].dtype, scaled.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["n", weight.shape[0]])
    nodes = [turned, two, four, product, scaled]
    graph = ir.Graph([x], [scaled.outputs[0], x], nodes=nodes, initializers=[w, unread], opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10)


def test_constants_fold_and_parameters_keep_name_and_value() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    model = model_of(weight)
    value = model.graph.initializers["layer.weight"]
    simplify(model)
    assert model.graph.initializers["layer.weight"] is value
    assert value.const_value is not None
    assert value.const_value.numpy().tobytes() == weight.tobytes()
    operators = [node.op_type for node in model.graph]
    assert operators.count("Transpose") == 1
    assert operators.count("Mul") == 1
    assert "layer.unread" not in model.graph.initializers
    assert model.graph.inputs[0].name == "x"
    assert model.graph.outputs[1].name != "x" or model.graph.outputs[1] is model.graph.inputs[0]
