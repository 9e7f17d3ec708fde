"""Which dimensions of a graph are free, and inputs brought to a size."""

import pytest
import torch

from mfcompile.benchmark.sizes import FreeAxes, free_axes, resize, sized_inputs, with_inputs_of
from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs


def inputs(**tensors: torch.Tensor) -> ExampleInputs:
    return ExampleInputs((), dict(tensors), tuple(tensors))


def test_the_first_axis_is_the_batch_and_images_have_no_tokens() -> None:
    found = free_axes(
        {"ids": ("b", "length"), "mask": ("b", 1, "length"), "image": ("b", 3, "h", "w"), "fixed": (1, 4), "pairs": ("b", "b"),
         "free": (None, None), "number": ()}
    )  # fmt: skip
    assert found.batch == {"ids": (0,), "mask": (0,), "image": (0,), "pairs": (0, 1), "free": (0,)}
    assert found.tokens == {"ids": (1,), "mask": (2,), "free": (1,)}


def test_resizing_cuts_or_repeats() -> None:
    given = inputs(ids=torch.tensor([[1, 2, 3]]), image=torch.zeros(1, 3, 2, 2))
    axes = FreeAxes({"ids": (0,), "image": (0,)}, {"ids": (1,)})
    larger = resize(given, axes, 2, 5).tensors()
    assert larger["ids"].tolist() == [[1, 2, 3, 1, 2], [1, 2, 3, 1, 2]]
    assert larger["image"].shape == (2, 3, 2, 2)
    assert resize(given, axes, None, 1).tensors()["ids"].tolist() == [[1]]
    assert given.tensors()["ids"].tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match=r"ids.*is empty along axis 1"):
        resize(inputs(ids=torch.zeros(1, 0)), FreeAxes({}, {"ids": (1,)}), None, 4)


def test_every_batch_is_combined_with_every_length() -> None:
    given, axes = inputs(ids=torch.zeros(1, 3)), FreeAxes({"ids": (0,)}, {"ids": (1,)})
    found, notes = sized_inputs(given, axes, (1, 2), (4, 8))
    assert [item.size.label for item in found] == [
        "batch 1, 4 tokens", "batch 1, 8 tokens", "batch 2, 4 tokens", "batch 2, 8 tokens",
    ]  # fmt: skip
    assert found[-1].inputs.tensors()["ids"].shape == (2, 8)
    assert notes == []
    assert [item.size.tokens for item in sized_inputs(given, axes, (1,), None)[0]] == [1, 8, 32, 197]
    assert [item.size.shapes for item in sized_inputs(given, axes, (), ())[0]] == [{"ids": (1, 3)}]


def test_what_is_fixed_is_said() -> None:
    given = inputs(image=torch.zeros(1, 3, 4, 4))
    found, notes = sized_inputs(given, FreeAxes({}, {}), (8,), (1, 32))
    assert [item.size.label for item in found] == ["fixed size"]
    assert any("fixes its batch size: image 1x3x4x4" in note for note in notes)
    assert any("leaves no sequence length free" in note for note in notes)


@pytest.mark.parametrize(("batch", "tokens"), [((0,), None), ((1,), (4, -1)), ((True,), None), ((1, 1), None)])
def test_sizes_that_are_none_are_refused(batch: tuple[int, ...], tokens: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match=r"sizes must be whole numbers|is there twice"):
        sized_inputs(inputs(ids=torch.zeros(1, 3)), FreeAxes({"ids": (0,)}, {"ids": (1,)}), batch, tokens)


def test_only_what_the_graph_reads_is_fed() -> None:
    given = inputs(ids=torch.zeros(1), spare=torch.zeros(2))
    assert list(with_inputs_of(given, ["ids"])) == ["ids"]
    with pytest.raises(InputError, match=r"the graph needs mask, but the inputs are ids, spare"):
        with_inputs_of(given, ["ids", "mask"])
