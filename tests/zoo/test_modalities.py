"""What inputs are taken for where names say nothing: dtype, rank, values and the tables that they look up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError, RegionError
from tests.zoo.parts import WIDTH, SelfBlock, Words, pool

B, L = 3, 5
IDS = torch.tensor([[7, 3, 9, 4, 0], [5, 5, 2, 0, 0], [8, 1, 6, 3, 2]])
KEEP = (IDS != 0).long()


class Any2(nn.Module):
    """A picture of whatever layout, a text, and something else; positional arguments without names."""

    def __init__(self, use: Any = None) -> None:
        super().__init__()
        self.lift, self.words = nn.LazyLinear(WIDTH), Words(40)
        self.types, self.places, self.other = nn.Embedding(3, WIDTH), nn.Embedding(20, WIDTH), Words(30)
        self.see, self.read = SelfBlock(), SelfBlock()
        self.use = use

    def forward(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        image = self.lift(a.float().flatten(1))[:, None]
        text = self.words(b)
        if self.use is not None and c is not None:
            text = text + self.use(self, c)
        joint: Tensor = self.read(torch.cat([self.see(image), text], dim=1))
        return joint


def modalities(a: Tensor, c: Tensor | None = None, use: Any = None) -> dict[str, str | None]:
    model = Any2(use).eval()
    inputs = (a, IDS) if c is None else (a, IDS, c)
    with torch.no_grad():
        model(*inputs)
    found = mfcompile.infer_regions(mfcompile.capture(model, inputs)).modalities
    return {item.name: item.modality for item in found}


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(B, 3, 8, 8),
        torch.rand(B, 1, 8, 8),
        torch.rand(B, 8, 8, 3),
        torch.rand(B, 6, 3, 8, 8),
        torch.randint(0, 255, (B, 3, 8, 8), dtype=torch.uint8),
        torch.randint(0, 255, (B, 8, 8, 3), dtype=torch.uint8),
    ],
    ids=["channels first", "grey", "channels last", "frames", "bytes", "bytes channels last"],
)
def test_pictures(image: Tensor) -> None:
    assert modalities(image) == {"a": "vision", "b": "text"}


PICTURE = torch.rand(B, 3, 8, 8)
CONTROLS = {
    "types": (torch.tensor([[0, 1, 1, 2, 0]] * B), lambda model, c: model.types(c)),
    "positions": (torch.arange(L).expand(B, L).contiguous(), lambda model, c: model.places(c)),
    "mask": (KEEP, lambda model, c: c[:, :, None] * 0.1),
    "float mask": (KEEP.float(), lambda model, c: c[:, :, None] * 0.1),
    "bool mask": (KEEP.bool(), lambda model, c: c[:, :, None] * 0.1),
    "additive mask": ((1 - KEEP.float()) * -1e4, lambda model, c: c.exp()[:, :, None]),
    "additive 4-D mask": (((1 - KEEP.float()) * -1e4)[:, None, None, :], lambda model, c: c[:, 0, 0, :, None].exp()),
    "mask that gives positions": (KEEP, lambda model, c: model.places(c.cumsum(1))),
    "lengths": (KEEP.sum(1), lambda model, c: c[:, None, None] * 0.1),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls(name: str) -> None:
    tensor, use = CONTROLS[name]
    assert modalities(PICTURE, tensor, use) == {"a": "vision", "b": "text", "c": None}


def test_positions_that_pick_tokens_are_control_by_their_name() -> None:
    class Picks(Any2):
        def forward(self, a: Tensor, b: Tensor, phrase_position: Tensor) -> Tensor:  # type: ignore[override]
            joint = super().forward(a, b)
            return joint.gather(1, phrase_position[:, :, None].expand(-1, -1, WIDTH))

    model = Picks().eval()
    inputs = (PICTURE, IDS, torch.tensor([[0, 4], [3, 1], [2, 2]]))
    with torch.no_grad():
        model(*inputs)
    found = mfcompile.infer_regions(mfcompile.capture(model, inputs)).modalities
    assert {item.name: item.modality for item in found} == {"a": "vision", "b": "text", "phrase_position": None}


def test_a_choice_of_a_prompt_for_each_sample_is_control_whatever_its_name() -> None:
    class Chooses(Any2):
        def __init__(self) -> None:
            super().__init__()
            self.choice = nn.Linear(4, WIDTH)

        def forward(self, a: Tensor, b: Tensor, prompt_ids: Tensor) -> Tensor:  # type: ignore[override]
            joint = super().forward(a, b)
            chosen: Tensor = self.choice(nn.functional.one_hot(prompt_ids, 4).float())
            return joint + chosen[:, None]

    assert _found(Chooses(), torch.tensor([0, 3, 1]))["prompt_ids"] is None


def test_a_sentence_without_a_batch_is_text() -> None:
    class Reads(Any2):
        def forward(self, a: Tensor, b: Tensor, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            joint = super().forward(a, b)
            sentence: Tensor = self.other(input_ids[None])
            return joint + sentence.mean(1, keepdim=True)

    assert _found(Reads(), torch.tensor([3, 8, 2, 5]))["input_ids"] == "text"


def _found(model: nn.Module, third: Tensor) -> dict[str, str | None]:
    model.eval()
    with torch.no_grad():
        model(PICTURE, IDS, third)
    found = mfcompile.infer_regions(mfcompile.capture(model, (PICTURE, IDS, third))).modalities
    return {item.name: item.modality for item in found}


@pytest.mark.parametrize("name", ["image_grid_thw", "image_grid_hw", "image_grids", "word_position", "positions"])
def test_names_of_what_steers(name: str) -> None:
    class Steered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.words = nn.Conv2d(3, WIDTH, 4, 4), Words(40)

        def forward(self, image: Tensor, **steering: Tensor) -> Tensor:
            states = torch.cat([self.lift(image).flatten(2).mT, self.words(steering["input_ids"])], dim=1)
            return states * steering[name].sum()

    captured = mfcompile.capture(Steered(), {"image": PICTURE, "input_ids": IDS, name: torch.tensor([[1, 4], [2, 2], [7, 3]])})
    found = {item.name: item.modality for item in mfcompile.infer_regions(captured).modalities}
    assert found == {"image": "vision", "input_ids": "text", name: None}


def test_a_second_text_with_a_smaller_table_of_its_own() -> None:
    other = torch.tensor([[9, 2, 7, 7, 1], [3, 8, 2, 0, 0], [6, 1, 1, 5, 4]])
    assert modalities(PICTURE, other, lambda model, c: model.other(c))["c"] == "text"


def test_one_hot_text() -> None:
    def one_hot(model: Any2, c: Tensor) -> Tensor:
        return nn.functional.one_hot(c, 40).float() @ model.words.table.weight

    assert modalities(PICTURE, IDS.clone(), lambda model, c: model.words(c) + one_hot(model, c))["c"] == "text"


def test_shifted_labels_are_text() -> None:
    class Seq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.words = nn.Conv2d(3, WIDTH, 4, 4), Words(40)
            self.layers = nn.ModuleList(SelfBlock() for _ in range(2))

        def forward(self, image: Tensor, labels: Tensor) -> Tensor:
            shifted = labels.new_zeros(labels.shape)
            shifted[:, 1:] = labels[:, :-1].clone()
            shifted.masked_fill_(shifted == -100, 0)
            states = torch.cat([self.lift(image).flatten(2).mT, self.words(shifted)], dim=1)
            for layer in self.layers:
                states = layer(states)
            return states

    labels = IDS.masked_fill(IDS == 0, -100)
    found = mfcompile.infer_regions(mfcompile.capture(Seq2Seq(), {"image": PICTURE, "labels": labels}))
    assert {item.name: item.modality for item in found.modalities} == {"image": "vision", "labels": "text"}
    assert {region for fqn, region in found.weights.items() if fqn != "lift.weight"} == {"fusion"}


def test_feature_vectors_need_a_word_from_the_user() -> None:
    features = torch.rand(B, 4, 10)
    with pytest.raises(RegionError, match=r"modalities=\{'a': 'vision'\}"):
        modalities(features)


def test_an_override_of_no_input_is_refused() -> None:
    model = Any2().eval()
    model(PICTURE, IDS)
    captured = mfcompile.capture(model, (PICTURE, IDS))
    with pytest.raises(InputError, match=r"'z'.*a, b"):
        mfcompile.infer_regions(captured, modalities={"z": "text"})


def test_a_third_modality_mixes_under_its_name() -> None:
    class Robot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.words, self.state = nn.Conv2d(3, WIDTH, 4, 4), Words(40), nn.Linear(6, WIDTH)
            self.one, self.two = (nn.ModuleList(SelfBlock() for _ in range(2)) for _ in range(2))

        def forward(self, image: Tensor, text: Tensor, proprioception: Tensor) -> Tensor:
            states = torch.cat([self.words(text), self.state(proprioception)[:, None]], dim=1)
            for layer in self.one:
                states = layer(states)
            states = torch.cat([states, self.lift(image).flatten(2).mT], dim=1)
            for layer in self.two:
                states = layer(states)
            return pool(states, torch.ones(states.shape[:2]))

    inputs = {"image": PICTURE, "text": IDS, "proprioception": torch.rand(B, 6)}
    found = mfcompile.infer_regions(mfcompile.capture(Robot(), inputs), modalities={"proprioception": "state"})
    assert {found.weights[fqn] for fqn in found.weights if fqn.startswith("one")} == {"state+text"}
    assert {found.weights[fqn] for fqn in found.weights if fqn.startswith("two")} == {"fusion"}
    assert found.weights["state.weight"] == "state"


class Album(nn.Module):
    """A list of pictures without a batch dimension of their own, and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.words = nn.Linear(192, WIDTH), Words(40)
        self.see, self.read = SelfBlock(), SelfBlock()

    def forward(self, images: list[Tensor], b: Tensor) -> Tensor:
        seen = self.see(self.lift(torch.stack(images).flatten(1))[:, None])
        joint: Tensor = self.read(torch.cat([seen, self.words(b)], dim=1))
        return joint


def album(**options: Any) -> dict[str, str | None]:
    captured = mfcompile.capture(Album().eval(), ([torch.rand(3, 8, 8) for _ in range(B)], IDS))
    return {item.name: item.modality for item in mfcompile.infer_regions(captured, **options).modalities}


def test_items_of_a_list_are_known_by_the_name_of_the_list() -> None:
    assert album() == {"images.0": "vision", "images.1": "vision", "images.2": "vision", "b": "text"}


def test_a_modality_given_for_a_list_holds_for_its_items_unless_they_have_their_own() -> None:
    found = album(modalities={"images": "depth", "images.1": "control"})
    assert found == {"images.0": "depth", "images.1": None, "images.2": "depth", "b": "text"}


def test_a_modality_for_half_a_name_is_refused() -> None:
    with pytest.raises(InputError, match="no input 'image'"):
        album(modalities={"image": "vision"})
