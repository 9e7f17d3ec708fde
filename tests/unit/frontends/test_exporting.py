"""The torch.export rung: free dimensions, the ladder of ways, and a check that can fail."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfcompile.frontends.capture import capture
from mfcompile.frontends.exporting import candidates, export_program, redraw, symbolic_axes, wanted_axes
from mfcompile.frontends.without_cache import without_cache
from mfcompile.graph import CaptureAttempt, ExportedModel
from mfcompile.inputs import normalize_inputs, output_tensors
from tests.models import TwoLayers, tiny_vlm, vlm_batch
from tests.token_models import llava_like

BATCH = {0: "batch"}
BATCH_AND_SEQUENCE = {0: "batch", 1: "sequence"}
# Exported programs may take other kernels.
RTOL, ATOL = 1e-4, 1e-5


class Body(nn.Module):
    """A function over an image (batch, place, 4) and ids (batch, length)."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.table = nn.Embedding(9, 4)
        self.config = SimpleNamespace(use_cache=True, text_config=SimpleNamespace(use_cache=True))

    def forward(self, image: Tensor, ids: Tensor) -> Any:
        return self.body(self, image, ids)


def inputs(batch: int = 2, length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(batch, 3, 4, generator=generator),
        "ids": torch.randint(0, 9, (batch, length), generator=generator),
    }


def export(model: nn.Module, given: Any) -> tuple[ExportedModel | None, tuple[CaptureAttempt, ...]]:
    return export_program(capture(model, given))


def exported(model: nn.Module, given: Any) -> ExportedModel:
    found, attempts = export(model, given)
    assert found is not None, attempts
    return found


