"""How graphs written by hand are divided, and that the parts compute what the whole computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mfcompile.errors import ExportError
from mfcompile.exporters.split_build import split_model
from mfcompile.split import SplitRequest
from tests.unit.exporters.split_graphs import (
    MODALITIES,
    SIZES,
    assert_chain_equals_whole,
    feeds,
    graph,
    interface,
    operators,
    run_whole,
    split,
    stored,
)

INPUTS = "float[batch,4,8] pixels, float[batch,sequence,8] words"
W = (8, 8)


def test_towers_and_their_fusion(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,4] y)",
        "v = MatMul(pixels, wv) vt = Transpose<perm=[0,2,1]>(v) t = MatMul(words, wt) y = MatMul(t, vt)",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert operators(divided) == {"vision": ["MatMul", "Transpose"], "text": ["MatMul"], "fusion": ["MatMul"]}
    assert interface(divided) == {
        "vision": (["pixels"], ["vision_features"]),
        "text": (["words"], ["text_features"]),
        "fusion": (["vision_features", "text_features"], ["y"]),
    }
    assert stored(divided) == {"vision": {"wv"}, "text": {"wt"}, "fusion": set()}
    assert_chain_equals_whole(model, divided, tmp_path)


def test_of_a_diamond_the_narrow_end_is_handed_over(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] y)",
        """v = MatMul(pixels, wv) a = Relu(v) b = Tanh(v) c = Add(a, b) axes = Constant<value_ints=[1]>()
        m = ReduceMean<keepdims=1>(c, axes) t = MatMul(words, wt) y = Add(t, m)""",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert operators(divided)["vision"] == ["MatMul", "Relu", "Tanh", "Add", "ReduceMean"]
    assert operators(divided)["fusion"] == ["Add"]
    assert_chain_equals_whole(model, divided, tmp_path)


def test_copies_of_a_value_are_made_where_they_are_read(tmp_path: Path) -> None:
    """Transposed, cast, expanded, normalised: the fusion makes them of the one value that is handed over."""
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,4] y, float[batch,4,8] z)",
        """v = MatMul(pixels, wv) vt = Transpose<perm=[0,2,1]>(v) n = LayerNormalization(v, scale) t = MatMul(words, wt)
        y = MatMul(t, vt) axes = Constant<value_ints=[1]>() tm = ReduceMean<keepdims=1>(t, axes)
        s = Add(n, v) z = Add(s, tm)""",
        wv=W,
        wt=W,
        scale=(8,),
    )
    divided = split(model)
    assert interface(divided)["vision"][1] == ["vision_features"]
    assert {"Transpose", "LayerNormalization"} <= set(operators(divided)["fusion"])
    assert "text_features" in interface(divided)["text"][1]
    assert_chain_equals_whole(model, divided, tmp_path)


def test_a_value_that_is_read_twice_crosses_once(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,4] y, float[batch,4,sequence] z)",
        """v = MatMul(pixels, wv) t = MatMul(words, wt) vt = Transpose<perm=[0,2,1]>(v) y = MatMul(t, vt)
        tt = Transpose<perm=[0,2,1]>(t) z = MatMul(v, tt)""",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert [len(inputs) + len(outputs) for inputs, outputs in interface(divided).values()] == [2, 2, 4]
    assert_chain_equals_whole(model, divided, tmp_path)


def test_several_values_of_a_part_are_numbered(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] y)",
        """k = MatMul(pixels, wk) v = MatMul(pixels, wv) q = MatMul(words, wq) kt = Transpose<perm=[0,2,1]>(k)
        s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v)""",
        wk=W,
        wv=W,
        wq=W,
    )
    divided = split(model)
    assert interface(divided)["vision"][1] == ["vision_features_1", "vision_features_2"]
    assert_chain_equals_whole(model, divided, tmp_path)
    late = split(model, {"wk": "fusion", "wv": "fusion", "wq": "text"})
    assert stored(late) == {"text": {"wq"}, "fusion": {"wk", "wv"}}, "keys and values of a fusion block are fusion"
    assert interface(late)["fusion"][0][0] == "pixels"


def test_a_mixture_in_front_of_a_tower_is_the_beginning_of_the_tower(tmp_path: Path) -> None:
    """Otherwise one weight that was tagged by what reads it in the end would take the whole tower into the fusion."""
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,4] y)",
        """p = MatMul(pixels, wp) a = Tanh(p) b = MatMul(a, wv) v = MatMul(b, wk) vt = Transpose<perm=[0,2,1]>(v)
        t = MatMul(words, wt) y = MatMul(t, vt)""",
        wp=W,
        wv=W,
        wk=W,
        wt=W,
    )
    divided = split(model, {"wp": "fusion", "wv": "vision", "wk": "fusion", "wt": "text"})
    assert stored(divided) == {"vision": {"wp", "wv"}, "text": {"wt"}, "fusion": {"wk"}}
    assert_chain_equals_whole(model, divided, tmp_path)


def test_a_weight_that_towers_share_is_stored_in_both(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,4] y)",
        "v = MatMul(pixels, w) vt = Transpose<perm=[0,2,1]>(v) t = MatMul(words, w) y = MatMul(t, vt)",
        w=W,
    )
    divided = split(model, {"w": "fusion"})
    assert stored(divided) == {"vision": {"w"}, "text": {"w"}, "fusion": set()}
    assert divided.notes == ("w is stored in vision and text: both use it",)
    assert_chain_equals_whole(model, divided, tmp_path)


def test_what_depends_on_control_inputs_alone_is_made_in_every_part(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}, float[batch,sequence] mask) => (float[batch,sequence,8] y)",
        """axes = Constant<value_ints=[2]>() m = Unsqueeze(mask, axes) t = MatMul(words, wt) tm = Mul(t, m)
        one = Constant<value_ints=[1]>() v = MatMul(pixels, wv) vm = ReduceMean<keepdims=1>(v, one) s = Add(tm, vm)
        y = Mul(s, m)""",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert interface(divided) == {
        "vision": (["pixels"], ["vision_features"]),
        "text": (["words", "mask"], ["text_features"]),
        "fusion": (["mask", "vision_features", "text_features"], ["y"]),
    }
    assert all("Unsqueeze" in operators(divided)[part] for part in ("text", "fusion"))
    assert_chain_equals_whole(model, divided, tmp_path)


@pytest.mark.parametrize(("width", "holders"), [(1024, ["text", "fusion"]), (4096, ["text"])])
def test_a_value_without_content_that_needs_large_weights_is_computed_once(
    tmp_path: Path, width: int, holders: list[str]
) -> None:
    model = graph(
        f"({INPUTS}, float[batch,sequence] mask) => (float[batch,sequence,8] y)",
        """axes = Constant<value_ints=[2]>() m = Unsqueeze(mask, axes) hidden = MatMul(m, up) bent = Tanh(hidden)
        bias = MatMul(bent, down) t = MatMul(words, wt) tb = Add(t, bias) tw = MatMul(tb, wt2) one = Constant<value_ints=[1]>()
        v = MatMul(pixels, wv) vm = ReduceMean<keepdims=1>(v, one) s = Add(tw, vm) half = Tanh(bias) y = Add(s, half)""",
        wv=W,
        wt=W,
        wt2=W,
        up=(1, width),
        down=(width, 8),
    )
    divided = split(model)
    assert [name for name, weights in stored(divided).items() if "down" in weights] == holders
    assert any("bytes of weights and no content" in note for note in divided.notes) == (holders == ["text"])
    assert_chain_equals_whole(model, divided, tmp_path)


def test_constants_are_stored_by_every_part_that_reads_them(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] y)",
        """v = MatMul(pixels, wv) vs = Mul(v, scale) ve = MatMul(vs, wv) axes = Constant<value_ints=[1]>()
        vm = ReduceMean<keepdims=1>(ve, axes) t = MatMul(words, wt) ts = Mul(t, scale) te = MatMul(ts, wt)
        s = Add(te, vm) y = Mul(s, scale)""",
        wv=W,
        wt=W,
        scale=(8,),
    )
    divided = split(model)
    assert stored(divided) == {"vision": {"wv", "scale"}, "text": {"wt", "scale"}, "fusion": {"scale"}}
    assert_chain_equals_whole(model, divided, tmp_path)


def test_an_output_of_the_vision_part_keeps_its_name_where_it_crosses(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,4,8] image, float[batch,sequence,4] y)",
        "image = MatMul(pixels, wv) it = Transpose<perm=[0,2,1]>(image) t = MatMul(words, wt) y = MatMul(t, it)",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert interface(divided)["vision"] == (["pixels"], ["image"])
    assert interface(divided)["fusion"] == (["image", "text_features"], ["y"])
    assert_chain_equals_whole(model, divided, tmp_path)


def test_an_input_may_be_read_by_two_parts(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,4] y)",
        "v = MatMul(pixels, wv) r = Add(v, pixels) c = Mul(r, pixels) rt = Transpose<perm=[0,2,1]>(c) t = MatMul(words, wt) "
        "a = MatMul(t, rt) pt = Transpose<perm=[0,2,1]>(pixels) b = MatMul(words, pt) y = Add(a, b)",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert interface(divided)["vision"][0] == ["pixels"]
    assert interface(divided)["fusion"][0][:2] == ["pixels", "words"]
    assert_chain_equals_whole(model, divided, tmp_path)


def test_outputs_that_are_inputs(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}, float[batch,sequence] mask) => (float[batch,4,8] same, float[batch,sequence] kept, float[batch,4,8] v,"
        " float[batch,sequence,8] t)",
        "same = Identity(pixels) kept = Identity(mask) v = MatMul(pixels, wv) t = MatMul(words, wt)",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert set(operators(divided)) == {"vision", "text"}, "without a meeting there is no fusion"
    assert "same" in interface(divided)["vision"][1]
    assert_chain_equals_whole(model, divided, tmp_path)


def test_every_part_asks_its_own_inputs_for_sizes(tmp_path: Path) -> None:
    """The vision tower takes its batch from the words, as exported programs do: it must not need the words for that."""
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] y)",
        """b = Shape<start=0,end=1>(words) tail = Constant<value_ints=[1,8]>() target = Concat<axis=0>(b, tail)
        cls = Expand(token, target) joined = Concat<axis=1>(cls, pixels) v = MatMul(joined, wv)
        axes = Constant<value_ints=[1]>() vm = ReduceMean<keepdims=1>(v, axes) all = Shape(words) t = MatMul(words, wt)
        r = Reshape(t, all) s = Add(r, vm) again = Shape(s) y = Reshape(s, again)""",
        wv=W,
        wt=W,
        token=(1, 1, 8),
    )
    divided = split(model)
    assert interface(divided) == {
        "vision": (["pixels"], ["vision_features"]),
        "text": (["words"], ["text_features"]),
        "fusion": (["vision_features", "text_features"], ["y"]),
    }
    assert_chain_equals_whole(model, divided, tmp_path)


def test_positions_counted_along_the_text_are_counted_again_by_the_fusion(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] y)",
        """n = Shape<start=1,end=2>(words) axis = Constant<value_ints=[0]>() last = Squeeze(n, axis)
        zero = Constant<value_int=0>() one = Constant<value_int=1>() r = Range(zero, last, one) f = Cast<to=1>(r)
        ax = Constant<value_ints=[0,2]>() pos = Unsqueeze(f, ax) wave = Cos(pos)
        v = MatMul(pixels, wv) axes = Constant<value_ints=[1]>() vm = ReduceMean<keepdims=1>(v, axes) t = MatMul(words, wt)
        s = Add(t, vm) y = Mul(s, wave)""",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert interface(divided)["text"][1] == ["text_features"]
    assert "Cos" in operators(divided)["fusion"]
    assert "Cos" not in operators(divided)["text"]


def test_a_tied_table_is_looked_up_by_the_text_and_multiplied_by_the_fusion(tmp_path: Path) -> None:
    model = graph(
        "(float[batch,4,8] pixels, int64[batch,sequence] ids) => (float[batch,sequence,10] y)",
        """e = Gather(table, ids) axes = Constant<value_ints=[1]>() v = MatMul(pixels, wv) vm = ReduceMean<keepdims=1>(v, axes)
        h = Add(e, vm) head = Transpose<perm=[1,0]>(table) y = MatMul(h, head)""",
        wv=W,
        table=(10, 8),
    )
    divided = split(model, {"table": "fusion", "wv": "vision"})
    assert {part for part, names in stored(divided).items() if "table" in names} == {"text", "fusion"}
    assert divided.notes == ("table is stored in text and fusion: both use it",)
    assert_chain_equals_whole(model, divided, tmp_path)


def test_a_part_without_weights_is_computed_by_the_fusion(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] y)",
        """t = Tanh(words) v = MatMul(pixels, wv) axes = Constant<value_ints=[1]>() vm = ReduceMean<keepdims=1>(v, axes)
        s = Add(t, vm) y = MatMul(s, wf)""",
        wv=W,
        wf=W,
    )
    divided = split(model)
    assert interface(divided) == {
        "vision": (["pixels"], ["vision_features"]),
        "fusion": (["words", "vision_features"], ["y"]),
    }
    assert divided.notes == ("text has no weights of its own: the fusion computes what it needs of it",)
    assert_chain_equals_whole(model, divided, tmp_path)


def test_three_modalities(tmp_path: Path) -> None:
    model = graph(
        "(float[batch,3,8] sound, float[batch,4,8] pixels, float[batch,sequence,8] words) => (float[batch,sequence,8] y)",
        """a = MatMul(sound, wa) v = MatMul(pixels, wv) t = MatMul(words, wt) axes = Constant<value_ints=[1]>()
        am = ReduceMean<keepdims=1>(a, axes) vm = ReduceMean<keepdims=1>(v, axes) av = Add(am, vm) y = Add(t, av)""",
        wa=W,
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert list(operators(divided)) == ["audio", "vision", "text", "fusion"], "in the order of the inputs"
    assert_chain_equals_whole(model, divided, tmp_path)


def test_names_of_the_graph_are_not_taken_twice(tmp_path: Path) -> None:
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] vision_features)",
        """v = MatMul(pixels, wv) axes = Constant<value_ints=[1]>() vm = ReduceMean<keepdims=1>(v, axes)
        size_of_batch = MatMul(words, wt) n = Shape(size_of_batch) r = Reshape(size_of_batch, n)
        vision_features = Add(r, vm)""",
        wv=W,
        wt=W,
    )
    divided = split(model)
    assert interface(divided)["vision"][1] == ["vision_features_2"]
    assert_chain_equals_whole(model, divided, tmp_path)


def test_one_region_is_refused() -> None:
    model = graph("(float[batch,4,8] pixels) => (float[batch,4,8] y)", "y = MatMul(pixels, wv)", wv=W)
    with pytest.raises(ExportError, match=r"nothing to split: all of it is vision\. Its inputs are pixels \(vision\)"):
        split(model)


def test_a_modality_that_reaches_no_output_is_said() -> None:
    model = graph(f"({INPUTS}) => (float[batch,4,8] y)", "y = MatMul(pixels, wv) t = MatMul(words, wt)", wv=W, wt=W)
    with pytest.raises(ExportError, match="all of it is vision, although it has inputs of"):
        split(model)


BRANCHES = """c = ReduceMax<keepdims=0>(words) zero = Constant<value_float=0.0>() yes = Greater(c, zero)
    s = If(yes) <
        then_branch = g1 () => (float[batch,4,8] a) { a = MatMul(pixels, wv) },
        else_branch = g2 () => (float[batch,4,8] b) { b = Neg(pixels) }
    >
    t = MatMul(words, wt) axes = Constant<value_ints=[1]>() tm = ReduceMean<keepdims=1>(t, axes) y = Add(s, tm)"""


def test_a_condition_that_mixes_modalities_around_weights_of_one_is_refused_by_name() -> None:
    model = graph(f"({INPUTS}) => (float[batch,4,8] y)", BRANCHES, wv=W, wt=W)
    with pytest.raises(ExportError, match=r"text and vision both enter the If operator .*: wv \(vision\)"):
        split(model, {"wv": "vision", "wt": "text"})


def test_a_condition_over_one_modality_is_copied_with_what_it_captures(tmp_path: Path) -> None:
    body = BRANCHES.replace("ReduceMax<keepdims=0>(words)", "ReduceMax<keepdims=0>(pixels)")
    model = graph(f"({INPUTS}) => (float[batch,4,8] y)", body, wv=W, wt=W)
    divided = split(model, {"wv": "vision", "wt": "text"})
    assert stored(divided)["vision"] == {"wv"}
    assert "If" in operators(divided)["vision"]
    assert_chain_equals_whole(model, divided, tmp_path)


def test_the_whole_model_still_computes_the_same(tmp_path: Path) -> None:
    """Splitting renames values and rewrites sizes in place; it must not change what the given model computes."""
    model = graph(
        f"({INPUTS}) => (float[batch,sequence,8] y)",
        """n = Shape(words) t = MatMul(words, wt) r = Reshape(t, n) v = MatMul(pixels, wv) axes = Constant<value_ints=[1]>()
        vm = ReduceMean<keepdims=1>(v, axes) y = Add(r, vm)""",
        wv=W,
        wt=W,
    )
    working = ir.from_proto(model)
    split_model(working, SplitRequest(MODALITIES, {}, SIZES))
    after = ir.to_proto(working)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_array_equal(run_whole(after, feeds())["y"], run_whole(model, feeds())["y"])
