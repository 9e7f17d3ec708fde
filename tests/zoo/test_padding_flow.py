"""Marks of padding through single operators: every row of a result is marked that holds nothing but padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfcompile.passes.padding import PaddingMask
from mfcompile.passes.padding_flow import PaddingTracker

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
WIDTH = 6
OTHER = torch.randn(2, 3, WIDTH)
WEIGHT = torch.randn(WIDTH, WIDTH)
NOTHING = torch.ones(2, 3, dtype=torch.long)
JOINED = torch.cat([NOTHING, MASK], dim=1)


def heads(text: Tensor) -> Tensor:
    return text.view(2, 4, 3, 2).transpose(1, 2)


def written(text: Tensor) -> Tensor:
    whole = torch.zeros(2, 7, WIDTH)
    whole[:, 3:] = text
    whole[:, :3] = OTHER
    return whole


def overwritten(text: Tensor) -> Tensor:
    text = text.clone()
    text[:, 2:] = OTHER[:, :2]
    return text


def added(text: Tensor) -> Tensor:
    whole = torch.zeros(8, WIDTH)
    return whole.index_add_(0, torch.arange(8), text.reshape(8, WIDTH))


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "elementwise": (lambda text: (text * 2 + torch.ones(WIDTH)).relu(), MASK),
    "norm": (lambda text: F.layer_norm(text, (WIDTH,)), MASK),
    "linear": (lambda text: F.linear(text, WEIGHT), MASK),
    "product from the left": (lambda text: (WEIGHT @ text.mT).mT, MASK),
    "einsum": (lambda text: torch.einsum("bnd,de->bne", text, WEIGHT), MASK),
    "einsum with heads": (
        lambda text: torch.einsum("bnd,dhe->bhne", text, torch.randn(WIDTH, 3, 2)).transpose(1, 2).flatten(2),
        MASK,
    ),
    "heads and back": (lambda text: heads(F.linear(text, WEIGHT)).transpose(1, 2).reshape(2, 4, WIDTH), MASK),
    "queries": (
        lambda text: F.scaled_dot_product_attention(heads(text), heads(text), heads(text)).transpose(1, 2).flatten(2),
        MASK,
    ),
    "queries spelt out": (lambda text: (text @ text.mT).softmax(-1) @ text, MASK),
    "text as keys of an image": (lambda text: (OTHER @ text.mT).softmax(-1) @ text, NOTHING),
    "image as keys of a text": (lambda text: (text @ OTHER.mT).softmax(-1) @ OTHER, MASK),
    "cat": (lambda text: torch.cat([OTHER, text], dim=1), JOINED),
    "written": (written, JOINED),
    "overwritten": (overwritten, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]])),
    "index_add": (added, MASK.reshape(8)),
    "flattened": (lambda text: F.linear(text.reshape(-1, WIDTH), WEIGHT), MASK.reshape(8)),
    "packed": (lambda text: text[MASK.bool()], torch.ones(5, dtype=torch.long)),
    "sequence first": (lambda text: F.linear(text.transpose(0, 1).contiguous(), WEIGHT), MASK.T),
    "permuted batch": (lambda text: torch.cat([text, text[torch.tensor([1, 0])]]), MASK[[0, 1, 1, 0]]),
    "repeated": (lambda text: text.repeat_interleave(2, dim=0), MASK[[0, 0, 1, 1]]),
    "mean over tokens": (lambda text: text.mean(1, keepdim=True), torch.ones(2, 1, dtype=torch.long)),
    "last token": (lambda text: text[:, -1:], torch.zeros(2, 1, dtype=torch.long)),
    "shifted": (lambda text: F.pad(text, (0, 0, 1, 0))[:, :-1], torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])),
    "features side by side": (lambda text: torch.cat([text, OTHER[:, :1].expand(-1, 4, -1)], dim=-1), torch.ones(2, 4)),
    "mixed over tokens": (lambda text: F.linear(text.mT, torch.randn(4, 4)), torch.ones(2, WIDTH)),
    "chosen": (lambda text: torch.where(MASK[:, :, None] != 0, text, text.new_zeros(())), MASK),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_padding_are_told(name: str) -> None:
    run, expected = CASES[name]
    ids = torch.randint(0, 9, MASK.shape)
    tracker = PaddingTracker([PaddingMask("mask", "ids")])
    tracker.begin({"ids": ids, "mask": MASK})
    with torch.inference_mode(), tracker.following():
        result = run(F.embedding(ids, torch.randn(9, WIDTH)))
    found = tracker.keep(result, (-1,))
    kept = torch.ones(result.shape[:-1], dtype=torch.bool) if found is None else found
    assert torch.equal(kept, expected.bool())
    assert tracker.diagnostics() == ()


def test_without_padding_nothing_is_followed() -> None:
    tracker = PaddingTracker([PaddingMask("mask", "ids")])
    tracker.begin({"ids": torch.zeros(2, 4, dtype=torch.long), "mask": torch.ones(2, 4)})
    assert tracker.following() is not tracker


def test_an_operator_without_a_rule_is_named() -> None:
    tracker = PaddingTracker([PaddingMask("mask", "ids")])
    ids = torch.randint(0, 9, MASK.shape)
    tracker.begin({"ids": ids, "mask": MASK})
    with torch.inference_mode(), tracker.following():
        text = F.embedding(ids, torch.randn(9, WIDTH))
        result = F.conv1d(text.mT, torch.randn(5, WIDTH, 3))
    assert tracker.keep(result, (-1,)) is None
    assert [item.subject for item in tracker.diagnostics()] == ["conv1d"]
