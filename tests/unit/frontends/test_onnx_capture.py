"""ONNX files as captured graphs: which weights are found, how they lie, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import mfcompile
from mfcompile.errors import CaptureError, InputError
from mfcompile.region import RegionMap
from tests.onnx_models import GraphWriter, save, two_towers, two_towers_inputs, without_names


def regions_of(model: onnx.ModelProto, folder: Path, inputs: Any, **options: Any) -> RegionMap:
    captured = mfcompile.capture(save(model, folder / "model.onnx"), inputs)
    return mfcompile.infer_regions(captured, **options)


def fates(regions: RegionMap) -> dict[str, tuple[str, str | None]]:
    return {site.name: (site.region, site.skipped) for site in regions.sites}


def test_regions_of_two_towers(tmp_path: Path) -> None:
    regions = regions_of(two_towers(), tmp_path, two_towers_inputs())
    found = {name: region for name, (region, reason) in fates(regions).items() if reason is None}
    assert set(found.values()) == {"vision", "fusion"}
    assert all(
        (name.startswith("vision.layers") if region == "vision" else name.startswith("text.layers"))
        for name, region in found.items()
    )
    assert len(found) == 2 * 6 + 2 * 10
    assert fates(regions)["head.weight"] == ("fusion", "outside any repeated block (a head or a projector)")
    assert all(site.is_transposed for site in regions.pruned_sites)


def test_text_stays_text_without_cross_attention(tmp_path: Path) -> None:
    regions = regions_of(two_towers(fused=False), tmp_path, two_towers_inputs())
    assert {site.name.partition(".")[0]: site.region for site in regions.pruned_sites} == {"vision": "vision", "text": "text"}


@pytest.mark.parametrize("fused", [True, False])
def test_a_file_without_names_has_the_same_regions(tmp_path: Path, fused: bool) -> None:
    model = two_towers(fused=fused)
    expected = fates(regions_of(model, tmp_path, two_towers_inputs()))
    renamed, names = without_names(model)
    inputs = {names[name]: tensor for name, tensor in two_towers_inputs().items()}
    regions = regions_of(renamed, tmp_path, inputs)
    assert fates(regions) == {names[name]: fate for name, fate in expected.items()}
    assert [item.subject for item in regions.diagnostics] == ["layers"]


def linear_file(op_type: str, *operands: str, shape: tuple[int, int] = (5, 4), **attributes: Any) -> onnx.ModelProto:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    writer.weight("w", *shape)
    writer.op(op_type, *operands, out="y", **attributes)
    return writer.model("y")


@pytest.mark.parametrize(
    ("model", "is_transposed", "features"),
    [
        (linear_file("Gemm", "x", "w", transB=1), False, (-1,)),
        (linear_file("Gemm", "x", "w", shape=(4, 5)), True, (-1,)),
        (linear_file("MatMul", "x", "w", shape=(4, 5)), True, (-1,)),
        (linear_file("Gemm", "w", "x", transB=1), False, (-2,)),
        (linear_file("Einsum", "x", "w", equation="bi,oi->bo"), False, (-1,)),
        (linear_file("FusedMatMul", "x", "w", transB=1, domain="com.microsoft"), False, (-1,)),
    ],
    ids=["gemm", "gemm (in, out)", "matmul", "weight on the left", "einsum", "fused matmul"],
)
def test_ways_to_multiply(model: onnx.ModelProto, is_transposed: bool, features: tuple[int, ...], tmp_path: Path) -> None:
    inputs = {"x": torch.randn(3, 4)}
    path = save(model, tmp_path / "model.onnx")
    captured = mfcompile.capture(path, inputs)
    regions = mfcompile.infer_regions(captured, modalities={"x": "vision"}, targets=["w"])
    (use,) = regions.evidence["w"]
    assert (use.layout.is_transposed, use.rows) == (is_transposed, (0, 5))
    statistics = mfcompile.calibrate(captured, [inputs], regions=regions)
    assert torch.allclose(statistics.sites["w"].sum_of_squares, inputs["x"].double().square().sum(0), rtol=1e-6)
    assert statistics.sites["w"].token_count == 3
    assert statistics.observed_by == "onnxruntime"
    del features


def test_matmul_with_the_weight_on_the_left(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4, "places")
    writer.op("MatMul", writer.weight("w", 5, 4), "x", out="y")
    inputs = {"x": torch.randn(2, 4, 7)}
    captured = mfcompile.capture(save(writer.model("y", rank=3), tmp_path / "m.onnx"), inputs)
    regions = mfcompile.infer_regions(captured, modalities={"x": "vision"}, targets=["w"])
    (use,) = regions.evidence["w"]
    assert use.reading.features == (-2,)
    seen = mfcompile.calibrate(captured, [inputs], regions=regions).sites["w"]
    assert torch.allclose(seen.sum_of_squares, inputs["x"].double().square().sum((0, 2)), rtol=1e-6)
    assert (seen.token_count, seen.sample_count) == (14, 2)


def test_views_of_weights_are_followed(tmp_path: Path) -> None:
    """One fused matrix, transposed, cast and cut in three, of which two parts read one input."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    turned = writer.op("Cast", writer.op("Transpose", writer.weight("qkv", 9, 4), perm=[1, 0]), to=TensorProto.FLOAT)
    writer.nodes.append(helper.make_node("Split", [turned, writer.store("sizes", np.array([3, 6]))], ["q", "kv"], axis=1))
    writer.op("MatMul", "x", "q", out="y")
    writer.op("MatMul", writer.op("Relu", "x"), "kv", out="z")
    regions = regions_of(
        writer.model("y", "z"), tmp_path, {"x": torch.randn(3, 4)}, modalities={"x": "vision"}, targets=["qkv"]
    )
    assert [(site.name, site.skipped) for site in regions.sites] == [("qkv[0:3]", None), ("qkv[3:9]", None)]


