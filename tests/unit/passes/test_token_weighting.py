"""Norms weighted by tokens: CLIP-, BLIP- and LLaVA-like models against NumPy, and the properties of Eq. 4 of CoMP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.passes.reduction import weighted_norms
from mfcompile.passes.token_weighting import token_weights
from mfcompile.passes.unit_scores import unit_scores
from tests.token_models import (
    PAD,
    Attention,
    Batch,
    Block,
    Encoder,
    SequenceFirst,
    blip_like,
    clip_like,
    fixed,
    llava_like,
    patches,
)
from tests.token_weighting_reference import Array, Heard, rotate, split_heads, token_scores, weighted_norm

CLOSE = 2e-5
"""Relative: float32 attention and activations against float64 on the same float32 layers."""


def norms_of(model: nn.Module, batches: Sequence[Any], example: Any = None, targets: Any = None) -> dict[str, Array]:
    captured = mfcompile.capture(model, batches[0] if example is None else example)
    regions = mfcompile.infer_regions(captured, targets=targets)
    statistics = mfcompile.calibrate(captured, list(batches), regions=regions, weighting="cip")
    assert statistics.weighting == "cip"
    return {name: site.input_norm().numpy() for name, site in statistics.sites.items() if site.weighting == "cip"}


def assert_equal(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert set(found) == set(wanted)
    for name, norm in wanted.items():
        np.testing.assert_allclose(found[name], norm, rtol=CLOSE, err_msg=name)


def rows(batch: Batch, chosen: slice) -> Batch:
    return {name: tensor[chosen] for name, tensor in batch.items()}


def clip_reference(model: Any, batch: Batch) -> dict[str, Array]:
    heard = Heard(model, batch)
    words = batch["input_ids"].numpy()
    real = batch["attention_mask"].numpy().astype(bool)
    wanted = {}
    for tower, layers in (("vision_model", 3), ("text_model", 2)):
        tokens = 17 if tower == "vision_model" else words.shape[1]
        mask = np.ones((2, tokens), bool) if tower == "vision_model" else real
        seen = np.repeat(mask[:, None], tokens, 1)
        seen = seen & np.tril(np.ones((tokens, tokens), bool)) if tower == "text_model" else seen
        read = np.zeros(2, np.int64) if tower == "vision_model" else words.argmax(1)
        paths = [f"{tower}.encoder.layers.{layer}" for layer in range(layers)]
        scores = []
        for path in paths:
            query, key = (split_heads(heard.one(f"{path}.self_attn.{part}_proj"), 4) for part in "qk")
            scores.append(token_scores(query, key, seen))
        for layer, path in enumerate(paths):
            own, following = scores[layer], scores[min(layer + 1, layers - 1)]
            reads = {f"{path}.self_attn.{part}": own for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
            reads |= {f"{path}.mlp.{part}": following for part in ("fc1", "fc2")}
            for name, score in reads.items():
                wanted[f"{name}.weight"] = weighted_norm(heard.given[name][0], score, read, mask)
    return wanted


def blip_reference(model: Any, batch: Batch) -> dict[str, Array]:
    heard = Heard(model, batch)
    real = batch["attention_mask"].numpy().astype(bool)
    wanted, scores = {}, []
    for layer in range(2):  # of the image: no token is read alone, all of them are attended to
        fused = heard.one(f"vision_model.encoder.layers.{layer}.self_attn.qkv")
        query, key = (split_heads(part, 4) for part in np.split(fused, 3, axis=-1)[:2])
        scores.append(token_scores(query, key, np.ones((2, 17, 17), bool)))
    for layer in range(2):
        path = f"vision_model.encoder.layers.{layer}"
        reads = {"self_attn.qkv": layer, "self_attn.projection": layer, "mlp.fc1": 1, "mlp.fc2": 1}
        for name, at in reads.items():
            wanted[f"{path}.{name}.weight"] = weighted_norm(heard.given[f"{path}.{name}"][0], scores[at])
    own, crossed = [], []
    paths = [f"text_encoder.encoder.layer.{layer}" for layer in range(2)]
    for path in paths:
        parts = [split_heads(heard.one(f"{path}.attention.self.{part}"), 4) for part in ("query", "key")]
        own.append(token_scores(parts[0], parts[1], np.repeat(real[:, None], 10, 1)))
        parts = [split_heads(heard.one(f"{path}.crossattention.self.{part}"), 4) for part in ("query", "key")]
        queries = [parts[0][b : b + 1, :, real[b]] for b in range(2)]  # padding pays nothing
        every = [
            token_scores(queries[b], parts[1][b : b + 1], np.ones((1, int(real[b].sum()), 17), bool), is_self=False)
            for b in range(2)
        ]
        crossed.append(np.concatenate(every))
    read = np.zeros(2, np.int64)
    for layer, path in enumerate(paths):
        text = {f"attention.self.{part}": own[layer] for part in ("query", "key", "value")}
        text |= {"attention.output.dense": own[layer], "crossattention.self.query": own[1]}
        text |= {"crossattention.output.dense": own[1], "intermediate.dense": own[1], "output.dense": own[1]}
        for name, score in text.items():
            wanted[f"{path}.{name}.weight"] = weighted_norm(heard.given[f"{path}.{name}"][0], score, read, real)
        for part in ("key", "value"):
            name = f"{path}.crossattention.self.{part}"
            wanted[f"{name}.weight"] = weighted_norm(heard.given[name][0], crossed[layer])
    return wanted


def llava_reference(model: Any, batch: Batch) -> dict[str, Array]:
    heard = Heard(model, batch)
    wanted: dict[str, Array] = {}
    scores = []
    paths = [f"model.vision_tower.encoder.layers.{layer}" for layer in range(2)]
    for path in paths:
        query, key = (split_heads(heard.one(f"{path}.self_attn.{part}_proj"), 4) for part in "qk")
        scores.append(token_scores(query, key, np.ones((2, 17, 17), bool)))
    for layer, path in enumerate(paths):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            score = scores[layer if part.startswith("self") else 1]
            wanted[f"{path}.{part}.weight"] = weighted_norm(heard.given[f"{path}.{part}"][0], score)
    real = batch["attention_mask"].numpy().astype(bool)
    seen = np.repeat(real[:, None], 24, 1) & np.tril(np.ones((24, 24), bool))
    cos, sin = heard.gave["model.language_model.rotary_emb"][0]
    cos, sin = (np.repeat(table, 2 // len(table), 0) for table in (cos, sin))
    paths, scores = [f"model.language_model.layers.{layer}" for layer in range(3)], []
    for path in paths:
        query = rotate(split_heads(heard.one(f"{path}.self_attn.q_proj"), 4), cos, sin)
        key = rotate(split_heads(heard.one(f"{path}.self_attn.k_proj"), 2), cos, sin).repeat(2, axis=1)
        scores.append(token_scores(query, key, seen))
    for layer, path in enumerate(paths):
        reads = {f"self_attn.{part}_proj": scores[layer] for part in "qkvo"}
        reads |= {f"mlp.{part}_proj": scores[min(layer + 1, 2)] for part in ("gate", "up", "down")}
        for name, score in reads.items():
            wanted[f"{path}.{name}.weight"] = weighted_norm(heard.given[f"{path}.{name}"][0], score, None, real)
    return wanted


@dataclass(frozen=True)
class Family:
    make: Any
    reference: Any


FAMILIES = {
    "clip": Family(clip_like, clip_reference),
    "blip": Family(blip_like, blip_reference),
    "llava": Family(llava_like, llava_reference),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_those_of_eq_4(name: str) -> None:
    model, batch = FAMILIES[name].make()
    assert_equal(norms_of(model, [batch]), FAMILIES[name].reference(model, batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_change_nothing(name: str) -> None:
    model, batch = FAMILIES[name].make()
    whole = norms_of(model, [batch])
    assert_equal(norms_of(model, [rows(batch, slice(0, 1)), rows(batch, slice(1, 2))], example=batch), whole)


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_padding_counts_nothing(name: str) -> None:
    model, batch = FAMILIES[name].make()
    longer = dict(batch)
    longer["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 3), value=PAD)
    longer["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=0)
    assert_equal(norms_of(model, [longer]), norms_of(model, [batch]))


def test_padding_on_the_left_counts_nothing() -> None:
    model, batch = llava_like()
    longer = dict(batch)
    longer["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (3, 0), value=PAD)
    longer["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (3, 0), value=0)
    # Rotary positions count from the first place: the scores of a pair depend on its distance alone.
    assert_equal(norms_of(model, [longer]), norms_of(model, [batch]))


class Blind(Encoder):
    """Queries that ask nothing: attention is uniform."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for block in self.blocks:
            nn.init.zeros_(block.attention.query.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(block.attention.query.bias)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Channels:
    name: str
    count: int
    output_weight: str

    def columns(self, element: int) -> Sequence[int]:
        return (element,)


def test_uniform_scores_rank_like_plain_norms() -> None:
    torch.manual_seed(0)
    model, image = Blind(cls=False, pool="mean").eval(), patches(1)
    captured = mfcompile.capture(model, image)
    plain = mfcompile.calibrate(captured, [image])
    weighted = mfcompile.calibrate(captured, [image], weighting="cip")
    assert {site.weighting for site in weighted.sites.values()} == {"cip"}
    for name, site in plain.sites.items():
        torch.testing.assert_close(weighted.sites[name].input_norm() * 9**0.5, site.input_norm(), rtol=1e-6, atol=0.0)
    units = [Channels(f"{index}", 32, f"blocks.{index}.down.weight") for index in range(2)]
    weights = {unit.output_weight: captured.parameter(unit.output_weight) for unit in units}
    for unit in units:
        scores = [
            unit_scores([unit], weights, {name: site.input_norm() for name, site in found.sites.items()})[unit.name]
            for found in (plain, weighted)
        ]
        assert torch.equal(scores[0].argsort(), scores[1].argsort())


class Looking(nn.Module):
    """One block without norms; how much a token is looked at depends on its first feature alone."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        with torch.no_grad():
            self.query.weight.zero_()
            self.query.bias.fill_(1.0)
            self.key.weight.zero_()
            self.key.weight[:, 0] = 1.0

    def forward(self, image: Tensor) -> Tensor:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *(layer(image)[:, None] for layer in (self.query, self.key, self.value))
        )
        states = image + self.out(mixed[:, 0])
        result: Tensor = (states + self.down(torch.relu(self.up(states)))).mean(1)
        return result


def test_a_token_of_score_zero_changes_nothing() -> None:
    torch.manual_seed(0)
    model, image = Looking().eval(), patches(2, 6, 8)
    image[:, 4, 0] = -1000.0
    other = image.clone()
    other[:, 4, 1:] = 50.0
    captured = mfcompile.capture(model, image)
    options: dict[str, Any] = {"regions": mfcompile.infer_regions(captured, targets=["*"])}
    one, two = (mfcompile.calibrate(captured, [item], weighting="cip", **options) for item in (image, other))
    assert len(one.sites) == 6
    for name in one.sites:
        assert torch.equal(one.sites[name].input_norm(), two.sites[name].input_norm()), name
    plain = [mfcompile.calibrate(captured, [item], **options).sites["down.weight"].input_norm() for item in (image, other)]
    assert not torch.allclose(plain[0], plain[1])


def test_weights_of_eq_4() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0, 0.0], [1.0, 1.0, 1.0, 9.0]])
    is_read = torch.tensor([[True, False, False, False], [False, True, False, False]])
    keep = torch.tensor([[True] * 4, [True, True, True, False]])
    found = token_weights(scores, is_read, keep)
    assert torch.equal(found, torch.tensor([[1.0, 0.25, 0.75, 0.0], [0.5, 1.0, 0.5, 0.0]]))
    assert torch.equal(token_weights(torch.zeros(1, 2), torch.tensor([[True, False]]), None), torch.tensor([[1.0, 0.0]]))
    infinite = torch.tensor([[[1.0], [float("inf")]]])
    assert weighted_norms(infinite, torch.tensor([[4.0, 0.0]]), torch.ones(1, dtype=torch.bool)).norms.tolist() == [[2.0]]


def test_the_next_attention_scores_the_tokens_of_an_mlp() -> None:
    torch.manual_seed(0)
    model, image = Encoder(layers=3).eval(), patches(2)
    before = norms_of(model, [image])
    with torch.no_grad():
        model.blocks[1].attention.query.weight.mul_(20.0)  # type: ignore[union-attr, operator]
    after = norms_of(model, [image])
    first = {name: norm for name, norm in before.items() if name.startswith("blocks.0.")}
    changed = {name for name, norm in first.items() if not np.allclose(norm, after[name], rtol=1e-6)}
    assert changed == {"blocks.0.up.weight", "blocks.0.down.weight"}


class Crossed(nn.Module):
    """Learned queries that attend to themselves, then to as many image tokens, of which some are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 6, 16))
        self.blocks = nn.ModuleList([Block(16, 2) for _ in range(2)])
        self.look = Attention(16, 2)

    def forward(self, image: Tensor, image_mask: Tensor) -> Tensor:
        states = self.blocks[0](self.queries.expand(image.shape[0], -1, -1))
        states = states + self.look(states, image_mask[:, None, None, :], context=image)
        result: Tensor = self.blocks[1](states).mean(1)
        return result


