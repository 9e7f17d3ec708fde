"""Any graph in parts computes what it computes whole, and parts of modalities read nothing of each other."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfcompile.errors import ExportError
from mfcompile.exporters.split_build import SplitModel, split_model
from mfcompile.split import SplitRequest
from tests.unit.exporters.split_graphs import SIZES, chain, graph, run_whole

MODALITIES = {"image": "vision", "words": "text", "sound": "audio", "mask": None}
INPUTS = ", ".join(f"float[batch,4,8] {name}" for name in MODALITIES)
WEIGHTS = {f"w{number}": (8, 8) for number in range(5)}

# Operators over values of (batch, 4, 8) or (batch, 1, 8); {a} and {b} are earlier values, {w} is a weight.
STEPS = {
    "multiply": "{o} = MatMul({a}, {w})",
    "bend": "{o} = Tanh({a})",
    "add": "{o} = Add({a}, {b})",
    "scale": "{o} = Mul({a}, {b})",
    "turn": "{o}t = Transpose<perm=[0,2,1]>({a}) {o} = Transpose<perm=[0,2,1]>({o}t)",
    "pool": "{o}x = Constant<value_ints=[1]>() {o} = ReduceMean<keepdims=1>({a}, {o}x)",
    "reshape": "{o}n = Shape({b}) {o} = Expand({a}, {o}n)",
    "attend": "{o}k = Transpose<perm=[0,2,1]>({b}) {o}s = MatMul({a}, {o}k) {o}p = Softmax({o}s) {o} = MatMul({o}p, {b})",
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, list[str], dict[str, str]]:
    """Nodes, outputs and regions of weights."""
    values = list(MODALITIES)
    lines = []
    for name in ("image", "words"):  # so that most graphs have two towers to begin with
        weight = draw(st.sampled_from(sorted(WEIGHTS)))
        lines.append(STEPS["multiply"].format(o=f"{name}_in", a=name, w=weight))
        values.append(f"{name}_in")
    for number in range(draw(st.integers(2, 14))):
        step = STEPS[draw(st.sampled_from(sorted(STEPS)))]
        first, second = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        weight = draw(st.sampled_from(sorted(WEIGHTS)))
        lines.append(step.format(o=f"v{number}", a=first, b=second, w=weight))
        values.append(f"v{number}")
    lines.append(f"met = Add(image_in, words_in) end = Add(met, {values[-1]})")
    values.append("end")
    made = values[len(MODALITIES) :]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    if made[-1] not in outputs:
        outputs.append(made[-1])
    regions = draw(
        st.dictionaries(st.sampled_from(sorted(WEIGHTS)), st.sampled_from(["vision", "text", "fusion", "audio+text"]))
    )
    return " ".join(lines), outputs, regions


def check_inputs(divided: SplitModel) -> None:
    for part in divided.parts[:-1]:
        if part.name == "fusion":
            continue
        assert not part.sources, f"{part.name} waits for another part"
        own = {MODALITIES[str(value.name)] for value in part.model.graph.inputs}
        assert own <= {part.name, None}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
def test_parts_compute_what_the_whole_computes(drawn: tuple[str, list[str], dict[str, str]]) -> None:
    body, outputs, regions = drawn
    signature = f"({INPUTS}) => ({', '.join(f'float[batch,rows_{name},8] {name}' for name in outputs)})"
    model = graph(signature, body, **WEIGHTS)
    for output in model.graph.output:  # some have one row, some four
        output.type.tensor_type.shape.dim[1].ClearField("dim_param")
    try:
        divided = split_model(ir.from_proto(model), SplitRequest(MODALITIES, regions, SIZES))
    except ExportError as error:
        assert "nothing to split" in str(error)  # noqa: PT017 - most graphs do split
        return
    check_inputs(divided)
    with TemporaryDirectory() as folder:
        session = chain(divided, Path(folder), MODALITIES)
        random = np.random.default_rng(0)
        for batch in (2, 3):
            feeds = {name: random.normal(size=(batch, 4, 8)).astype(np.float32) for name in MODALITIES}
            expected = run_whole(model, feeds)
            known = {node.name for node in session.get_inputs()}
            found = session.run(None, {name: value for name, value in feeds.items() if name in known})
            for node, value in zip(session.get_outputs(), found, strict=True):
                np.testing.assert_allclose(value, expected[node.name], rtol=1e-3, atol=1e-3)
