"""capture(): what it says about a model, what it refuses, and that it leaves the model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import CaptureError, InputError
from mfcompile.frontends.capture import capture, with_export
from mfcompile.frontends.recorder import replay
from tests.models import TwoLayers, tiny_vlm, vlm_batch, vlm_captured


def image() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.body = TwoLayers(), body
        self.calls = 0
        self.cache: dict[str, Tensor] = {}

    def forward(self, image: Tensor) -> Any:
        return self.body(self, image)


def test_what_a_capture_holds() -> None:
    model = tiny_vlm()
    captured = capture(model, vlm_batch())
    assert captured.module is model
    assert captured.frontend == "record"
    assert [spec.name for spec in captured.inputs] == ["pixel_values", "input_ids", "attention_mask"]
    assert [captured.node(spec.node).op for spec in captured.inputs] == ["placeholder"] * 3
    assert captured.output_names == ("image", "text", "fused", "match")
    assert captured.specialised == ("the shapes of the example inputs",)
    assert captured.baked_scalars == ()
    (attempt,) = captured.attempts
    assert (attempt.frontend, attempt.succeeded) == ("record", True)
    assert attempt.detail.startswith(f"{len(captured.graph.nodes)} nodes; its replay differs from the model by at most ")
    assert captured.versions["torch"] == torch.__version__.partition("+")[0] or captured.versions["torch"] == torch.__version__
    assert captured.aliases["head.weight"] == ("head.weight",)
    assert captured.parameter("head.weight") is model.head.weight
    assert captured.exported is None


def test_the_text_of_a_capture_names_inputs_and_outputs() -> None:
    text = str(vlm_captured())
    assert text.startswith("CapturedGraph(TinyVlm, frontend=record, ")
    assert "input pixel_values: (2, 3, 8, 8) torch.float32" in text
    assert "output match" in text
    assert "specialised: the shapes of the example inputs" in text


def test_unknown_nodes_and_parameters_are_key_errors() -> None:
    with pytest.raises(KeyError):
        vlm_captured().node("nothing")
    with pytest.raises(KeyError):
        vlm_captured().parameter("head.in_features")


@pytest.mark.parametrize("model", [None, "bert", lambda x: x])
def test_only_modules_are_captured(model: Any) -> None:
    with pytest.raises(InputError, match=rf"model must be a torch\.nn\.Module, got {type(model).__name__}"):
        capture(model, image())


def test_a_model_without_weights_gives_a_plan_that_nothing_is_pruned_by() -> None:
    with torch.device("meta"):
        model = TwoLayers()
    plan = capture(model, image())
    real = capture(TwoLayers(), image())
    assert [node.target for node in plan.graph.nodes] == [node.target for node in real.graph.nodes]
    assert "nothing was computed with weights" in plan.attempts[0].detail
    refusal = r"8 parameters without values .*first: blocks\.0\.up\.weight.*Load the weights"
    regions = mfcompile.infer_regions(plan)
    for prune in (
        lambda: mfcompile.compile_pruned(model, image()),
        lambda: mfcompile.calibrate(plan, regions=regions),
        lambda: mfcompile.select_masks(plan, regions, None, criterion="magnitude"),
        lambda: mfcompile.export_onnx(plan, "never.onnx"),
    ):
        with pytest.raises(InputError, match=refusal):
            prune()


def test_inputs_that_do_not_fit_are_refused_before_the_model_runs() -> None:
    class Untouchable(nn.Module):
        def forward(self, image: Tensor, text: Tensor | None = None) -> Tensor:
            raise AssertionError("the model must not run")

    with pytest.raises(InputError, match=r"example_inputs does not fit Untouchable\.forward"):
        capture(Untouchable(), {"pixels": image()})


def remembering(m: Body, x: Tensor) -> Tensor:
    m.calls += 1
    m.cache[f"call {m.calls}"] = x
    result: Tensor = m.layers(x) * m.calls
    return result


def test_what_a_model_remembers_stays_out_of_it() -> None:
    model = Body(remembering)
    captured = capture(model, image())
    assert model.calls == 0
    assert model.cache == {}
    # The graph is that of a first call.
    assert torch.equal(replay(captured.graph_module, captured.example_inputs)[0], model.layers(image()))


def test_a_model_that_cannot_be_copied_is_captured_as_it_is() -> None:
    model = Body(lambda m, x: m.layers(x))
    model.handle = (letter for letter in "")  # type: ignore[assignment]
    captured = capture(model, image())
    assert len(captured.graph.nodes) > 4
    assert not any(item._forward_hooks or item._forward_pre_hooks for item in model.modules())


def test_a_model_that_draws_random_numbers_is_captured_and_said() -> None:
    model = Body(lambda m, x: (m.layers(x + torch.randn(4)) > 0).float() + torch.rand(4))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    captured = capture(model, image())
    assert torch.equal(torch.rand(2), expected), "capture drew from the caller's generator"
    assert captured.specialised[1] == "nothing random: 2 operators draw new random numbers at every run"
    one, two = (replay(captured.graph_module, captured.example_inputs)[0] for _ in range(2))
    assert not torch.equal(one, two)


def test_what_the_graph_is_fixed_to_is_said() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.layers(x * x.sum().item()) + torch.tensor([1.0]) if x.max() > -9 else x
        return result

    captured = capture(Body(body), image())
    assert captured.specialised == (
        "the shapes of the example inputs",
        "2 numbers that the model read from its inputs (in the model itself)",
        "1 tensors that are neither parameters nor buffers, kept as constants",
    )
    assert [type(scalar.value) for scalar in captured.baked_scalars] == [bool, float]


@torch.library.custom_op("mfcompile_tests::drift", mutates_args=())
def drift(x: Tensor) -> Tensor:
    """An operator with state that nobody sees."""
    drift.calls = getattr(drift, "calls", 0) + 1  # type: ignore[attr-defined]
    return x + drift.calls  # type: ignore[attr-defined,no-any-return]


def test_a_recording_that_does_not_replay_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Body was recorded, but its recording gives another output_0 \(2, 3, 4\)"):
        capture(Body(lambda m, x: drift(m.layers(x))), image())


def test_nan_outputs_replay_as_nan() -> None:
    captured = capture(Body(lambda m, x: [m.layers(x) * float("nan"), x / 0]), image())
    assert len(captured.output_names) == 2


def test_an_export_is_made_once_and_kept() -> None:
    captured = mfcompile.capture(TwoLayers(), image())
    exported = with_export(captured)
    assert exported.exported is not None
    assert [attempt.frontend for attempt in exported.attempts] == ["record", "torch.export"]
    assert with_export(exported) is exported
    assert captured.exported is None
    assert capture(TwoLayers(), image(), export=True).exported is not None
