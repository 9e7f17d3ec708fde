"""Tasks: what their tests measure, what their data holds, how long sentences are written."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.tavlp.families import family
from benchmarks.tavlp.families.contract import CaptioningModel, RetrievalModel
from benchmarks.tavlp.finetuning import fine_tune, rate_factor
from benchmarks.tavlp.pictures import SceneSet, scene_set
from benchmarks.tavlp.tasks import TASKS, retrieval, vqa
from benchmarks.tavlp.tasks.captioning import sentence, write
from benchmarks.tavlp.tasks.contract import Recipe, epochs

CPU = torch.device("cpu")
RECIPE = Recipe(steps=1, batch_size=4, learning_rate=1e-3, train_size=8, test_size=3)


class Numbered(RetrievalModel):
    """Pictures and sentences are numbers; what is near and what matches is given."""

    def __init__(self, near: Tensor, matching: Tensor) -> None:
        super().__init__()
        self.near, self.matching = near, matching

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return pixel_values[:, 0, 0, 0].long()

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids[:, :1]

    def embed_image(self, image_states: Tensor) -> Tensor:
        return self.near[image_states.long()]

    def embed_text(self, text_states: Tensor) -> Tensor:
        return torch.eye(len(self.near))[text_states[:, 0].long()]

    def scale(self) -> Tensor:
        return torch.tensor(1.0)

    def match(self, image_states: Tensor, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert torch.equal(text_states[:, 0], input_ids[:, 0])
        right = self.matching[image_states.long(), text_states[:, 0].long()]
        return torch.stack([torch.zeros_like(right), right], dim=1)


def numbered_scenes(count: int) -> SceneSet:
    pixels = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 3, 2, 2)).copy()
    return SceneSet(pixels, tuple(map(str, range(count))), ((),) * count)


def retrieval_scores(monkeypatch: pytest.MonkeyPatch, near: Tensor, matching: Tensor, candidates: int) -> dict[str, float]:
    def encode(texts: tuple[str, ...]) -> tuple[Any, Any]:
        ids = np.array([[int(text)] for text in texts])
        return ids, np.ones_like(ids)

    monkeypatch.setattr(retrieval, "scenes", lambda split, count: numbered_scenes(len(near)))
    monkeypatch.setattr(retrieval, "CANDIDATES", candidates)
    source: Any = SimpleNamespace(tokenizer=lambda: SimpleNamespace(encode_batch=encode))
    return retrieval.RETRIEVAL.evaluate(Numbered(near, matching), source, RECIPE, CPU)


def test_matching_ranks_the_nearest_again_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Row 0 is right at once; in row 1 the other candidate is nearer until both logits are added; the own sentence of
    # row 2 matches best of all, but is no candidate of its picture. As a picture it is one of its sentence.
    near = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.5, 0.0], [0.8, 0.7, 0.1]])
    matching = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    scores = retrieval_scores(monkeypatch, near, matching, candidates=2)
    assert scores["itc_tr1"] == pytest.approx(100 / 3)
    assert scores["tr1"] == pytest.approx(200 / 3)
    assert scores["itc_ir1"] == pytest.approx(200 / 3)  # sentence 1 finds picture 2 first
    assert scores["ir1"] == pytest.approx(100)


def test_test_scenes_are_twins_of_pairs_that_never_met() -> None:
    scenes = scene_set(5, 6, "test", twins=1.0)
    assert scenes.pixel_values.shape == (6, 3, 64, 64)
    assert -1.1 < scenes.pixel_values.min() < -0.5 < 0.5 < scenes.pixel_values.max() < 1.1  # scaling overshoots a little
    assert all(caption in sentences for caption, sentences in zip(scenes.captions, scenes.sentences, strict=True))
    again = scene_set(5, 6, "test", twins=1.0)
    assert np.array_equal(scenes.pixel_values, again.pixel_values)


def test_questions_are_those_of_the_official_split() -> None:
    train, test = vqa.questions("train", 8), vqa.questions("test", 6)
    assert len(train.pixel_values) == 8
    assert set(test.images) == set(range(6))
    assert vqa.answer_count() == 13
    assert "what is the red shape" in test.texts
    tokenizer, new_words = vqa.grown_tokenizer(family("xvlm"))
    assert new_words == len(tokenizer) - len(family("xvlm").tokenizer())
    assert all(tokenizer.unknown_id not in tokenizer.encode(text) for text in train.texts + test.texts)


class Speller(CaptioningModel):
    """Writes a given row of ids for each picture."""

    def __init__(self, rows: Tensor, words: int) -> None:
        super().__init__()
        self.rows, self.words = rows, words

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return torch.arange(len(pixel_values))

    def next_words(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        following = self.rows[image_states][:, 1 : input_ids.shape[1] + 1]
        return torch.nn.functional.one_hot(following, self.words).float()


def test_sentences_are_written_until_they_end() -> None:
    tokenizer = family("xvlm").tokenizer()
    texts = ["a robot , the ground is red", "two owls"]
    ids, _ = tokenizer.encode_batch(texts)
    model = Speller(torch.from_numpy(ids), len(tokenizer))
    written = write(model, torch.arange(2), tokenizer)
    assert torch.equal(written, torch.from_numpy(ids))
    assert [sentence(row, tokenizer) for row in written.tolist()] == texts
    cut = write(model, torch.arange(2), tokenizer, longest=3)
    assert [sentence(row, tokenizer) for row in cut.tolist()] == ["a robot", "two owl"]


def test_an_epoch_shows_every_row_once_and_seeds_differ() -> None:
    def taken(rows: Iterator[list[int]]) -> list[list[int]]:
        return [next(rows) for _ in range(4)]

    batches = taken(epochs(7, 3, seed=1))
    assert len(set(batches[0] + batches[1])) == 6
    assert batches == taken(epochs(7, 3, seed=1))
    assert batches != taken(epochs(7, 3, seed=2))
    with pytest.raises(ValueError, match="a batch of 8"):
        next(epochs(7, 8, seed=1))


def test_the_rate_rises_over_a_tenth_and_falls_to_zero() -> None:
    factors = [rate_factor(step, 20) for step in range(21)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[11] == 0.5
    assert factors[20] == 0


def test_fine_tuning_repeats_itself_and_learns() -> None:
    def losses(steps: int) -> tuple[float, ...]:
        torch.manual_seed(0)
        model = TASKS["vqa"].model(family("xvlm"))
        recipe = Recipe(steps=steps, batch_size=4, learning_rate=1e-3, train_size=4, test_size=1)
        return fine_tune(model, TASKS["vqa"], family("xvlm"), recipe, 0, CPU).losses

    assert losses(2) == losses(2)
    many = losses(8)
    assert many[-1] < 0.8 * many[0]
