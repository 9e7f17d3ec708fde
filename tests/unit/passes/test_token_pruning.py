"""What token pruning promises, on models written by hand that no pass has seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.graph import CapturedGraph
from tests.token_models import Block, Encoder, Joint, SequenceFirst, fixed, patches, seeded
from tests.token_reference import attention_weights, choose, heads_of, pick, received, restored

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}


@cache
def encoder(**options: Any) -> tuple[Any, CapturedGraph]:
    """A model that no test changes, exported once."""
    model = seeded(lambda: Encoder(**options))
    return model, fixed(model, {"image": patches()})


@cache
def numbered() -> CapturedGraph:
    """``Positions``, exported once."""
    return fixed(seeded(Positions), {"image": patches()})


@cache
def joint(kind: str) -> CapturedGraph:
    """``Joint`` without padding, exported once."""
    return fixed(seeded(lambda: Joint(kind=kind)), joint_inputs())


def pruned(model: nn.Module, keep: Mapping[str, int | float], inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """The module with tokens cut."""
    return mfcompile.prune_tokens(fixed(model, inputs), keep, **options).module


def cut(captured: CapturedGraph, keep: Mapping[str, int | float], **options: Any) -> Any:
    """The module of a captured model with tokens cut."""
    return mfcompile.prune_tokens(captured, keep, **options).module


def reference(model: Any, image: Tensor, keep: Mapping[int, int]) -> tuple[Tensor, list[Tensor]]:
    """States in front of the final norm, and the kept positions of each cut."""
    states, cuts = model.embed(image), []
    first = 0 if model.cls is None else 1
    for number, block in enumerate(model.blocks):
        normed, attention = block.norms[0](states), block.attention
        query, key = (heads_of(item(normed), attention.heads) for item in (attention.query, attention.key))
        states = block.attend(states)
        if number in keep:
            seen = None
            if attention.kind == "causal":
                seen = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril().expand(len(image), -1, -1)
            score = received(attention_weights(query, key, seen))
            cuts.append(choose(score, keep[number], [list(range(first))] * len(image)))
            states = pick(states, cuts[-1])
        states = block.rest(states)
    return states, cuts


SITES = {"blocks.0.attention": 7, "blocks.1.attention": 5}


@pytest.mark.parametrize(
    ("kind", "pool"), [("fused", "cls"), ("fused", "all"), ("written", "mean"), ("causal", "all"), ("causal", "mean")]
)
def test_two_sites_equal_the_reference(kind: str, pool: str) -> None:
    model, captured = encoder(kind=kind, pool=pool)
    image = patches()
    with torch.no_grad():
        assert torch.equal(cut(captured, {"blocks.*": 10})(image), model(image))
        states, cuts = reference(model, image, {0: 7, 1: 5})
        expected = restored(model.norm(states), cuts, 10) if pool == "all" else model.read(states)
        torch.testing.assert_close(cut(captured, SITES)(image), expected, **CLOSE)
        assert not torch.allclose(model(image), expected, **CLOSE)


@pytest.mark.parametrize(
    ("width", "heads", "count", "rows"),
    [(10, 2, 9, 3), (16, 4, 3, 2), (18, 9, 8, 2), (16, 2, 9, 10), (8, 8, 7, 8), (4, 2, 3, 2)],
    ids=["width", "heads-of-4", "heads", "batch", "all-8", "all-4"],
)
def test_axes_of_one_size_are_told_apart(width: int, heads: int, count: int, rows: int) -> None:
    model = seeded(lambda: Encoder(width=width, heads=heads, patches=count, pool="all"))
    image = patches(rows, count, width)
    keep = count - 1
    found = pruned(model, {"blocks.0.attention": keep}, {"image": image})
    with torch.no_grad():
        states, cuts = reference(model, image, {0: keep})
        torch.testing.assert_close(found(image), restored(model.norm(states), cuts, count + 1), **CLOSE)


def test_tokens_in_front_and_samples_sharing_an_axis_with_heads() -> None:
    model = seeded(SequenceFirst)
    image = patches()
    captured = fixed(model, {"image": image})
    sites = mfcompile.find_token_sites(captured).sites
    assert [site.tokens for site in sites] == [9, 9]
    with torch.no_grad():
        whole = mfcompile.prune_tokens(captured, {site.name: 9 for site in sites}).module
        assert torch.equal(whole(image), model(image))
        found = mfcompile.prune_tokens(captured, {sites[0].name: 5}).module(image)
        states = image.transpose(0, 1)
        for number in range(2):
            parts = [heads_of(part.transpose(0, 1), 2) for part in model.projections[number](states).chunk(3, dim=-1)]
            mixed = attention_weights(parts[0], parts[1]) @ parts[2]
            states = states + model.outs[number](mixed.transpose(1, 2).flatten(2).transpose(0, 1))
            if number == 0:
                kept = choose(received(attention_weights(parts[0], parts[1])), 5, [[]] * 3)
                states = pick(states.transpose(0, 1), kept).transpose(0, 1)
            states = states + torch.nn.functional.gelu(model.mlps[number](states))
    torch.testing.assert_close(found, states.mean(0), **CLOSE)


def joint_inputs(padding: int = 0) -> dict[str, Tensor]:
    """Five tokens of text, padded by some more, and nine patches."""
    words = torch.arange(2, 12).reshape(2, 5)
    mask = torch.ones(2, 5 + padding, dtype=torch.long)
    mask[:, 5:] = 0
    return {
        "image": patches(2),
        "input_ids": torch.cat([words, torch.zeros(2, padding, dtype=torch.long)], 1),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("kind", ["fused", "written"])
def test_padding_changes_neither_what_is_kept_nor_the_output(kind: str) -> None:
    captured = joint(kind)
    model = captured.module
    keep = {"blocks.0.attention": 4 / 9}
    bare, padded = joint_inputs(), joint_inputs(padding=3)
    with torch.no_grad():
        found = cut(captured, keep)(**bare)
        torch.testing.assert_close(pruned(model, keep, padded)(**padded), found, **CLOSE)
        assert not torch.allclose(found, model(**bare), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "scorer"),
    [("fused", "cit"), ("fused", "last_token"), ("fused", "norm"), ("written", "cit"), ("written", "random")],
)
def test_a_sample_that_is_masked_altogether_gives_no_nan_to_the_others(kind: str, scorer: str) -> None:
    batch = joint_inputs()
    clean = cut(joint(kind), {"blocks.0.attention": 9}, scorer=scorer)
    batch["attention_mask"][1] = 0  # text of the second sample is all padding
    with torch.no_grad():
        both = clean(**batch)
        first = clean(**{name: tensor[[0, 0]] for name, tensor in batch.items()})
    assert torch.isfinite(both[0]).all()
    torch.testing.assert_close(both[0], first[0], **CLOSE)


@pytest.mark.parametrize("scorer", ["cit", "cls_attention", "last_token"])
def test_samples_do_not_depend_on_their_batch(scorer: str) -> None:
    found = cut(encoder()[1], SITES, scorer=scorer)
    image = patches(4, seed=3)
    with torch.no_grad():
        together = found(image)
        for row in range(4):
            torch.testing.assert_close(found(image[row : row + 1].repeat(2, 1, 1))[0], together[row], **CLOSE)


@pytest.mark.parametrize("scorer", ["cit", "norm"])
def test_the_order_of_patches_does_not_matter(scorer: str) -> None:
    model = seeded(Encoder)
    image, order = patches(), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    found = pruned(model, SITES, {"image": image}, scorer=scorer)
    with torch.no_grad():
        before = found(image)
        places = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
        model.positions.copy_(model.positions[:, places])
        torch.testing.assert_close(found(image[:, order]), before, **CLOSE)


class Positions(nn.Module):
    """Gives the numbers of the tokens that are left, as a side input of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(pool="all")
        self.register_buffer("numbers", torch.arange(10.0)[None, :, None])

    def forward(self, image: Tensor) -> Tensor:
        states = self.encoder.embed(image)
        states = self.encoder.blocks[0](states)
        result: Tensor = self.encoder.blocks[1](states) * 0 + self.numbers + 1
        return result


