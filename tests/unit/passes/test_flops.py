"""FLOPs counted from a graph against those that torch counts while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.passes.flops import count_flops
from tests.structured_models import some_of
from tests.token_models import Encoder, SequenceFirst, blip_like, clip_like, fixed, llava_like, patches, seeded


class Products(nn.Module):
    """Every kind of product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 2, stride=2, groups=4)
        self.back = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.weight = nn.Parameter(torch.randn(16, 5))

    def forward(self, image: Tensor) -> Tensor:
        maps = self.back(self.grouped(self.conv(image))).flatten(2)
        rows = torch.addmm(torch.ones(5), maps.flatten(0, 1)[:, :16], self.weight)
        return rows.sum() + torch.einsum("bij,bkj->bik", maps, maps).sum() + torch.bmm(maps, maps.transpose(1, 2)).sum()


def counted_by_torch(module: Any, inputs: dict[str, Tensor]) -> int:
    # torch counts no fused attention on the CPU; written out, it counts the two products of it
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return int(counter.get_total_flops())


def count(captured: CapturedGraph) -> int:
    assert captured.exported is not None
    return count_flops(captured.exported.program).total


def test_every_product_counts_as_in_torch() -> None:
    inputs = {"image": torch.randn(2, 3, 8, 8)}
    model = Products().eval()
    assert count(fixed(model, inputs)) == counted_by_torch(model, inputs)


@pytest.mark.parametrize("build", [lambda: Encoder(), lambda: Encoder(kind="written"), SequenceFirst])
def test_a_rewritten_graph_counts_as_what_it_runs(build: Any) -> None:
    inputs = {"image": patches()}
    captured = fixed(seeded(build), inputs)
    assert count(captured) == counted_by_torch(captured.module, inputs)
    first = mfcompile.find_token_sites(captured).sites[0]
    fewer = mfcompile.prune_tokens(captured, {first.name: 4})
    assert count(fewer) == counted_by_torch(fewer.module, inputs)
    assert count(fewer) < count(captured)


@pytest.mark.parametrize("family", [clip_like, blip_like, llava_like])
def test_a_model_of_transformers_without_some_tokens_and_units_counts_as_what_it_runs(family: Any) -> None:
    model, inputs = family()
    captured = fixed(model, inputs)
    assert count(captured) == counted_by_torch(model, inputs)
    first = {site.region: site.name for site in reversed(mfcompile.find_token_sites(captured).sites)}
    fewer = mfcompile.prune_tokens(captured, dict.fromkeys(first.values(), 0.5))
    smaller = mfcompile.remove_units(fewer, some_of(mfcompile.find_units(fewer)))
    assert len(first) > 1
    assert count(fewer) == counted_by_torch(fewer.module, inputs)
    assert count(smaller) == counted_by_torch(smaller.module, inputs)
    assert count(smaller) < count(fewer) < count(captured)
    assert smaller.exported is not None
    assert not count_flops(smaller.exported.program).uncounted


def test_the_saving_is_that_of_the_shorter_layers() -> None:
    captured = fixed(seeded(Encoder), {"image": patches()})
    assert captured.exported is not None
    fewer = mfcompile.prune_tokens(captured, {"blocks.0.attention": 5})
    assert fewer.exported is not None
    before, after = count_flops(captured.exported.program), count_flops(fewer.exported.program)
    assert after.below("blocks.1.up") * 10 == before.below("blocks.1.up") * 5
    assert before.below("blocks") == before.total
    assert after.below("blocks.0.attention") == before.below("blocks.0.attention")
    assert after.by_module["blocks.0"] == 2 * 3 * 2 * 10 * 10 * 8  # q k' once more, for 3 samples and 2 heads of 8


def test_products_are_known_by_their_weights() -> None:
    inputs = {"image": patches()}
    captured = fixed(seeded(Encoder), inputs)
    assert captured.exported is not None
    found = count_flops(captured.exported.program)
    samples, tokens, width = 3, 10, 16
    sizes = {name: parameter.numel() for name, parameter in captured.module.named_parameters() if parameter.ndim == 2}
    for name in ("blocks.0.attention.query.weight", "blocks.1.up.weight", "blocks.1.down.weight"):
        assert found.by_weight[name] == 2 * samples * tokens * sizes[name]
    attentions = 2 * (2 * 2 * samples * tokens * tokens * width)  # of two blocks, two products each, which read no weight
    assert sum(found.by_weight.values()) == found.total - attentions