def assert_computes(found: ExportedModel, model: nn.Module, given: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected, computed = output_tensors(model(**given)), output_tensors(found.program.module()(**given))
    assert list(expected) == list(computed)
    for name, tensor in expected.items():
        torch.testing.assert_close(computed[name], tensor, rtol=RTOL, atol=ATOL)


def test_batch_and_sequence_are_free() -> None:
    model = tiny_vlm()
    found = exported(model, vlm_batch())
    assert found.route == "torch.export"
    assert found.notes == ()
    assert found.dynamic_axes == {
        "pixel_values": BATCH,
        "input_ids": BATCH_AND_SEQUENCE,
        "attention_mask": BATCH_AND_SEQUENCE,
    }
    assert found.input_names == ("pixel_values", "input_ids", "attention_mask")
    assert found.output_names == ("image", "text", "fused", "match")
    assert_computes(found, model, vlm_batch((4, 9, 2)))
    assert found.program.state_dict["head.weight"].data_ptr() == model.head.weight.data_ptr()


def test_a_batch_of_one_is_repeated() -> None:
    model = tiny_vlm()
    found = exported(model, vlm_batch((5,)))
    assert found.example_inputs.batch_size() == 2
    assert found.dynamic_axes["pixel_values"] == BATCH
    assert_computes(found, model, vlm_batch((5, 4, 3)))


def test_one_sample_stays_one_where_no_other_number_would_go() -> None:
    """A program of two samples, and of two alone, could not run the user's example."""

    def fixing(m: Any, image: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = m.table(ids).sum(1) + image.reshape(int(image.shape[0]), 12).sum(1, keepdim=True)
        return result

    model = Body(fixing)
    found = exported(model, inputs(1))
    assert found.example_inputs.batch_size() == 1
    assert found.dynamic_axes == {"ids": {1: "sequence"}}
    assert "dimension 0 (batch) of image is fixed to 1: the model computes with its value" in found.notes
    assert_computes(found, model, inputs(1))
    assert_computes(found, model, inputs(1, length=7))


def test_a_decoder_with_one_image_takes_one_image() -> None:
    """LLaVA counts its images: the batch of one cannot be made free by repeating it."""
    model, batch = llava_like()
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert_computes(exported(model, one), model, one)


def test_a_dimension_that_the_model_fixes_is_noted() -> None:
    model = Body(lambda m, image, ids: m.table(ids).view(image.shape[0], 5, 4) + image.sum(1, keepdim=True))
    found = exported(model, inputs())
    assert found.dynamic_axes == {"image": BATCH, "ids": BATCH}
    assert found.notes == ("dimension 1 (sequence) of ids is fixed to 5: the model computes with its value",)


def test_wanted_axes() -> None:
    def axes(**tensors: Tensor) -> dict[str, dict[int, str]]:
        class Anything(nn.Module):
            def forward(self, **given: Tensor) -> Tensor:
                return next(iter(given.values()))

        return wanted_axes(normalize_inputs(Anything(), tensors))

    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    assert axes(image=torch.zeros(2, 3, 8, 8), ids=ids, mask=mask) == {
        "image": BATCH,
        "ids": BATCH_AND_SEQUENCE,
        "mask": BATCH_AND_SEQUENCE,
    }
    assert axes(ids=ids, answers=torch.zeros(2, 7, dtype=torch.long)) == {
        "ids": BATCH_AND_SEQUENCE,
        "answers": {0: "batch", 1: "sequence_1"},
    }
    assert axes(vectors=torch.zeros(2, 5), scale=torch.tensor(1.0)) == {"vectors": BATCH}
    assert axes(ids=ids, image=torch.zeros(3, 4)) == {}


class Positional(nn.Module):
    def forward(self, image: Tensor, *more: Tensor, **named: Any) -> Tensor:
        result: Tensor = image.sum(1) + sum(item.sum(1) for item in more) + named["batch"]["other"].sum(1)
        return result


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        result: Tensor = batch["image"].sum(1) + batch["list"][0].sum(1)
        return result


class NamedOnly(nn.Module):
    def forward(self, **named: Tensor) -> Tensor:
        return named["image"].sum(1) + named["ids"].sum(1, keepdim=True)


class VariadicOnly(nn.Module):
    def forward(self, image: Tensor, *more: Tensor) -> Tensor:
        return image.sum(1) + sum(item.sum(1) for item in more)


class Optional(nn.Module):
    def forward(self, image: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return image.sum(1) * scale


@pytest.mark.parametrize(
    ("model", "given", "names"),
    [
        (Nested(), {"batch": {"image": torch.ones(2, 3, 4), "list": [torch.ones(2, 5, 4)]}}, ["batch.image", "batch.list.0"]),
        (NamedOnly(), inputs(), ["image", "ids"]),
        (Positional(), {"image": torch.ones(2, 3, 4), "batch": {"other": torch.ones(2, 7, 4)}}, ["image", "batch.other"]),
        (VariadicOnly(), (torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 1, 4)), ["image", "more_1", "more_2"]),
        (Optional(), {"image": torch.ones(2, 3, 4), "mask": None, "scale": 2.0}, ["image"]),
        (Optional(), (torch.ones(2, 3, 4), None), ["image"]),
    ],
    ids=["nested", "keywords", "nested keywords", "variadic", "none and numbers", "positional none"],
)
def test_every_form_of_inputs_keeps_its_free_batch(model: nn.Module, given: Any, names: list[str]) -> None:
    found = exported(model, given)
    assert found.route == "torch.export"
    assert {name: dims[0] for name, dims in found.dynamic_axes.items()} == dict.fromkeys(names, "batch")


def cached(m: Any, image: Tensor, ids: Tensor) -> Tensor:
    if m.config.use_cache or m.config.text_config.use_cache:
        if torch.compiler.is_compiling():
            fourth_line = "never shown"
            raise RuntimeError(f"a cache is no tensor\nand more\nand more\n{fourth_line}")
        return image + 0
    return image


def refusing(*dims: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """A model that cannot be exported while a dimension of its ids is free."""

    def body(m: Any, image: Tensor, ids: Tensor) -> Tensor:
        if any(isinstance(ids.shape[dim], torch.SymInt) for dim in dims):
            raise RuntimeError(f"dimension {dims} must be a number")
        result: Tensor = m.table(ids).sum(1) + image.sum(1)
        return result

    return body


LADDER = [
    "torch.export",
    "torch.export without cache",
    "torch.export, sequence fixed",
    "torch.export, shapes fixed",
    "transformers.exporters",
    "transformers.exporters, shapes fixed",
    "recorded graph",
]


@pytest.mark.parametrize(
    ("body", "rung", "axes"),
    [
        (cached, 1, {"image": BATCH, "ids": BATCH_AND_SEQUENCE}),
        (refusing(1), 2, {"image": BATCH, "ids": BATCH}),
        (refusing(0, 1), 3, {}),
    ],
    ids=["cache", "sequence", "batch"],
)
def test_ways_are_tried_in_order_and_kept(body: Callable[..., Tensor], rung: int, axes: dict[str, dict[int, str]]) -> None:
    model = Body(body)
    found, attempts = export(model, inputs())
    assert found is not None
    assert found.route == LADDER[rung]
    assert [(attempt.frontend, attempt.succeeded) for attempt in attempts] == [
        (way, index == rung) for index, way in enumerate(LADDER[: rung + 1])
    ]
    assert all(attempt.detail.startswith("RuntimeError: ") for attempt in attempts[:-1])
    assert "never shown" not in attempts[0].detail
    assert attempts[-1].detail == f"{len(found.program.graph.nodes)} nodes"
    assert found.dynamic_axes == axes
    assert sum(note.startswith("dimension ") for note in found.notes) == 3 - sum(map(len, axes.values()))
    assert sum("prefill graph" in note for note in found.notes) == 1
    assert model.config.use_cache
    assert model.config.text_config.use_cache
    assert_computes(found, model, inputs())


def test_caches_are_switched_off_for_a_while() -> None:
    model = nn.Sequential(Body(cached), nn.Identity())
    config = model.get_submodule("0").config
    assert isinstance(config, SimpleNamespace)
    with without_cache(model):
        assert (config.use_cache, config.text_config.use_cache) == (False, False)
    assert (config.use_cache, config.text_config.use_cache) == (True, True)


def test_a_model_that_torch_cannot_trace_is_exported_from_its_recording() -> None:
    def body(m: Any, image: Tensor, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise ValueError("not for export")
        result: Tensor = m.table(ids).sum(1) + image.sum(1)
        return result

    model = Body(body)
    found, attempts = export(model, inputs())
    assert found is not None
    assert found.route == "recorded graph"
    assert [attempt.frontend for attempt in attempts] == LADDER
    assert {attempt.detail.split(" (at ")[0] for attempt in attempts[:4]} == {"ValueError: not for export"}
    assert "not one of transformers" in attempts[4].detail
    assert found.dynamic_axes == {}
    assert any("every shape is that of the example" in note for note in found.notes)
    assert found.program.state_dict["table.weight"].data_ptr() == model.table.weight.data_ptr()
    assert_computes(found, model, inputs())


def test_a_model_that_no_way_exports_is_told_why() -> None:
    def body(m: Any, image: Tensor, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise ValueError("not for export")
        return image + float(image.sum())  # a number of this example

    found, attempts = export(Body(body), inputs())
    assert found is None
    assert [attempt.frontend for attempt in attempts] == LADDER
    assert "gives another output_0 than the model on other values" in attempts[-1].detail


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda m, image, ids: image + torch.compiler.is_compiling(), "gives another output_0 than the model on the example"),
        (lambda m, image, ids: image.new_full((1,), float(image.abs().sum() > 0)) + image if not torch.compiler.is_compiling()
         else image + 1 + 0 * ids.sum(), None),
        (lambda m, image, ids: {"a" if torch.compiler.is_compiling() else "b": image}, "returns ['a'], the model ['b']"),
    ],
    ids=["value", "same", "name"],
)  # fmt: skip
def test_a_program_that_computes_something_else_gives_way(body: Callable[..., Any], what: str | None) -> None:
    found, attempts = export(Body(body), inputs())
    assert found is not None
    assert found.route == ("torch.export" if what is None else "recorded graph")
    if what is not None:
        assert all(what in attempt.detail for attempt in attempts[:4])


def test_a_program_that_is_right_on_the_example_only_gives_way() -> None:
    total = float(inputs()["image"].sum())

    def body(m: Any, image: Tensor, ids: Tensor) -> Tensor:
        return image + (total if torch.compiler.is_compiling() else image.sum())

    found, attempts = export(Body(body), inputs())
    assert found is not None
    assert found.route == "recorded graph"
    assert all("than the model on other values" in attempt.detail for attempt in attempts[:4])


def test_candidates_are_made_one_at_a_time_and_can_be_continued() -> None:
    captured = capture(Body(lambda m, image, ids: image + 0 * ids.sum()), inputs())
    first, *others = [attempt.frontend for attempt, _ in candidates(captured)]
    assert [first, *others] == LADDER
    assert [attempt.frontend for attempt, _ in candidates(captured, after=LADDER[3])] == LADDER[4:]
    assert [attempt.frontend for attempt, _ in candidates(captured, after="record")] == LADDER
    assert not list(candidates(captured, after=LADDER[-1]))


def test_ways_that_are_the_same_are_tried_once() -> None:
    captured = capture(Optional(), {"image": torch.ones(2, 3, 4)})
    routes = [attempt.frontend for attempt, _ in candidates(captured)]
    assert routes == ["torch.export", "torch.export, shapes fixed", *LADDER[4:]]


def test_rows_are_fixed_where_the_model_reads_them() -> None:
    """The recording holds how many tokens each row has: rows that swap places are other numbers, images are not."""

    def body(m: Any, image: Tensor, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1).tolist()
        if torch.compiler.is_compiling():
            raise ValueError("not for export")
        return torch.stack([image[row].sum() * length for row, length in enumerate(lengths)])

    given = inputs()
    given["ids"][0, 0], given["ids"][1, 1:3] = 0, 0
    found, _ = export(Body(body), given)
    assert found is not None
    assert found.metadata == {"mfcompile.rows": "fixed"}
    assert any("numbers that the model reads from its inputs" in note for note in found.notes)


def test_training_flags_and_weights_are_left_alone() -> None:
    model = TwoLayers().train()
    given = torch.randn(2, 3, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported(model, given)
    assert all(item.training for item in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = TwoLayers()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.layers(image)
        return result


def test_state_that_the_model_writes_is_left_alone() -> None:
    model = Counting()
    exported(model, torch.randn(2, 3, 4))
    assert model.calls == 0


def test_redrawn_inputs_have_other_values_in_the_same_places() -> None:
    given = normalize_inputs(Optional(), {"image": torch.randn(4, 3, 4) * 5 + 2, "scale": 2.0})
    again = redraw(given)
    assert again.tensors()["image"].shape == (4, 3, 4)
    assert not torch.equal(again.tensors()["image"], given.tensors()["image"])
    assert 2 < float(again.tensors()["image"].std()) < 8
    assert again.kwargs["scale"] == 2.0
    ids = normalize_inputs(NamedOnly(), inputs())
    assert torch.equal(redraw(ids).tensors()["ids"], inputs()["ids"].roll(1, 0))


def test_axes_are_read_off_the_program() -> None:
    found = exported(tiny_vlm(), vlm_batch())
    asked = {"pixel_values": {0: "batch", 2: "height"}, "input_ids": {0: "batch"}}
    kept = symbolic_axes(found.program, found.example_inputs, asked)
    assert kept == {"pixel_values": BATCH, "input_ids": BATCH}
