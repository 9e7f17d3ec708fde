"""Models that remember an earlier call: an input that they do not read again is made to be read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mfcompile


class Remembering(nn.Module):
    """Keeps what it made of every row of tokens in a dictionary, as detectors do with the names of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.read = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.see = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 2:
            raise ValueError("pixel_values has two dimensions")
        found = []
        for row in input_ids:
            key = tuple(row.tolist())
            if key not in self.known:
                text = self.words(row).mean(0)
                for layer in self.read:
                    text = layer(text).relu()
                self.known[key] = text
            found.append(self.known[key])
        image = pixel_values
        for layer in self.see:
            image = layer(image).relu()
        result: Tensor = torch.stack(found) @ image.T
        return result


class Ignoring(nn.Module):
    """Takes an input that it does not use, or uses only to choose."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        found = self.layers[0](pixel_values)
        if int(input_ids[0, 0]) > self.limit:
            found = found + input_ids.float().mean()
        result: Tensor = self.layers[1](found)
        return result


INPUTS = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "pixel_values": torch.randn(2, 8)}


def test_an_input_that_the_model_remembers_is_read_all_the_same() -> None:
    model = Remembering()
    fresh = mfcompile.infer_regions(mfcompile.capture(model, INPUTS)).weights
    with torch.no_grad():
        model(**INPUTS)
    captured = mfcompile.capture(model, INPUTS)
    assert mfcompile.infer_regions(captured).weights == fresh
    assert {fresh[f"read.{index}.weight"] for index in range(2)} == {"text"}
    assert any("remembers" in note and "input_ids" in note for note in captured.specialised)
    assert set(model.known) == {(3, 4, 5), (6, 7, 8)}  # the user's object has learnt nothing


def test_the_graph_of_a_model_that_remembers_computes_what_the_model_gives() -> None:
    model = Remembering()
    with torch.no_grad():
        expected = model(**INPUTS)
    captured = mfcompile.capture(model, INPUTS)
    found = captured.graph_module(*captured.example_inputs.tensors().values())[0]
    torch.testing.assert_close(found, expected)


def test_an_input_that_is_never_read_changes_nothing() -> None:
    captured = mfcompile.capture(Ignoring(limit=100), INPUTS)
    assert not any("remembers" in note for note in captured.specialised)


def test_an_input_that_only_chooses_keeps_the_choice_of_the_example() -> None:
    model = Ignoring(limit=3)  # 3 in the example, 5 in its mirror image: another branch, another output
    captured = mfcompile.capture(model, INPUTS)
    assert not any("remembers" in note for note in captured.specialised)
    found = captured.graph_module(*captured.example_inputs.tensors().values())[0]
    torch.testing.assert_close(found, model(**INPUTS))


def test_the_example_calibrates_a_model_that_remembers_it() -> None:
    torch.manual_seed(0)
    model = Remembering().eval()
    fresh = mfcompile.compile_pruned(model, INPUTS, sparsity=0.5)
    with torch.no_grad():
        model(**INPUTS)
    again = mfcompile.compile_pruned(model, INPUTS, sparsity=0.5)
    text = [site.name for site in again.regions.by_region()["text"]]
    assert {name: again.statistics.sites[name].token_count for name in text} == dict.fromkeys(text, 2)
    assert again.masks.digest() == fresh.masks.digest()