def test_masked_cross_attention_of_as_many_queries() -> None:
    torch.manual_seed(0)
    model, image = Crossed().eval(), patches(3, 6)
    seen = torch.ones(3, 6, dtype=torch.bool)
    seen[1, 4:], seen[2, :2] = False, False
    found = norms_of(model, [{"image": image, "image_mask": seen}], targets=["*"])
    assert {f"look.{name}.weight" for name in ("query", "key", "value", "out")} <= set(found)
    heard = Heard(model, {"image": image, "image_mask": seen})
    query, key = (split_heads(heard.one(f"look.{name}"), 2) for name in ("query", "key"))
    score = token_scores(query, key, np.repeat(seen.numpy()[:, None], 6, 1), is_self=False)
    wanted = weighted_norm(image.double().numpy(), score)
    for name in ("key", "value"):
        np.testing.assert_allclose(found[f"look.{name}.weight"], wanted, rtol=CLOSE)
    query, key = (split_heads(heard.one(f"blocks.1.attention.{name}"), 2) for name in ("query", "key"))
    following = token_scores(query, key, np.ones((3, 6, 6), bool))
    for name in ("look.query", "look.out", "blocks.0.up"):  # the query side, and learned queries, which no input makes
        rows = heard.given[name][0]
        np.testing.assert_allclose(found[f"{name}.weight"], weighted_norm(rows, following), rtol=CLOSE)


