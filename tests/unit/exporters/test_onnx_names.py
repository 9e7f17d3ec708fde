from __future__ import annotations

import onnx_ir as ir
import pytest

from mfcompile.errors import ExportError
from mfcompile.exporters.onnx_names import name_interface


def model_of(shape_a: list[int | str], shape_b: list[int | str]) -> ir.Model:
    """Inputs a and b, a node "logits" that reads a, and outputs of both."""
    a, b = ir.val("a", ir.DataType.FLOAT, shape_a), ir.val("b", ir.DataType.FLOAT, shape_b)
    inner = ir.val("logits", ir.DataType.FLOAT, shape_a)
    first, second = ir.val("y0", ir.DataType.FLOAT, ["4*s1", *shape_a[1:]]), ir.val("y1", ir.DataType.FLOAT, shape_b)
    nodes = [
        ir.node("Relu", [a], outputs=[inner]),
        ir.node("Tile", [inner, b], outputs=[first]),
        ir.node("Relu", [b], outputs=[second]),
    ]
    return ir.Model(ir.Graph([a, b], [first, second], nodes=nodes, opset_imports={"": 18}), ir_version=10)


def shapes(model: ir.Model) -> dict[str, str]:
    return {str(value.name): str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}


def test_names_are_given_and_taken_from_what_is_inside() -> None:
    model = model_of(["s1", 3], ["s2", 3])
    interface = name_interface(model, {"a": "image", "b": "ids"}, ("logits", "other"), {})
    assert interface.input_names == ("image", "ids")
    assert interface.output_names == ("logits", "other")
    names = [str(output.name) for node in model.graph for output in node.outputs]
    assert names == ["logits_inner", "logits", "other"]


def test_names_may_be_swapped() -> None:
    interface = name_interface(model_of(["s1"], ["s2"]), {"a": "b", "b": "a"}, ("y1", "y0"), {})
    assert interface.input_names == ("b", "a")
    assert interface.output_names == ("y1", "y0")


def test_axes_are_named_everywhere_and_expressions_keep_their_form() -> None:
    model = model_of(["s1", "s12"], ["s1", "u0"])
    axes = {"image": {0: "batch", 1: "sequence"}, "ids": {0: "batch"}}
    interface = name_interface(model, {"a": "image", "b": "ids"}, ("y", "z"), axes)
    assert shapes(model) == {
        "image": "[batch,sequence]",
        "ids": "[batch,u0]",
        "y": "[4*batch,sequence]",
        "z": "[batch,u0]",
    }
    assert interface.dynamic_axes == {"image": {0: "batch", 1: "sequence"}, "ids": {0: "batch", 1: "u0"}}


def test_different_symbols_never_share_a_name() -> None:
    model = model_of(["s1", 3], ["s2", 3])
    interface = name_interface(model, {"a": "image", "b": "ids"}, ("y", "z"), {"image": {0: "batch"}, "ids": {0: "batch"}})
    assert interface.dynamic_axes == {"image": {0: "batch"}, "ids": {0: "batch_2"}}
    assert shapes(model)["z"] == "[batch_2,3]"


def test_a_dimension_that_is_fixed_in_the_file_is_noted() -> None:
    interface = name_interface(model_of([2, 3], ["s1"]), {"a": "image", "b": "ids"}, ("y", "z"), {"image": {0: "batch"}})
    assert "dimension 0 (batch) of input image is fixed to 2 in the file" in interface.notes
    assert interface.dynamic_axes == {"ids": {0: "s1"}}


def test_a_symbol_that_is_a_number_is_a_fixed_dimension() -> None:
    model = model_of(["2", 3], ["s1", "16"])
    interface = name_interface(model, {"a": "image", "b": "ids"}, ("y", "z"), {"image": {0: "batch"}, "ids": {0: "batch"}})
    assert interface.dynamic_axes == {"ids": {0: "batch"}}
    assert list(model.graph.inputs[0].shape or ()) == [2, 3]
    assert list(model.graph.outputs[1].shape or ())[1] == 16
    assert interface.notes == ("dimension 0 (batch) of input image is fixed to 2 in the file",)


def test_dropped_and_unused_inputs_are_noted() -> None:
    model = model_of(["s1"], ["s2"])
    model.graph.inputs.append(ir.val("c", ir.DataType.FLOAT, [1]))
    interface = name_interface(model, {"a": "image", "b": "ids", "c": "spare", "d": "gone"}, ("y", "z"), {})
    assert interface.notes == (
        "input gone is not in the file: the graph does not use it",
        "input spare is not used by the graph",
    )


def test_an_output_that_is_an_input_gets_a_name_of_its_own() -> None:
    model = model_of(["s1"], ["s2"])
    model.graph.outputs[1] = model.graph.inputs[0]
    interface = name_interface(model, {"a": "image", "b": "ids"}, ("y", "image"), {})
    assert interface.output_names == ("y", "image_out")
    assert model.graph.outputs[1].producer() is not None
    assert interface.notes[0] == "output image is called image_out in the file: an input or another output has its name"


def test_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(ExportError, match=r"has 2 outputs, but the captured model names 1 \(y\)"):
        name_interface(model_of(["s1"], ["s2"]), {}, ("y",), {})
