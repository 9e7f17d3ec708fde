"""Questions about pictures of a coloured shape (easy-vqa 1.0, its own split and its 13 answers)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from emoji_xvlm.tokenizer import Tokenizer
from PIL import Image
from torch import Tensor

from benchmarks.tavlp.families.contract import AnsweringModel, Family
from benchmarks.tavlp.metrics import accuracy
from benchmarks.tavlp.tasks.contract import Recipe, epochs
from benchmarks.tavlp.tasks.retrieval import TEST_BATCH

QUESTIONS_AN_IMAGE = 4
"""Questions of a training image in a step; they share its image states."""


@dataclass(frozen=True)
class Questions:
    """Pictures and what is asked about them.

    Attributes:
        pixel_values: (N, 3, 64, 64) float32, -1 to 1.
        texts: (Q) questions.
        answers: (Q) int64, index into the closed set.
        images: (Q) int64, the picture of each question.
    """

    pixel_values: npt.NDArray[np.float32]
    texts: tuple[str, ...]
    answers: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """pixel_values (B, 3, 64, 64); image_rows, input_ids, attention_mask and answers of Q questions about them."""

    pixel_values: Tensor
    image_rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    answers: Tensor


@functools.lru_cache(maxsize=4)
def questions(split: str, count: int) -> Questions:
    """The first ``count`` pictures of a split (4,000 for training, 1,000 for the test) with all their questions."""
    import easy_vqa

    is_train = split == "train"
    texts, answers, images = easy_vqa.get_train_questions() if is_train else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if is_train else easy_vqa.get_test_image_paths()
    known = {answer: index for index, answer in enumerate(easy_vqa.get_answers())}
    chosen = [row for row, image in enumerate(images) if image < count]
    pixels = [np.asarray(Image.open(paths[index]).convert("RGB"), dtype=np.float32) for index in range(min(count, len(paths)))]
    return Questions(
        np.stack(pixels).transpose(0, 3, 1, 2) / 127.5 - 1,
        tuple(_plain(texts[row]) for row in chosen),
        np.array([known[answers[row]] for row in chosen]),
        np.array([images[row] for row in chosen]),
    )


@functools.cache
def answer_count() -> int:
    """Answers of the closed set."""
    import easy_vqa

    return len(easy_vqa.get_answers())


def grown_tokenizer(family: Family) -> tuple[Tokenizer, int]:
    """The family's tokenizer with the words of questions behind its last one, and how many these are."""
    tokenizer = family.tokenizer()
    words = sorted({word for text in questions("train", 4000).texts for word in text.split()})
    new = [word for word in words if tokenizer.unknown_id in tokenizer.encode(word) or len(tokenizer.encode(word)) > 3]
    return Tokenizer([*tokenizer.tokens, *new]), len(new)


class Answering:
    """Cross-entropy over the closed set; tested by accuracy on the official test split."""

    name = "vqa"
    version = 2
    metrics = {"accuracy": "accuracy"}  # noqa: RUF012 - read only
    has_zero_shot = False

    def model(self, family: Family) -> AnsweringModel:
        _, new_words = grown_tokenizer(family)
        return family.answering_model(family.build(), new_words=new_words, answers=answer_count())

    def training_batches(self, family: Family, recipe: Recipe, seed: int) -> Iterator[Asked]:
        data, (tokenizer, _) = questions("train", recipe.train_size), grown_tokenizer(family)
        rows_of = [np.flatnonzero(data.images == image) for image in range(len(data.pixel_values))]
        rng = np.random.default_rng(seed)
        for images in epochs(len(rows_of), recipe.batch_size, seed):
            asked = [
                rng.choice(rows_of[image], min(QUESTIONS_AN_IMAGE, len(rows_of[image])), replace=False) for image in images
            ]
            image_rows = np.repeat(np.arange(len(images)), [len(rows) for rows in asked])
            rows = np.concatenate(asked)
            ids, mask = tokenizer.encode_batch([data.texts[row] for row in rows])
            yield Asked(
                torch.from_numpy(data.pixel_values[images]),
                torch.from_numpy(image_rows),
                torch.from_numpy(ids),
                torch.from_numpy(mask),
                torch.from_numpy(data.answers[rows]),
            )

    def loss(self, model: AnsweringModel, batch: Asked, generator: torch.Generator) -> Tensor:
        images = model.encode_image(batch.pixel_values)[batch.image_rows]
        return F.cross_entropy(model.answers(images, batch.input_ids, batch.attention_mask).float(), batch.answers)

    def evaluate(self, model: AnsweringModel, family: Family, recipe: Recipe, device: torch.device) -> dict[str, float]:
        data, (tokenizer, _) = questions("test", recipe.test_size), grown_tokenizer(family)
        pixels = torch.from_numpy(data.pixel_values)
        images = torch.cat([model.encode_image(part.to(device)) for part in torch.split(pixels, TEST_BATCH)])
        ids, mask = (torch.from_numpy(part).to(device) for part in tokenizer.encode_batch(data.texts))
        predicted: list[int] = []
        for rows in torch.split(torch.arange(len(ids)), 4 * TEST_BATCH):
            states = images[torch.from_numpy(data.images)[rows].to(device)]
            predicted += model.answers(states, ids[rows], mask[rows]).argmax(dim=-1).tolist()
        return {"accuracy": accuracy(predicted, data.answers.tolist())}


def _plain(text: str) -> str:
    return text.lower().replace("?", "").strip()


VQA = Answering()