@pytest.mark.parametrize("rest", ["drop", "merge"])
def test_a_token_that_is_read_behind_cuts_is_known_before_them(rest: str) -> None:
    torch.manual_seed(0)
    model, image = Encoder(layers=3).eval(), patches(3)
    captured = fixed(model, {"image": image})
    fewer = mfcompile.prune_tokens(captured, {"blocks.0.attention": 5, "blocks.1.attention": 3}, rest=rest)
    found, whole = (
        {name: site.input_norm() for name, site in mfcompile.calibrate(item, weighting="cip").sites.items()}
        for item in (fewer, captured)
    )
    for part in ("query", "key", "value", "out"):
        name = f"blocks.0.attention.{part}.weight"
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=0.0)
    assert not torch.allclose(found["blocks.0.up.weight"], whole["blocks.0.up.weight"], rtol=1e-3)


def test_streams_that_put_tokens_first() -> None:
    torch.manual_seed(0)
    model, image = SequenceFirst().eval(), patches(3)
    found = norms_of(model, [image], targets=["*"])
    heard = Heard(model, {"image": image})
    states = heard.given["mlps.1"][0].transpose(1, 0, 2)
    parts = np.split(heard.one("projections.1"), 3, axis=-1)[:2]
    query, key = (split_heads(part.transpose(1, 0, 2), 2) for part in parts)
    score = token_scores(query, key, np.ones((3, 9, 9), bool))
    np.testing.assert_allclose(found["mlps.1.weight"], weighted_norm(states, score), rtol=CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_a_sample_at_a_time_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = FAMILIES[name].make()
    whole = norms_of(model, [batch])
    monkeypatch.setattr("mfcompile.passes.token_weighting._LOGITS_AT_A_TIME", 1)
    assert_equal(norms_of(model, [batch]), whole)
