"""The BLIP-like example: what its three passes see, what they share, that its losses can be learned."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mfcompile

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from emoji_blip.captions import score_captions, write_captions
from emoji_blip.modeling import EmojiBlip, ModelConfig
from emoji_blip.objectives import calibration_loss, next_word_loss
from emoji_xvlm.inputs import tokenize
from emoji_xvlm.scenes import calibration_batch
from emoji_xvlm.tokenizer import Tokenizer

TINY = ModelConfig(vocab_size=678, width=32, heads=2, mlp_width=64, vision_layers=1, text_layers=2, embed_dim=16)


@pytest.fixture
def model() -> EmojiBlip:
    """Weights so large that every layer changes what comes out."""
    torch.manual_seed(0)
    made = EmojiBlip(TINY).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return made


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return tokenize(calibration_batch(0, 6, seed=1))


def test_outputs_have_the_shapes_of_their_docstring(model: EmojiBlip, batch: dict[str, Tensor]) -> None:
    outputs = model(**batch)
    count, length = batch["input_ids"].shape
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "image_embeds": (count, 16),
        "text_embeds": (count, 16),
        "itm_logits": (count, 2),
        "lm_logits": (count, length, 678),
    }
    torch.testing.assert_close(outputs["text_embeds"].norm(dim=-1), torch.ones(count))


def test_decoder_does_not_see_later_words_and_encoder_does(model: EmojiBlip, batch: dict[str, Tensor]) -> None:
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 5] = (changed["input_ids"][:, 5] + 7) % 600 + 5
    before, after = model(**batch), model(**changed)
    torch.testing.assert_close(after["lm_logits"][:, :5], before["lm_logits"][:, :5])
    for name in ("itm_logits", "text_embeds"):
        assert (after[name] - before[name]).abs().max() > 1e-3
    assert (after["lm_logits"][:, 5:] - before["lm_logits"][:, 5:]).abs().max() > 1e-3


def test_image_reaches_both_grounded_passes_and_not_the_unimodal_one(model: EmojiBlip, batch: dict[str, Tensor]) -> None:
    before, after = model(**batch), model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)})
    torch.testing.assert_close(after["text_embeds"], before["text_embeds"], rtol=0, atol=0)
    assert (after["itm_logits"] - before["itm_logits"]).abs().max() > 1e-3
    assert (after["lm_logits"] - before["lm_logits"]).abs().max() > 1e-3


def test_padding_changes_nothing(model: EmojiBlip, batch: dict[str, Tensor]) -> None:
    length = batch["input_ids"].shape[1]
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 5), value=3)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 5))
    before, after = model(**batch), model(batch["pixel_values"], ids, mask)
    for name in ("text_embeds", "itm_logits"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["lm_logits"][:, :length], before["lm_logits"], rtol=1e-4, atol=1e-4)
    short = next_word_loss(model, batch["input_ids"], batch["attention_mask"], model.encode_image(batch["pixel_values"]))
    torch.testing.assert_close(next_word_loss(model, ids, mask, model.encode_image(batch["pixel_values"])), short)


def test_decoder_owns_its_self_attention_and_nothing_else(model: EmojiBlip) -> None:
    encoder = dict(model.text_encoder.named_parameters())
    own = {name for name, value in model.text_decoder.named_parameters() if value is not encoder[name]}
    assert own == {name for name in encoder if ".attention." in name or ".attention_norm." in name}
    unique = {name for name, _ in model.named_parameters()}
    assert {f"text_decoder.{name}" for name in own} == {name for name in unique if name.startswith("text_decoder.")}


def test_a_few_steps_learn_a_batch(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = EmojiBlip(replace(TINY, text_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = calibration_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_regions_are_vision_and_what_reads_the_image(model: EmojiBlip, batch: dict[str, Tensor]) -> None:
    regions = mfcompile.infer_regions(mfcompile.capture(model, batch))
    prunable = {site.fqn: site.region for site in regions.sites if site.skipped is None}
    assert {fqn for fqn, region in prunable.items() if region == "vision"} == {
        fqn for fqn in prunable if fqn.startswith("vision_encoder.")
    }
    assert set(prunable.values()) == {"vision", "fusion"}
    assert sum(fqn.startswith("text_decoder.") for fqn in prunable) == 4 * TINY.text_layers


def test_captions_end_at_the_separator_and_are_scored_against_all_sentences() -> None:
    tokenizer = Tokenizer.from_file()
    sentences = ("two dogs above a robot on a red ground", "a robot , the ground is red")
    ids, _ = tokenizer.encode_batch(sentences)
    wanted = torch.from_numpy(ids)

    def decode(input_ids: Tensor, attention_mask: Tensor, image_states: Tensor) -> Tensor:
        following = wanted[:, min(input_ids.shape[1], wanted.shape[1] - 1)]
        return torch.nn.functional.one_hot(following, len(tokenizer))[:, None].float()

    captions = write_captions(decode, torch.zeros(2, 1), tokenizer)
    assert captions == ["two dogs above a robot on a red ground", "a robot, the ground is red"]
    references = [["a robot below two dogs on a red ground", sentences[0]], ["a red picture with a robot"]]
    scores = score_captions(captions, references)
    assert scores["exact"] == 50
    assert 50 < scores["bleu"] < 100
