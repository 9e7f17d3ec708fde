"""Which submodule a node of a file came from."""

from __future__ import annotations

import onnx

from mfcompile.frontends.onnx_scopes import NO_PATHS, find_scopes
from tests.onnx_models import two_towers, without_names


def paths_by_weight(model: onnx.ModelProto) -> dict[str, str]:
    scopes = find_scopes(model)
    found = {}
    for node, path in zip(model.graph.node, scopes.paths, strict=True):
        if node.op_type == "MatMul" and "weight" in node.input[1]:
            found[node.input[1]] = path[-1] if path else ""
    return found


def test_names_of_initializers_tell() -> None:
    model = two_towers()
    scopes = find_scopes(model)
    assert scopes.source.endswith("names of initializers")
    assert paths_by_weight(model)["text.layers.1.cross.q.weight"] == "text.layers.1.cross.q"
    softmax = [path for node, path in zip(model.graph.node, scopes.paths, strict=True) if node.op_type == "Softmax"]
    assert [path[-1] for path in softmax] == [
        "vision.layers.0.attention",
        "vision.layers.1.attention",
        "text.layers.0.attention",
        "text.layers.0.cross",
        "text.layers.1.attention",
        "text.layers.1.cross",
    ]
    assert softmax[0] == ("vision", "vision.layers.0", "vision.layers.0.attention")


def test_names_of_nodes_come_before_those_of_initializers() -> None:
    model = two_towers()
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.name = f"/m/block.{len(node.input[1]) % 3}/linear/MatMul"
    scopes = find_scopes(model)
    assert scopes.source.endswith("names of nodes")
    assert set(paths_by_weight(model).values()) <= {f"m.block.{number}.linear" for number in range(3)}


def test_metadata_comes_first_and_gives_classes() -> None:
    model = two_towers()
    for index, node in enumerate(model.graph.node):
        node.name = "/wrong/way/X"
        number = int(index > 9)
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'enc', 'enc.layers.{number}', 'linear_3']")
        node.metadata_props.add(
            key="pkg.torch.onnx.class_hierarchy", value="['a.Model', 'a.Encoder', 'a.Layer', 'aten.linear']"
        )
    scopes = find_scopes(model)
    assert set(scopes.paths) == {("enc", "enc.layers.0"), ("enc", "enc.layers.1")}
    kinds = {path: kind.__name__ for path, kind in scopes.modules.items()}
    assert kinds == {"enc": "Encoder", "enc.layers.0": "Layer", "enc.layers.1": "Layer"}
    assert scopes.modules["enc.layers.0"] is scopes.modules["enc.layers.1"]


def test_damaged_metadata_is_no_sign() -> None:
    model = two_towers()
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', __import__('os')]")
    assert find_scopes(model).source.endswith("names of initializers")


def test_no_names_no_paths() -> None:
    scopes = find_scopes(without_names(two_towers())[0])
    assert scopes.source == NO_PATHS
    assert set(scopes.paths) == {()}
