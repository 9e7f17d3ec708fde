"""One token for those that are dropped, beside masks and rotary tables, against an eager reference in loops."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.passes.token_merging import MaskUse, best_dropped, take_with_merged
from mfcompile.passes.token_places import Place
from tests.token_models import fixed, patches, seeded
from tests.token_reference import attention_weights, choose, pick, received

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
TOKENS, WIDTH, HEADS = 8, 16, 2


class Turned(nn.Module):
    """Causal self-attention with rotary positions and a padding mask in one of the forms that masks have."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def heads(self, layer: nn.Module, states: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(batch, heads, tokens, width / heads), rotated."""
        split: Tensor = layer(states).view(*states.shape[:2], HEADS, -1).transpose(1, 2)
        if turn is None:
            return split
        first, second = split.chunk(2, dim=-1)
        rotated: Tensor = split * turn[0].unsqueeze(1) + torch.cat([-second, first], dim=-1) * turn[1].unsqueeze(1)
        return rotated

    def attend(self, states: Tensor, turn: tuple[Tensor, Tensor], seen: Tensor | None) -> Tensor:
        """The stream behind the residual add."""
        query, key, value = self.heads(self.query, states, turn), self.heads(self.key, states, turn), None
        value = self.heads(self.value, states)
        if self.kind == "written":
            assert seen is not None
            logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
            mixed = logits.masked_fill(~seen, -1e9).softmax(-1) @ value
        elif self.kind == "flag":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, seen)
        added: Tensor = states + self.out(mixed.transpose(1, 2).flatten(2))
        return added

    def forward(self, states: Tensor, turn: tuple[Tensor, Tensor], seen: Tensor | None) -> Tensor:
        states = self.attend(states, turn, seen)
        added: Tensor = states + F.gelu(self.mlp(states))
        return added