def test_a_tied_table_stays_dense(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("input_ids", TensorProto.INT64, "batch", "length")
    words = writer.op("Gather", writer.weight("table", 30, 4), "input_ids")
    writer.op("MatMul", words, writer.op("Transpose", "table", perm=[1, 0]), out="y")
    regions = regions_of(writer.model("y", rank=3), tmp_path, {"input_ids": torch.randint(5, 30, (2, 6))})
    assert "tied to an embedding table" in str(fates(regions)["table"][1])


def test_one_weight_in_two_places_is_one_site(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    writer.weight("w", 4, 4)
    writer.op("MatMul", writer.op("Relu", writer.op("MatMul", "x", "w")), "w", out="y")
    regions = regions_of(writer.model("y"), tmp_path, {"x": torch.randn(3, 4)}, modalities={"x": "vision"}, targets=["w"])
    assert [site.name for site in regions.pruned_sites] == ["w"]
    assert len(regions.evidence["w"]) == 2


def test_a_convolution_of_single_places_is_skipped_with_its_reason(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("pixel_values", TensorProto.FLOAT, "batch", 3, 8, 8)
    writer.op("Conv", "pixel_values", writer.weight("mix", 5, 3, 1, 1), out="y")
    regions = regions_of(writer.model("y", rank=4), tmp_path, {"pixel_values": torch.rand(2, 3, 8, 8)})
    assert "only where targets names it" in str(fates(regions)["mix"][1])


def branching(*, inside: bool) -> onnx.ModelProto:
    """A weight that the body of an If multiplies by, and perhaps the graph around it."""
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    writer.input("flag", TensorProto.BOOL)
    writer.weight("w", 4, 4)
    value = "x" if inside else writer.op("MatMul", "x", "w")
    bodies = {
        key: helper.make_graph(
            [helper.make_node(op_type, [value, "w"], [key])],
            key,
            [],
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, [None, None])],
        )
        for key, op_type in (("then_branch", "MatMul"), ("else_branch", "Add"))
    }
    writer.op("If", "flag", out="y", **bodies)
    return writer.model("y")


@pytest.mark.parametrize("inside", [True, False])
def test_weights_that_a_body_reads_stay_dense(tmp_path: Path, inside: bool) -> None:
    inputs = {"x": torch.randn(4, 4), "flag": torch.tensor(True)}
    captured = mfcompile.capture(save(branching(inside=inside), tmp_path / "m.onnx"), inputs)
    assert "bodies (If, Loop, Scan) are read as one operator" in captured.attempts[0].detail
    regions = mfcompile.infer_regions(captured, modalities={"x": "vision"})
    assert not regions.pruned_sites
    if not inside:
        assert "if reads it as well" in str(fates(regions)["w"][1])
    assert captured.graph.find_nodes(op="output")[0].all_input_nodes[0].name == "y"


def test_constants_in_nodes_are_weights(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    writer.op("Constant", out="w", value=onnx.numpy_helper.from_array(weight))
    writer.op("MatMul", "x", "w", out="y")
    regions = regions_of(writer.model("y"), tmp_path, {"x": torch.randn(3, 4)}, modalities={"x": "vision"}, targets=["w"])
    assert [site.name for site in regions.pruned_sites] == ["w"]


def test_local_functions_are_followed(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    writer.op("Layer", "x", writer.weight("w", 4, 6), out="y", domain="own")
    model = writer.model("y")
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    model.functions.append(helper.make_function("own", "Layer", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    regions = regions_of(model, tmp_path, {"x": torch.randn(3, 4)}, modalities={"x": "vision"}, targets=["w"])
    assert [site.name for site in regions.pruned_sites] == ["w"]


def test_attention_with_its_projections_in_one_operator(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 5, 8)
    writer.weight("qkv", 8, 24)
    writer.weight("bias", 24)
    writer.op("Attention", "x", "qkv", "bias", out="y", domain="com.microsoft", num_heads=2)
    inputs = {"x": torch.randn(2, 5, 8)}
    captured = mfcompile.capture(save(writer.model("y", rank=3), tmp_path / "m.onnx"), inputs)
    regions = mfcompile.infer_regions(captured, modalities={"x": "text"}, targets=["qkv"])
    seen = mfcompile.calibrate(captured, [inputs], regions=regions).sites["qkv"]
    assert torch.allclose(seen.sum_of_squares, inputs["x"].double().square().sum((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("name", ["onnx::MatMul_12", "/vision/q", "a..b", "forward", "x.forward.y", "12", "w.T"])
def test_any_name_will_do(tmp_path: Path, name: str) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    writer.op("MatMul", "x", writer.weight(name, 4, 6), out="y")
    captured = mfcompile.capture(save(writer.model("y"), tmp_path / "m.onnx"), {"x": torch.randn(3, 4)})
    regions = mfcompile.infer_regions(captured, modalities={"x": "vision"}, targets=["re:.*"])
    (site,) = regions.pruned_sites
    assert captured.module.stored_names[site.fqn] == name  # type: ignore[index]


def test_a_name_may_be_the_beginning_of_another(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    first = writer.op("MatMul", "x", writer.weight("w", 4, 4))
    writer.op("MatMul", first, writer.weight("w.inner", 4, 4), out="y")
    regions = regions_of(writer.model("y"), tmp_path, {"x": torch.randn(3, 4)}, modalities={"x": "vision"})
    assert len(regions.sites) == 2


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    writer = GraphWriter()
    writer.input("x", TensorProto.FLOAT, "batch", 4)
    stored = writer.store("w", np.ones((4, 6), np.int8)), writer.store("scale", np.array(0.1, np.float32))
    writer.op("MatMul", "x", writer.op("DequantizeLinear", *stored, name="deq"), out="y")
    with pytest.raises(InputError, match=r"is quantised: .*DequantizeLinear deq.*Prune the float file"):
        mfcompile.capture(save(writer.model("y"), tmp_path / "m.onnx"), {"x": torch.randn(3, 4)})


def test_a_wrong_input_is_named(tmp_path: Path) -> None:
    path = save(two_towers(), tmp_path / "m.onnx")
    inputs = two_towers_inputs()
    with pytest.raises(InputError, match=r"lacks attention_mask.*The inputs are pixel_values, input_ids, attention_mask"):
        mfcompile.capture(path, {key: inputs[key] for key in ("pixel_values", "input_ids")})
    with pytest.raises(InputError, match=r"pixel_values is \(2, 3, 9, 8\), the file takes \('batch', 3, 8, 8\)"):
        mfcompile.capture(path, {**inputs, "pixel_values": torch.rand(2, 3, 9, 8)})


def test_inputs_that_the_graph_cannot_run_are_a_capture_error(tmp_path: Path) -> None:
    path = save(two_towers(), tmp_path / "m.onnx")
    with pytest.raises(CaptureError, match="onnxruntime cannot run"):
        mfcompile.capture(path, {**two_towers_inputs(), "input_ids": torch.full((2, 6), 1000)})


def test_a_path_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"no \.onnx file"):
        mfcompile.capture("model.pt")
