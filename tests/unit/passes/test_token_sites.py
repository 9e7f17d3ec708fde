"""Where tokens can be cut, what is protected there, and what a refusal says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.tokens import token_schedule
from tests.token_models import Block, Caching, Encoder, Joint, Queries, Rolling, fixed, patches, seeded

IMAGE = {"image": patches()}


def refusals(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> list[str]:
    found = mfcompile.find_token_sites(fixed(model, inputs or IMAGE))
    return [str(item) for item in found.refused]


class Pooled(nn.Module):
    """Blocks, and an attention of one learned query over their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(pool="all")
        self.probe = nn.Parameter(torch.randn(1, 1, 16))
        self.pool = Block(16, 2, cross=True)

    def forward(self, image: Tensor) -> Tensor:
        states = self.encoder(image)
        result: Tensor = self.pool.cross(self.probe.expand(image.shape[0], -1, -1), context=states)  # type: ignore[misc]
        return result


class Reads(nn.Module):
    """Reads the second and the last token besides all others' maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(pool="all", cls=False)

    def forward(self, image: Tensor) -> Tensor:
        states = self.encoder(image)
        result: Tensor = states[:, 2] + states[:, -1]
        return result


class Text(nn.Module):
    """Words only, all of which are given back."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.block = Block(16, 2)
        self.head = nn.Linear(16, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.block(self.table(input_ids)))
        return result