@pytest.mark.parametrize("scorer", ["cit", "norm", "random"])
def test_kept_positions_are_ascending_unique_and_hold_the_protected_ones(scorer: str) -> None:
    module = cut(numbered(), {"encoder.blocks.0.attention": 6}, scorer=scorer)
    with torch.no_grad():
        found = torch.cat([module(patches(seed=seed) * 10)[..., 0] for seed in range(4)])
    for row in found:
        kept = row[row > 0]
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == 6
        assert kept[0] == 1  # CLS, the first of the tokens
        assert all(row[int(number) - 1] == number for number in kept)  # each at its old place


class InPlace(Encoder):
    """Writes its residual adds into the stream."""

    def forward(self, image: Tensor) -> Tensor:
        states = self.embed(image).clone()
        blocks: Any = self.blocks
        for block in blocks:
            states += block.attention(block.norms[0](states))
            states += block.down(torch.relu_(block.up(block.norms[1](states))))
        return self.read(states)


def test_streams_that_are_written_in_place() -> None:
    model, image = seeded(InPlace), patches()
    captured = fixed(model, {"image": image})
    with torch.no_grad():
        assert torch.equal(cut(captured, {"blocks.*": 10})(image), model(image))
        states = model.embed(image)
        for number, block in enumerate(model.blocks):
            normed = block.norms[0](states)
            query, key = (heads_of(item(normed), 2) for item in (block.attention.query, block.attention.key))
            states = block.attend(states)
            if number == 0:
                states = pick(states, choose(received(attention_weights(query, key)), 5, [[0]] * 3))
            states = states + block.down(torch.relu(block.up(block.norms[1](states))))
        torch.testing.assert_close(cut(captured, {"blocks.0.attention": 5})(image), model.read(states), **CLOSE)


