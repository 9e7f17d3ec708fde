"""Labels: what steers carries none (masks, positions, sizes), and what is chosen by content carries the content's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.region import RegionMap
from tests.zoo.parts import WIDTH, FeedForward, Patches

BATCH, LENGTH, CODES = 3, 6, 16


class Model(nn.Module):
    """A function of text and picture gives tokens, two layers read them."""

    def __init__(self, tokens: Callable[[Any, dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = tokens
        self.patches = Patches()
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Embedding(64, WIDTH)
        self.codes = nn.Embedding(CODES, WIDTH)
        self.layers = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, **inputs: Tensor) -> Tensor:
        states = self.tokens(self, inputs)
        for layer in self.layers:
            states = states + layer(states)
        return states


def inputs(**more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 50, (BATCH, LENGTH), generator=generator)
    ids[1, 4:] = 1
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator), "input_ids": ids, **more}


def labels_of(tokens: Callable[[Any, dict[str, Tensor]], Tensor], **more: Tensor) -> set[str]:
    """What reaches the first layer."""
    given = inputs(**more)
    captured = mfcompile.capture(Model(tokens).eval(), given)
    found: RegionMap = mfcompile.infer_regions(captured)
    (use,) = found.evidence["layers.0.1.weight"]
    return set(use.label)


MASK = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [5]])).long()


def image_codes(m: Any, x: dict[str, Tensor]) -> Tensor:
    """(B, P) nearest entry of a code book, as VQ tokenizers find it."""
    distances = torch.cdist(m.patches(x["pixel_values"]), m.codes.weight[None])
    return distances.argmin(-1)


def rotary(m: Any, x: dict[str, Tensor]) -> Tensor:
    """Words turned by their places, which are counted from the ids that are no padding."""
    angles = x["input_ids"].ne(1).cumsum(1)[..., None] * torch.arange(1, WIDTH // 2 + 1)
    turned = torch.cat([angles.cos(), angles.sin()], -1)
    states: Tensor = m.patches(x["pixel_values"]).mean(1, keepdim=True) * turned
    return states


def grid_places(m: Any, x: dict[str, Tensor]) -> Tensor:
    """Places of the words behind an image of a grid, as models with rotary embeddings for pictures count them."""
    found = []
    for ids, (t, h, w) in zip(x["input_ids"], x["image_grid_thw"].tolist(), strict=True):
        start = int((ids == 1).sum())
        found.append(torch.arange(LENGTH) + start + max(t, h // 2, w // 2))
    states: Tensor = m.places(torch.stack(found)) + m.patches(x["pixel_values"]).mean(1, keepdim=True)
    return states


STEERED: dict[str, tuple[Callable[[Any, dict[str, Tensor]], Tensor], dict[str, Tensor]]] = {
    "places counted from a mask": (
        lambda m, x: m.places((x["attention_mask"].cumsum(1) - 1).clamp(min=0)) + m.patches(x["pixel_values"])[:, :1],
        {"attention_mask": MASK},
    ),
    "places counted from ids that are no padding": (
        lambda m, x: m.places(x["input_ids"].ne(1).int().cumsum(1)) + m.patches(x["pixel_values"])[:, :1],
        {},
    ),
    "padding counted out of the ids": (
        lambda m, x: (
            m.places(
                (torch.cumsum(x["input_ids"].ne(1).int(), dim=1).type_as(x["input_ids"]) * x["input_ids"].ne(1).int()).long()
                + 1
            )
            + m.patches(x["pixel_values"])[:, :1]
        ),
        {},
    ),
    "rotary angles from ids": (rotary, {}),
    "masked by a mask": (
        lambda m, x: m.patches(x["pixel_values"]).mean(1, keepdim=True) * x["attention_mask"][..., None].float(),
        {"attention_mask": MASK},
    ),
    "masked where the ids are padding": (
        lambda m, x: m.patches(x["pixel_values"]).mean(1, keepdim=True).masked_fill((x["input_ids"] == 1)[..., None], 0.0),
        {},
    ),
    "chosen where the ids are padding": (
        lambda m, x: torch.where((x["input_ids"] == 1)[..., None], 0.0, m.patches(x["pixel_values"]).mean(1, keepdim=True)),
        {},
    ),
    "length of the text": (
        lambda m, x: (
            m.patches(x["pixel_values"]) / x["input_ids"].shape[1] + m.places.weight[: x["input_ids"].shape[1]].mean(0)
        ),
        {},
    ),
    "size of the picture": (
        lambda m, x: m.patches(x["pixel_values"]) * x["image_sizes"].float().mean(1)[:, None, None],
        {"image_sizes": torch.full((BATCH, 2), 8)},
    ),
    "lengths given": (
        lambda m, x: m.patches(x["pixel_values"]) * (torch.arange(4)[None] < x["text_lengths"][:, None])[..., None],
        {"text_lengths": torch.tensor([3, 2, 4])},
    ),
    "grid of the picture and padding of the ids": (grid_places, {"image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}),
    "position ids": (
        lambda m, x: m.patches(x["pixel_values"])[:, :1] + m.places(x["position_ids"]),
        {"position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH)},
    ),
}


@pytest.mark.parametrize("case", STEERED)
def test_what_steers_carries_no_label(case: str) -> None:
    tokens, more = STEERED[case]
    assert labels_of(tokens, **more) == {"vision"}


CHOSEN: dict[str, tuple[Callable[[Any, dict[str, Tensor]], Tensor], set[str]]] = {
    "looked up by the nearest code": (lambda m, x: m.codes(image_codes(m, x)), {"vision"}),
    "looked up by the best score": (
        lambda m, x: m.words((m.patches(x["pixel_values"]) @ m.codes.weight.t()).argmax(-1)),
        {"vision"},
    ),
    "codes written among the words": (
        lambda m, x: m.words(torch.cat([image_codes(m, x), x["input_ids"]], dim=1)),
        {"text", "vision"},
    ),
    "codes scattered into the ids": (
        lambda m, x: m.words(x["input_ids"].masked_scatter(x["input_ids"] == 1, image_codes(m, x))),
        {"text", "vision"},
    ),
    "codes that a vocabulary maps": (
        lambda m, x: m.words(m.codes.weight.new_zeros(CODES, dtype=torch.long).add(7)[image_codes(m, x)]),
        {"vision"},
    ),
    "one-hot words": (lambda m, x: F.one_hot(x["input_ids"], 50).float() @ m.words.weight, {"text"}),
    "the best tokens of the picture": (
        lambda m, x: m.places.weight[m.patches(x["pixel_values"]).sum(-1).topk(2).indices],
        {"vision"},
    ),
    "rows of the picture that the text picks": (
        lambda m, x: m.patches(x["pixel_values"]).gather(1, (x["input_ids"] % 4)[..., None].expand(-1, -1, WIDTH)),
        {"vision"},
    ),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_what_is_looked_up_carries_the_label_of_what_chose_it(case: str) -> None:
    tokens, expected = CHOSEN[case]
    assert labels_of(tokens) == expected