class Nested(nn.Module):
    """Text, and behind it an image with a class token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.table = nn.Embedding(50, 16)
        self.block = Block(16, 2)

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        seen = torch.cat([self.cls.expand(image.shape[0], -1, -1), image], 1)
        result: Tensor = self.block(torch.cat([self.table(input_ids), seen], 1)).amax(1)
        return result


def test_sites_name_their_tokens_and_what_stays() -> None:
    found = mfcompile.find_token_sites(fixed(seeded(Encoder), IMAGE))
    assert [(site.name, site.tokens, site.protected, site.region) for site in found.sites] == [
        ("blocks.0.attention", 10, 1, "vision"),
        ("blocks.1.attention", 10, 1, "vision"),
    ]
    assert "10 vision tokens, of which 1 stay (1 at fixed positions)" in str(found)
    assert not found.refused


def test_text_before_the_image_is_protected() -> None:
    inputs = {"image": patches(2), "input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5).long()}
    found = mfcompile.find_token_sites(fixed(seeded(Joint), inputs))
    assert [(site.tokens, site.protected, site.region) for site in found.sites] == [(14, 5, "fusion")] * 2
    assert [site.modality for site in found.sites] == ["vision"] * 2  # text is among them, and cannot be cut


def test_learned_tokens_are_protected_inside_a_part_too() -> None:
    inputs = {"image": patches(2), "input_ids": torch.arange(10).view(2, 5)}
    found = mfcompile.find_token_sites(fixed(seeded(Nested), inputs))
    assert [(site.tokens, site.protected) for site in found.sites] == [(15, 6)]


def test_positions_that_are_read_stay_wherever_they_are() -> None:
    model = seeded(Reads)
    captured = fixed(model, IMAGE)
    assert [site.protected for site in mfcompile.find_token_sites(captured).sites] == [2, 2]
    only = mfcompile.prune_tokens(captured, {"encoder.blocks.1.attention": 2}, scorer="norm").module
    with torch.no_grad():
        states = model.encoder.embed(IMAGE["image"])
        states = model.encoder.blocks[1].attend(model.encoder.blocks[0](states))
        states = model.encoder.norm(model.encoder.blocks[1].rest(states))
        torch.testing.assert_close(only(**IMAGE), states[:, 2] + states[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Encoder(window=3, patches=9, cls=False),
            r"blocks\.0\.attention at view.*rearranged here before they.*9, 16",
        ),
        (Queries, r"block\.attention at expand.*its 4 tokens are learned queries"),
        (Queries, r"block\.cross at .*(cross-attention|other tokens|pooling)"),
        (Pooled, r"pool\.cross at scaled_dot_product_attention.*no residual add"),
        (Caching, r"block\.attention at transpose.*returns keys or values"),
        (Rolling, r"blocks\.0\.attention at roll.*no rule"),
    ],
)
def test_a_refusal_names_node_and_reason(build: Any, message: str) -> None:
    import re

    found = refusals(seeded(build))
    assert any(re.search(message, item) for item in found), found


def test_what_is_refused_elsewhere_leaves_other_sites() -> None:
    found = mfcompile.find_token_sites(fixed(seeded(Queries), IMAGE))
    assert [site.name for site in found.sites] == ["encoder.attention"]
    rolling = mfcompile.find_token_sites(fixed(seeded(Rolling), IMAGE))
    assert [site.name for site in rolling.sites] == ["blocks.1.attention"]


def test_text_of_which_every_word_is_read_is_refused() -> None:
    model = seeded(Text)
    found = mfcompile.find_token_sites(fixed(model, {"input_ids": torch.arange(10).view(2, 5)}))
    assert not found.sites
    assert "every text position is read" in str(found.refused[0])


def test_windows_behind_a_site_refuse_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(16, 2), Block(16, 2, window=3)

        def forward(self, image: Tensor) -> Tensor:
            return self.second(self.first(image)).mean(1)  # type: ignore[no-any-return]

    (first, second) = refusals(seeded(Mixed))
    assert "first.attention at view" in first
    assert "windows of tokens?" in first
    assert "second.attention" in second


def test_a_refused_or_unknown_site_in_a_request_explains_itself() -> None:
    captured = fixed(seeded(Rolling), IMAGE)
    with pytest.raises(mfcompile.InputError, match=r"cut at blocks\.0\.attention: .* at roll .*no rule\. Sites are blocks\.1"):
        mfcompile.prune_tokens(captured, {"blocks.0.attention": 5})
    with pytest.raises(mfcompile.InputError, match="no attention of that name"):
        mfcompile.prune_tokens(captured, {"head": 5})
    with pytest.raises(mfcompile.InputError, match=r"no tokens of region 'audio'.*regions with sites: vision"):
        mfcompile.prune_tokens(captured, {"region:audio": 0.5})


def test_a_share_of_a_region_is_applied_at_quarters_of_its_depth() -> None:
    from mfcompile.passes.token_sites import TokenSite, TokenSites

    sites = tuple(TokenSite(f"layers.{number}", "vision", 197, 1, "add") for number in range(12))
    other = TokenSite("text", "text", 12, 1, "add")
    schedule = token_schedule(TokenSites((*sites, other), ()), 0.7)
    assert schedule == {"layers.3": 0.7, "layers.6": 0.7, "layers.9": 0.7}
    assert token_schedule(TokenSites(sites, ()), 5, at=(0, 1)) == {"layers.0": 5, "layers.11": 5}
    with pytest.raises(mfcompile.InputError, match="between 0 and 1"):
        token_schedule(TokenSites(sites, ()), 0.7, at=(3,))


def test_patterns_name_several_sites() -> None:
    captured = fixed(seeded(Encoder), IMAGE)
    for pattern in ("blocks.*", "re:blocks.[01]"):
        lines = mfcompile.prune_tokens(captured, {pattern: 6}).specialised
        assert [line for line in lines if line.startswith("tokens of")] == [
            "tokens of blocks.0.attention: 6 of 10 stay",
            "tokens of blocks.1.attention: 6 of 6 stay",
        ]


def test_tokens_that_the_stream_cannot_spare_in_the_middle_allow_one_cut() -> None:
    captured = fixed(seeded(Reads), IMAGE)
    with pytest.raises(mfcompile.InputError, match="protected tokens lie between others"):
        mfcompile.prune_tokens(captured, {"encoder.blocks.*": 4})


def test_cls_attention_needs_a_token_that_is_read() -> None:
    captured = fixed(seeded(lambda: Encoder(cls=False, pool="max")), IMAGE)
    with pytest.raises(mfcompile.InputError, match="Use scorer 'cit'"):
        mfcompile.prune_tokens(captured, {"blocks.0.attention": 4}, scorer="cls_attention")
