"""A cutter finds sites once and gives what ``prune_tokens`` gives, cut after cut."""

from __future__ import annotations

import pytest
import torch

import mfcompile
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.passes import token_sites
from mfcompile.tokens import TokenCutter
from tests.token_models import Encoder, patches, seeded


@pytest.fixture(scope="module")
def encoder() -> CapturedGraph:
    return mfcompile.with_token_program(mfcompile.capture(seeded(Encoder), {"image": patches()}))


def code(captured: CapturedGraph) -> str:
    assert captured.exported is not None
    return str(captured.exported.program.graph_module.code)


def test_it_cuts_again_and_again_as_prune_tokens_does(encoder: CapturedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = ({"blocks.0.attention": 0.7}, {"blocks.0.attention": 0.9, "blocks.1.attention": 0.6}, {"blocks.0.attention": 0.7})
    wanted = [mfcompile.prune_tokens(encoder, keep) for keep in keeps]
    assert code(wanted[0]) != code(wanted[1])
    cutter = TokenCutter(encoder)
    monkeypatch.setattr(token_sites, "find_attentions", None)  # sites are not looked for any more
    for keep, expected in zip(keeps, wanted, strict=True):
        found = cutter.cut(keep)
        assert code(found.captured) == code(expected)
        assert found.captured.specialised == expected.specialised
        assert found.captured.module is found.module
        with torch.no_grad():
            one, other = (encoder.example_inputs.call(item) for item in (found.module, expected.module))
        assert torch.equal(one, other)


def test_a_site_that_is_unknown_is_refused(encoder: CapturedGraph) -> None:
    with pytest.raises(InputError, match=r"tokens cannot be cut at blocks\.7: there is no attention of that name"):
        TokenCutter(encoder).cut({"blocks.7": 0.5})
