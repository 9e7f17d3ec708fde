"""What token pruning promises of any model, on CLIP-, BLIP- and LLaVA-like ones of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import output_tensors
from tests.token_models import EOS, IMAGE, PAD, Batch, blip_like, clip_like, fixed, ids, llava_like, pixels

CLOSE: Any = {"rtol": 1e-4, "atol": 2e-5}
"""Sums over other numbers of samples or tokens are ordered otherwise."""

FAMILIES = {"clip": clip_like, "blip": blip_like, "llava": llava_like}

KEEP = {
    "clip": {
        "vision_model.encoder.layers.0.self_attn": 11, "vision_model.encoder.layers.1.self_attn": 6,
        "text_model.encoder.layers.0.self_attn": 7, "text_model.encoder.layers.1.self_attn": 4,
    },
    "blip": {
        "vision_model.encoder.layers.0.self_attn": 9, "text_encoder.encoder.layer.0.attention.self": 6,
        "text_encoder.encoder.layer.1.attention.self": 4,
    },
    "llava": {
        "model.vision_tower.encoder.layers.0.self_attn": 11, "model.language_model.layers.0.self_attn": 17,
        "model.language_model.layers.1.self_attn": 12,
    },
}  # fmt: skip


@cache
def built(name: str) -> tuple[Any, Batch, CapturedGraph]:
    """A model that no test changes, exported once."""
    model, batch = FAMILIES[name]()
    return model, batch, fixed(model, batch)


@cache
def listing(name: str, scorer: str = "cit") -> Any:
    """The module with tokens cut in every part, which says what it kept where an output lists tokens."""
    return mfcompile.prune_tokens(built(name)[2], KEEP[name], outputs="shorter", scorer=scorer).module


def run(module: Any, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return output_tensors(module(**batch))


def by_sample(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what compares samples with each other, and without images that samples share."""
    return {name: value for name, value in outputs.items() if not name.startswith(("logits_per", "image_hidden"))}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_every_token_at_any_set_of_sites_changes_no_bit(name: str, seed: int) -> None:
    model, batch, captured = built(name)
    sites = mfcompile.find_token_sites(captured).sites
    chosen = torch.randperm(len(sites), generator=torch.Generator().manual_seed(seed))[: len(sites) // 2].tolist()
    found = run(mfcompile.prune_tokens(captured, {sites[at].name: sites[at].tokens for at in chosen}).module, batch)
    for output, value in run(model, batch).items():
        assert torch.equal(found[output], value), output


def random_batch(name: str, seed: int) -> Batch:
    """Other words, images and padding; EOS and image tokens at other places."""
    _, batch, _ = built(name)
    rows, length = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(seed)
    words = ids(rows, length, seed)
    for row in words:
        if name == "llava":
            padding, start = torch.randint(0, 5, (2,), generator=generator).tolist()
            row[:padding] = PAD
            row[padding + start : padding + start + 16] = IMAGE
        else:
            end = int(torch.randint(4 if name == "clip" else 6, length, (1,), generator=generator))
            row[end], row[end + 1 :] = EOS, PAD
    return {"input_ids": words, "attention_mask": (words != PAD).long(), "pixel_values": pixels(rows, seed)}


def protected(name: str, output: str, words: Tensor) -> set[int]:
    """Places that have to stay: CLS, EOS, and what is no image in a decoder."""
    if output.startswith("text_model"):
        return {int((words == EOS).nonzero()[0])}
    return set((words != IMAGE).nonzero().flatten().tolist()) if name == "llava" else {0}


@pytest.mark.parametrize("scorer", ["cit", "random"])
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_positions_are_ascending_in_range_and_hold_what_is_protected_whatever_comes_in(name: str, scorer: str) -> None:
    counts = {
        "clip": {"text_model_output.last_hidden_state_kept": 4, "vision_model_output.last_hidden_state_kept": 6},
        "blip": {"last_hidden_state_kept": 9, "question_embeds_kept": 4},
        "llava": {"logits_kept": 12},
    }
    module, seen = listing(name, scorer), set()
    for seed in range(6):
        batch = random_batch(name, seed)
        found = {output: value for output, value in run(module, batch).items() if output.endswith("_kept")}
        assert {output: value.shape[1] for output, value in found.items()} == counts[name]
        for output, value in found.items():
            tokens = 17 if output in {"vision_model_output.last_hidden_state_kept", "last_hidden_state_kept"} else None
            assert bool((value.diff(dim=1) > 0).all())  # ascending, so that none is there twice
            assert int(value.min()) >= 0
            assert int(value.max()) < (tokens or batch["input_ids"].shape[1])
            for row, words in zip(value.tolist(), batch["input_ids"], strict=True):
                assert protected(name, output, words) <= set(row)
                seen.add(tuple(row))
    assert len(seen) > 2  # not the same places for all


@contextmanager
def permuted_positions(model: nn.Module, order: Tensor) -> Iterator[None]:
    """Position embeddings of patches in another order, CLS first."""
    name = next(name for name, _ in model.named_parameters() if "vision" in name and "position_embedding" in name)
    table = model.get_parameter(name)
    before = table.detach().clone()
    places = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    try:
        with torch.no_grad():
            table.copy_(before.index_select(table.ndim - 2, places))
        yield
    finally:
        with torch.no_grad():
            table.copy_(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_of_patches_does_not_matter_to_an_image_encoder(name: str) -> None:
    model, batch, captured = built(name)
    module = mfcompile.prune_tokens(captured, {site: kept for site, kept in KEEP[name].items() if "vision" in site}).module
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    squares = F.unfold(batch["pixel_values"], 8, stride=8)[:, :, order]
    moved = {**batch, "pixel_values": F.fold(squares, 32, 8, stride=8)}
    before, changed = run(module, batch), run(module, moved)
    with permuted_positions(model, order):
        after = run(module, moved)
    read = {"clip": "image_embeds", "blip": "itm_score", "llava": "image_hidden_states"}[name]
    if name == "llava":  # one row for each patch: they change places as the patches did
        before[read] = before[read].view(2, 16, -1)[:, order].flatten(0, 1)
    torch.testing.assert_close(after[read], before[read], **CLOSE)
    assert not torch.allclose(changed[read], before[read], **CLOSE)  # it is the positions that make up for it
    if name != "llava":  # dropped patches are zero: the same ones stay, each at its new place
        states = "last_hidden_state" if name == "blip" else "vision_model_output.last_hidden_state"
        torch.testing.assert_close(after[states][:, 1:], before[states][:, 1:][:, order], **CLOSE)


def padded(name: str, batch: Batch) -> Batch:
    """Three more tokens that the mask leaves out, whatever they say: behind the text, in a decoder in front."""
    rows, sides = len(batch["input_ids"]), (3, 0) if name == "llava" else (0, 3)
    parts = [batch["input_ids"], ids(rows, 3, seed=5)]
    return {
        **batch,
        "input_ids": torch.cat(parts[::-1] if name == "llava" else parts, dim=1),
        "attention_mask": F.pad(batch["attention_mask"], sides),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_neither_what_is_kept_nor_outputs(name: str) -> None:
    model, batch, _ = built(name)
    more = padded(name, batch)
    keep = {site: kept + (3 if "language" in site else 0) for site, kept in KEEP[name].items()}  # what is no image stays
    longer = mfcompile.prune_tokens(fixed(model, more), keep, outputs="shorter").module
    before, after = run(listing(name), batch), run(longer, more)
    assert list(before) == list(after)
    for output, value in before.items():
        assert bool(after[output].isfinite().all()), output  # rows of padding too
        if name != "llava" or output == "image_hidden_states":
            assert value.is_floating_point() or torch.equal(after[output], value)
            torch.testing.assert_close(after[output], value, **CLOSE)
    if name == "llava":
        assert torch.equal(after["logits_kept"][:, 3:], before["logits_kept"] + 3)
        real = batch["attention_mask"].bool().gather(1, before["logits_kept"])
        assert not real.all()
        torch.testing.assert_close(after["logits"][:, 3:][real], before["logits"][real], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_of_padding_alone_gives_no_nan(name: str) -> None:
    _, batch, _ = built(name)
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    whole, found = (by_sample(run(listing(name), given)) for given in (batch, {**batch, "attention_mask": mask}))
    for output, value in found.items():
        assert bool(value.isfinite().all()), output
        torch.testing.assert_close(value[0], whole[output][0], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_samples_together_are_each_of_them_alone(name: str) -> None:
    _, batch, _ = built(name)
    module = listing(name)
    together = by_sample(run(module, batch))
    for row in range(2):
        # a LLaVA-like program is one for two images: there the sample stands beside itself
        alone = {key: value[[row, row] if name == "llava" else [row]] for key, value in batch.items()}
        for output, value in by_sample(run(module, alone)).items():
            torch.testing.assert_close(value[0], together[output][row], **CLOSE)
            assert value.is_floating_point() or torch.equal(value[0], together[output][row])
