"""What tokens are made of, position by position, in layers that take a stream apart and join it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mfcompile
from tests.token_models import Block, fixed, patches, seeded

WIDTH, WORDS = 16, 5


def batch() -> dict[str, Tensor]:
    return {"image": patches(2), "input_ids": torch.arange(2 * WORDS).view(2, WORDS)}


class Speaker(nn.Module):
    """A decoder of words that attends to the image; every word is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList([Block(WIDTH, 2, cross=True) for _ in range(2)])

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        states: Tensor = self.table(input_ids)
        for block in self.blocks:
            states = block(states, context=image)
        return states


class Asker(nn.Module):
    """Learned queries and words in one stream; the queries alone attend to the image, and are read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.queries = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.blocks = nn.ModuleList([Block(WIDTH, 2) for _ in range(2)])
        self.looks = nn.ModuleList([Block(WIDTH, 2, cross=True) for _ in range(2)])

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        states = torch.cat([self.queries.expand(image.shape[0], -1, -1), self.table(input_ids)], dim=1)
        layers: Any = zip(self.blocks, self.looks, strict=True)
        for block, look in layers:
            states = block.attend(states)
            asked, words = look.rest(states[:, :4], image), block.rest(states[:, 4:])
            states = torch.cat([asked, words], dim=1)
        return states[:, :4]


class Messenger(nn.Module):
    """A token is put behind the others for one layer, as messages between frames are; CLS is read."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.message = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(WIDTH, 2) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        states = torch.cat([self.cls.expand(image.shape[0], -1, -1), image], dim=1)
        for block in self.blocks:
            states = block(torch.cat([states, self.message(states[:, :1])], dim=1))[:, :-1]
        read: Tensor = self.norm(states)[:, 0]
        return read


def test_words_that_attended_to_an_image_are_words() -> None:
    found = mfcompile.find_token_sites(fixed(seeded(Speaker), batch()))
    assert found.sites == ()
    told = [str(item) for item in found.refused]
    assert sum("every text position is read" in line for line in told) == 2


def test_queries_stay_and_words_beside_them_may_go() -> None:
    model = seeded(Asker)
    captured = fixed(model, batch())
    sites = mfcompile.find_token_sites(captured).sites
    assert [(site.name, site.tokens, site.protected, site.modality) for site in sites] == [
        (f"blocks.{number}.attention", 9, 4, "text") for number in range(2)
    ]
    fewer = mfcompile.prune_tokens(captured, {"blocks.0.attention": 6})
    with torch.no_grad():
        found = fewer.module(**batch())
        assert found.shape == (2, 4, WIDTH)
        assert (found.abs().sum(-1) > 0).all()
        whole = mfcompile.prune_tokens(captured, {site.name: 9 for site in sites})
        assert torch.equal(whole.module(**batch()), model(**batch()))


def test_what_is_read_behind_a_slice_stays() -> None:
    captured = fixed(seeded(Messenger), {"image": patches(2)})
    sites = {site.name: site for site in mfcompile.find_token_sites(captured).sites}
    assert sites["blocks.1.attention"].tokens == 11
    assert sites["blocks.1.attention"].protected >= 1
    fewer = mfcompile.prune_tokens(captured, {"blocks.1.attention": 2}, scorer=lambda evidence: -evidence.states[..., 0] * 0)
    with torch.no_grad():
        assert (fewer.module(image=patches(2)).abs().sum(-1) > 0).all()
