"""Token importance without pruned heads (Eq. 7 of CoMP): which heads count, and that others flip no rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.passes.live_heads import live_heads
from mfcompile.passes.token_attention import find_attentions
from mfcompile.passes.token_scores import Cit, TokenEvidence
from mfcompile.passes.token_upstream import with_meta_tensors
from tests.token_models import Block, Encoder, SequenceFirst, blip_like, clip_like, fixed, llava_like, patches
from tests.token_weighting_reference import Heard, split_heads, token_scores, weighted_norm


def evidence(attention: Tensor, live: Tensor | None) -> TokenEvidence:
    batch, _, _, keys = attention.shape
    return TokenEvidence(attention, torch.zeros(batch, keys, 2), torch.ones(batch, keys, dtype=torch.bool), None, live)


def two_heads() -> Tensor:
    """(1, 2, 10, 10): a masked head looks at all tokens alike; of the other, token 0 gets .09 of each of ten queries, token 1
    gets .5 of one."""
    live = torch.full((10, 10), 0.0)
    live[:, 0], live[3, 1] = 0.09, 0.5
    live[:, 2] = 1.0 - live.sum(1)  # the rest of every row
    return torch.stack([torch.full((10, 10), 0.1), live])[None]


def test_a_uniform_head_flips_the_rank_of_two_tokens_and_eq_7_does_not() -> None:
    attention = two_heads()
    with_dead = Cit()(evidence(attention, None))[0]
    assert with_dead[:2].tolist() == pytest.approx([1.0, 1.4])
    without = Cit()(evidence(attention, torch.tensor([0.0, 1.0])))[0]
    assert without[:2].tolist() == pytest.approx([0.9, 0.5])
    assert torch.equal(without, Cit()(evidence(attention[:, 1:], None))[0])


def test_soft_factors_suppress_a_head_by_degrees() -> None:
    gaps = [
        float(score[0] - score[1])
        for factor in (1.0, 0.5, 0.0)
        for score in [Cit()(evidence(two_heads(), torch.tensor([factor, 1.0])))[0]]
    ]
    assert gaps[0] < 0 < gaps[2]
    assert gaps == sorted(gaps)


def heads_of(model: nn.Module, inputs: Any, samples: int) -> list[list[float] | None]:
    """Of every attention of the recorded graph, in order."""
    captured = mfcompile.capture(model, inputs)

    def value_of(node: torch.fx.Node) -> Tensor | None:
        return captured.parameter(captured.parameter_nodes[node.name]) if node.name in captured.parameter_nodes else None

    found = find_attentions(with_meta_tensors(captured).nodes, captured.parameter_nodes)
    lives = [live_heads(item, samples, value_of) for item in found]
    return [None if live is None else live.tolist() for live in lives]


def test_heads_whose_results_nothing_reads_are_dead() -> None:
    model, batch = clip_like()
    layers = model.vision_model.encoder.layers
    with torch.no_grad():
        layers[0].self_attn.out_proj.weight[:, 8:16] = 0
        layers[1].self_attn.out_proj.weight[1:, 8:16] = 0  # all but one row
        layers[2].self_attn.q_proj.weight[8:16] = 0  # it looks at all alike, but what it gives is read
    assert heads_of(model, batch, 2) == [[1.0, 0.0, 1.0, 1.0], None, None, None, None]


def test_heads_whose_values_are_zero_are_dead() -> None:
    model, batch = blip_like()
    vision, text = model.vision_model.encoder.layers, model.text_encoder.encoder.layer
    with torch.no_grad():
        vision[0].self_attn.qkv.weight[64 + 8 : 64 + 16] = 0  # rows of the values in one layer for all three
        vision[0].self_attn.qkv.bias[64 + 8 : 64 + 16] = 0
        vision[1].self_attn.qkv.weight[64 + 8 : 64 + 16] = 0
        vision[1].self_attn.qkv.bias[64 + 8 : 64 + 16] = 1  # a head that gives its bias gives something
        text[0].attention.self.value.weight[:8] = 0
        text[0].attention.self.value.bias[:8] = 0
    found = heads_of(model, batch, 2)
    assert found[:3] == [[1.0, 0.0, 1.0, 1.0], None, [0.0, 1.0, 1.0, 1.0]]
    assert found[3:] == [None, None, None]


def test_a_key_and_value_of_two_query_heads_kills_both() -> None:
    model, batch = llava_like()
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.v_proj.weight[8:16] = 0
    assert heads_of(model, batch, 2) == [None, None, None, [1.0, 1.0, 0.0, 0.0], None]


def test_samples_and_heads_in_one_axis() -> None:
    torch.manual_seed(0)
    model = SequenceFirst().eval()
    with torch.no_grad():
        dict(model.named_parameters())["outs.1.weight"][:, :8] = 0
    assert heads_of(model, patches(3), 3) == [None, [0.0, 1.0]]


class Viewing(nn.Module):
    """Its results are viewed as they lie in memory, without a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens, width = image.shape
        query, key, value = self.qkv(image).view(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        result: Tensor = image + self.out(mixed.contiguous().view(batch, tokens, width))
        return result


def test_views_of_memory_in_another_order() -> None:
    model = Viewing().eval()
    with torch.no_grad():
        model.out.weight[:, 8:] = 0
    assert heads_of(model, patches(3), 3) == [[1.0, 0.0]]


def test_an_attention_of_dead_heads_alone_keeps_its_scores() -> None:
    model = Encoder().eval()
    with torch.no_grad():
        model.blocks[0].attention.out.weight.zero_()  # type: ignore[union-attr, operator]
    assert heads_of(model, patches(), 3) == [None, None]


def masks_without_head(captured: CapturedGraph) -> MaskSet:
    """The second head of the first block masked: its queries and keys, and what is read of it."""
    bits = {}
    for name in ("query", "key", "value", "out"):
        fqn = f"blocks.0.attention.{name}.weight"
        bits[fqn] = torch.ones(captured.parameter(fqn).shape, dtype=torch.bool)
        (bits[fqn].T if name == "out" else bits[fqn])[8:] = False
    return MaskSet({fqn: PackedMask.pack(mask) for fqn, mask in bits.items()})


def kept_of(captured: CapturedGraph, image: Tensor) -> Tensor:
    """States behind the last norm, zero where tokens are gone."""
    with torch.no_grad():
        result: Tensor = captured.graph_module(image)[0]
    return result.abs().sum(-1) > 0


@pytest.fixture(scope="module")
def encoder() -> tuple[Encoder, Tensor]:
    """One block whose first head looks sharply and whose second looks at all alike once it is masked."""
    torch.manual_seed(3)
    model = Encoder(layers=1, pool="all").eval()
    with torch.no_grad():
        model.blocks[0].attention.query.weight.mul_(8)  # type: ignore[union-attr, operator]
    return model, patches(24)


def reference(model: Encoder, image: Tensor, live: list[float] | None, masked: bool) -> Tensor:
    """(samples, tokens) of the three best by Eq. 7, CLS among them."""
    block = model.get_submodule("blocks.0")
    assert isinstance(block, Block)
    with torch.no_grad():
        states = block.norms[0](model.embed(image))
        parts = []
        for layer in (block.attention.query, block.attention.key):
            weight = layer.weight.clone()
            if masked:
                weight[8:] = 0
            parts.append(nn.functional.linear(states, weight, layer.bias).double().numpy())
    query, key = (split_heads(part, 2) for part in parts)
    score = torch.from_numpy(token_scores(query, key, np.ones((len(image), 10, 10), bool), live))
    score[:, 0] = float("inf")
    best = score.topk(3, dim=1).indices
    return torch.zeros(len(image), 10, dtype=torch.bool).scatter(1, best, True)


def test_tokens_of_a_masked_model_are_chosen_without_its_dead_heads(encoder: tuple[Encoder, Tensor]) -> None:
    model, image = encoder
    captured = fixed(model, {"image": image})
    masked = mfcompile.apply_masks(captured, masks_without_head(captured))
    wanted = reference(model, image, [1.0, 0.0], masked=True)
    assert not torch.equal(wanted, reference(model, image, None, masked=True)), "the trap must be there"
    assert torch.equal(kept_of(mfcompile.prune_tokens(masked, {"blocks.0.attention": 3}), image), wanted)


def test_eq_7_is_the_score_of_the_model_without_the_head(encoder: tuple[Encoder, Tensor]) -> None:
    from mfcompile.structure import find_units, remove_units

    model, image = encoder
    captured = fixed(model, {"image": image})
    masked = mfcompile.apply_masks(captured, masks_without_head(captured))
    unit = next(item for item in find_units(captured).units if item.kind == "heads")
    smaller = remove_units(captured, {unit.name: [1]})
    one, other = (kept_of(mfcompile.prune_tokens(item, {"blocks.0.attention": 3}), image) for item in (masked, smaller))
    assert torch.equal(one, other)


def test_factors_are_taken_where_they_are_given(encoder: tuple[Encoder, Tensor]) -> None:
    model, image = encoder
    captured = fixed(model, {"image": image})
    factors = {"blocks.0.attention": torch.tensor([0.25, 1.0])}
    fewer = mfcompile.prune_tokens(captured, {"blocks.0.attention": 3}, head_factors=factors)
    wanted = reference(model, image, [0.25, 1.0], masked=False)
    assert not torch.equal(wanted, reference(model, image, None, masked=False))
    assert torch.equal(kept_of(fewer, image), wanted)
    for bad in (torch.ones(3), torch.tensor([0.5, 1.5])):
        with pytest.raises(InputError, match=r"give one factor between 0 and 1 for each of its 2 heads"):
            mfcompile.prune_tokens(captured, {"blocks.0.attention": 3}, head_factors={"blocks.0.attention": bad})
    with pytest.raises(InputError, match="head_factors names 'elsewhere', where no token is cut"):
        mfcompile.prune_tokens(captured, {"blocks.0.attention": 3}, head_factors={"elsewhere": torch.ones(2)})


def test_calibration_of_a_masked_model_leaves_dead_heads_out(encoder: tuple[Encoder, Tensor]) -> None:
    model, image = encoder
    captured = fixed(model, {"image": image})
    regions = mfcompile.infer_regions(captured)
    masked = mfcompile.apply_masks(captured, masks_without_head(captured))
    found = mfcompile.calibrate(masked, [image], regions=regions, weighting="cip").sites["blocks.0.attention.query.weight"]
    heard = Heard(model, {"image": image})
    states = heard.given["blocks.0.attention.query"][0]
    query, key = (split_heads(heard.one(f"blocks.0.attention.{name}"), 2) for name in ("query", "key"))
    live, all_alike = (token_scores(query, key, np.ones((len(image), 10, 10), bool), item) for item in ([1.0, 0.0], None))
    np.testing.assert_allclose(found.input_norm().numpy(), weighted_norm(states, live), rtol=2e-5)
    assert not np.allclose(weighted_norm(states, live), weighted_norm(states, all_alike), rtol=1e-3)