class Joined(nn.Module):
    """Two streams that are added, and a read of the first token of what a third block makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = (Block(16, 2) for _ in range(3))

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.both(self.left(image) + self.right(image))[:, 0]
        return result


def test_a_read_behind_another_cut_is_protected_too() -> None:
    model, image = seeded(Joined), patches()
    image[:, 0] *= 0.01  # the norm alone would drop what is read
    keep = {"left.attention": 4, "right.attention": 3}
    found = pruned(model, keep, {"image": image}, scorer="norm")
    with torch.no_grad():
        streams = {}
        for name, count in (("left", 4), ("right", 3)):
            block = getattr(model, name)
            states = block.attend(image)
            kept = choose(states.norm(dim=-1), count, [[0]] * 3)
            streams[name] = (block.rest(pick(states, kept)), kept)
        right = pick(restored(streams["right"][0], [streams["right"][1]], 9), streams["left"][1])
        expected = model.both(streams["left"][0] + right)[:, 0]
    torch.testing.assert_close(found(image), expected, **CLOSE)


def test_equal_scores_keep_the_first() -> None:
    with torch.no_grad():
        found = cut(numbered(), {"encoder.blocks.0.attention": 4}, scorer=lambda evidence: evidence.valid.float())(patches())
    assert found[0, :, 0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("scorer", ["cls_attention", "last_token", "norm"])
def test_scorers_rank_as_their_formulas(scorer: str) -> None:
    captured = numbered()
    model: Any = captured.module
    image = patches()
    with torch.no_grad():
        found = cut(captured, {"encoder.blocks.0.attention": 5}, scorer=scorer)(image)[..., 0]
        block = model.encoder.blocks[0]
        states = model.encoder.embed(image)
        normed = block.norms[0](states)
        query, key = (heads_of(item(normed), 2) for item in (block.attention.query, block.attention.key))
        weights = attention_weights(query, key).mean(1)
        score = {
            "cls_attention": weights[:, 0],
            "last_token": weights[:, -1],
            "norm": block.attend(states).norm(dim=-1),
        }[scorer]
        kept = choose(score, 5, [[0]] * 3)
    assert [row[row > 0].int().tolist() for row in found] == (kept + 1).tolist()


def test_attention_received_takes_the_largest_over_heads() -> None:
    model = seeded(lambda: Encoder(heads=8, pool="all"), scale=2.0)
    image = patches(8, seed=1)
    with torch.no_grad():
        found = pruned(model, {"blocks.0.attention": 5}, {"image": image})(image)
        block, states = model.blocks[0], model.embed(image)
        normed = block.norms[0](states)
        weights = attention_weights(*(heads_of(item(normed), 8) for item in (block.attention.query, block.attention.key)))
        kept, by_mean = (choose(score, 5, [[0]] * 8) for score in (received(weights), weights.mean(1).sum(1)))
    assert not torch.equal(kept, by_mean)  # else this would be no test of it
    assert [row.nonzero().flatten().tolist() for row in found.abs().sum(-1)] == kept.tolist()


def test_random_scores_follow_their_seed() -> None:
    from mfcompile.passes.token_scores import RandomScore

    image = patches()
    keep = {"encoder.blocks.0.attention": 5}
    with torch.no_grad():
        first, again, other = (cut(numbered(), keep, scorer=RandomScore(seed))(image)[0, :, 0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_rest_is_merged_into_one_token() -> None:
    model, captured = encoder(pool="max")
    image = patches()
    found = cut(captured, {"blocks.0.attention": 4}, rest="merge")
    with torch.no_grad():
        states = model.embed(image)
        block = model.blocks[0]
        normed = block.norms[0](states)
        query, key = (heads_of(item(normed), 2) for item in (block.attention.query, block.attention.key))
        score = received(attention_weights(query, key))
        states = block.attend(states)
        kept = choose(score, 4, [[0]] * 3)
        rows = []
        for sample in range(3):
            rest = [token for token in range(10) if token not in kept[sample]]
            weights = score[sample, rest] / score[sample, rest].sum()
            rows.append((weights[:, None] * states[sample, rest]).sum(0))
        states = torch.cat([pick(states, kept), torch.stack(rows)[:, None]], dim=1)
        states = model.blocks[1](block.rest(states))
        torch.testing.assert_close(found(image), model.read(states), **CLOSE)
        whole = cut(captured, {"blocks.0.attention": 10}, rest="merge")
        assert torch.equal(whole(image), model(image))


def test_merged_tokens_are_gone_where_all_places_are_read() -> None:
    _, captured = encoder(kind="fused", pool="all")
    with torch.no_grad():
        found = cut(captured, {"blocks.0.attention": 6}, rest="merge")(patches())
    assert found.shape == (3, 10, 16)
    assert int((found.abs().sum(-1) == 0).sum()) == 3 * 4


def test_the_last_state_stands_where_a_token_was_dropped() -> None:
    model = seeded(lambda: Encoder(pool="all"))
    model.norm = nn.Identity()
    image = patches()
    with torch.no_grad():
        captured = fixed(model, {"image": image})
        found = cut(captured, {"blocks.0.attention": 6}, restore="last")(image)
        dropped = cut(captured, {"blocks.0.attention": 6})(image).abs().sum(-1) == 0
        at_the_cut = model.blocks[0].attend(model.embed(image))
    assert int(dropped.sum()) == 3 * 4
    torch.testing.assert_close(found[dropped], at_the_cut[dropped])


def test_a_map_of_all_places_is_restored() -> None:
    model = seeded(lambda: Encoder(pool="grid", cls=False))
    image = patches()
    with torch.no_grad():
        found = pruned(model, {"blocks.0.attention": 4}, {"image": image})(image)
        states, cuts = reference(model, image, {0: 4})
        expected = restored(model.norm(states), cuts, 9).view(3, 3, 3, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_given_model_stays_as_it_is() -> None:
    model, captured = encoder()
    assert captured.exported is not None
    before, text = {name: tensor.clone() for name, tensor in model.state_dict().items()}, str(captured.exported.program.graph)
    fewer = mfcompile.prune_tokens(captured, SITES)
    assert str(captured.exported.program.graph) == text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    own = dict(fewer.module.named_parameters())
    assert all(own[name].data_ptr() == parameter.data_ptr() for name, parameter in model.named_parameters())