class Decoder(nn.Module):
    """Reads its last token, or all."""

    angles: Tensor

    def __init__(self, kind: str, reads_all: bool = False) -> None:
        super().__init__()
        self.kind, self.reads_all = kind, reads_all
        self.blocks = nn.ModuleList([Turned(kind) for _ in range(2)])
        angles = torch.arange(float(TOKENS))[:, None] / 10 ** torch.linspace(0, 1, WIDTH // HEADS // 2)
        self.register_buffer("angles", torch.cat([angles, angles], dim=1)[None], persistent=False)

    def tables(self) -> tuple[Tensor, Tensor]:
        """(1, tokens, width / heads) cosines and sines."""
        return self.angles.cos(), self.angles.sin()

    def seen(self, padding_mask: Tensor) -> Tensor:
        """(batch, 1, tokens, tokens) bool."""
        return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & padding_mask.bool()[:, None, None, :]

    def forward(self, image: Tensor, padding_mask: Tensor) -> Tensor:
        seen = self.seen(padding_mask)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if self.kind == "added" else seen
        states = image
        for block in self.blocks:
            states = block(states, self.tables(), mask)
        return states if self.reads_all else states[:, -1] + 0 * padding_mask.sum(1, keepdim=True)


def inputs() -> dict[str, Tensor]:
    """The second sample has a token in its middle that nobody may look at."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 3] = 0
    return {"image": patches(2, TOKENS, WIDTH), "padding_mask": mask}


@cache
def decoder(kind: str) -> tuple[Decoder, CapturedGraph]:
    """A model that no test changes, exported once."""
    model = seeded(lambda: Decoder(kind))
    return model, fixed(model, inputs())


def reference(model: Any, image: Tensor, mask: Tensor, count: int) -> Tensor:
    """The last token, with the others of the first block in one token in front of it."""
    seen = model.seen(mask)[:, 0] if model.kind != "flag" else model.seen(torch.ones_like(mask))[:, 0]
    turn, first, second = model.tables(), model.blocks[0], model.blocks[1]
    score = received(attention_weights(first.heads(first.query, image, turn), first.heads(first.key, image, turn), seen))
    states = first.attend(image, turn, seen[:, None])
    padding = [[token for token in range(TOKENS) if not bool(seen[row, :, token].any())] for row in range(2)]
    kept = choose(score, count, [[TOKENS - 1]] * 2, padding)
    last = []
    for row in range(2):
        rest = [token for token in range(TOKENS) if token not in kept[row] and token not in padding[row]]
        best = max(rest, key=lambda token: float(score[row, token]))
        weights = score[row, rest] / score[row, rest].sum()
        places = [[token] for token in kept[row, :-1].tolist()] + [rest] + [[TOKENS - 1]]
        rows = [(weights[:, None] * states[row, rest]).sum(0) if item is rest else states[row, item[0]] for item in places]
        who = [best if item is rest else item[0] for item in places]
        may = [[any(all(bool(seen[row, q, k]) for k in keys) for q in queries) for keys in places] for queries in places]
        table = tuple(item[:, who] for item in turn)
        stream = torch.stack(rows)[None]
        stream = stream + F.gelu(first.mlp(stream))
        last.append(second(stream, table, torch.tensor(may)[None, None])[0, -1])
    return torch.stack(last)


@pytest.mark.parametrize("kind", ["bool", "added", "written", "flag"])
def test_the_merged_token_has_a_row_in_masks_and_rotary_tables(kind: str) -> None:
    model, captured = decoder(kind)
    batch = inputs()
    fewer = mfcompile.prune_tokens(captured, {"blocks.0": 4}, rest="merge")
    with torch.no_grad():
        found = fewer.module(**batch)
        torch.testing.assert_close(found, reference(model, batch["image"], batch["padding_mask"], 4), **CLOSE)
        dropped = mfcompile.prune_tokens(captured, {"blocks.0": 4}).module(**batch)
        assert not torch.allclose(found, dropped, **CLOSE)
        whole = mfcompile.prune_tokens(captured, {"blocks.0": TOKENS}, rest="merge")
        assert torch.equal(whole.module(**batch), model(**batch))


@pytest.mark.parametrize("kind", ["added", "flag"])
def test_nobody_sees_what_comes_later_through_the_merged_token(kind: str) -> None:
    captured = fixed(seeded(lambda: Decoder(kind, reads_all=True)), inputs())
    fewer = mfcompile.prune_tokens(captured, {"blocks.0": 4}, rest="merge", outputs="shorter", scorer="random")
    batch = inputs()
    with torch.no_grad():
        before = fewer.module(**batch)
        kept = before["output_0_kept"][0].tolist()
        last = max(set(range(TOKENS)) - set(kept))
        batch["image"][:, last] += 1.0
        after = fewer.module(**batch)
    earlier = [at for at, place in enumerate(kept) if 0 <= place < last]
    assert earlier
    assert torch.equal(before["output_0"][:, earlier], after["output_0"][:, earlier])
    assert not torch.equal(before["output_0"][:, kept.index(-1)], after["output_0"][:, kept.index(-1)])


def test_padding_is_in_no_merged_token() -> None:
    _, captured = decoder("bool")
    fewer = mfcompile.prune_tokens(captured, {"blocks.0": 4}, rest="merge")
    batch = inputs()
    other = {**batch, "image": batch["image"].clone()}
    other["image"][1, 3] = 9.0
    with torch.no_grad():
        torch.testing.assert_close(fewer.module(**batch), fewer.module(**other), **CLOSE)


@pytest.mark.parametrize("form", ["bool", "inverted", "added"])
def test_masks_are_seen_by_all_and_see_any(form: str) -> None:
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    masks = {"bool": seen, "inverted": ~seen, "added": torch.where(seen, 0.0, -torch.inf)}
    rows, members = torch.tensor([[0, 4, 2, 5]]), torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]])
    mask = MaskUse(is_inverted=form == "inverted")
    found = take_with_merged(masks[form], rows, members, [2, 3], Place(0), 2, 1, mask)[0, 0]
    # of positions 0, the merged 1, 3 and 4, 2, 5: position 2 sees 1 alone, and 4 sees all that any of them sees
    wanted = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal({"bool": found, "inverted": ~found if form == "inverted" else found, "added": found == 0}[form], wanted)
    rows = torch.tensor([[0, 1, 2, 5]])
    earlier = take_with_merged(masks[form], rows, members, [2, 3], Place(0), 2, 1, mask)[0, 0]
    assert torch.equal(earlier, found)  # whichever of them is the best


def test_of_padding_alone_nothing_is_merged() -> None:
    score, valid = torch.tensor([[3.0, 1.0, 2.0, 5.0]]), torch.tensor([[True, True, True, False]])
    best, members = best_dropped(score, torch.tensor([[0, 1, 2]]), valid)
    assert best.tolist() == [[3]]
    assert not members.any()
    best, members = best_dropped(score, torch.tensor([[0, 3]]), valid)
    assert best.tolist() == [[2]]
    assert members.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert pick(score[..., None], best).flatten().tolist() == [2.0]
