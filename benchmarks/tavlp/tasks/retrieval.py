"""Image-text retrieval among scenes that are drawn in another manner and show pairs of things that never met before."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from emoji_xvlm.tokenizer import Tokenizer
from torch import Tensor

from benchmarks.tavlp.families.contract import Family, RetrievalModel
from benchmarks.tavlp.metrics import Scores, recall
from benchmarks.tavlp.pictures import SceneSet, scene_set
from benchmarks.tavlp.tasks.contract import Recipe, epochs

TRAIN_SEED, TEST_SEED = 11_000_001, 11_000_002
CANDIDATES = 8
"""Nearest sentences (images) by embeddings that the matching head ranks; all others stay behind them."""
TEST_BATCH = 64


@dataclass(frozen=True)
class Pairs:
    """B pairs: pixel_values (B, 3, 64, 64), input_ids and attention_mask (B, L), same_text (B, B) bool off the diagonal."""

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    same_text: Tensor


@functools.lru_cache(maxsize=4)
def scenes(split: str, count: int) -> SceneSet:
    """The training set, or the test set, in which every scene has a twin: the same things, another layout and ground."""
    return scene_set(TRAIN_SEED, count, "train") if split == "train" else scene_set(TEST_SEED, count, "test", twins=1.0)


class Retrieval:
    """ITC and ITM, as X-VLM and BLIP fine-tune; tested by R@1 and R@5 of both directions."""

    name = "retrieval"
    version = 3
    metrics = {"tr1": "TR@1", "tr5": "TR@5", "ir1": "IR@1", "ir5": "IR@5"}  # noqa: RUF012 - read only
    has_zero_shot = True

    def model(self, family: Family) -> RetrievalModel:
        return family.retrieval_model(family.build())

    def training_batches(self, family: Family, recipe: Recipe, seed: int) -> Iterator[Pairs]:
        data, tokenizer = scenes("train", recipe.train_size), family.tokenizer()
        rng = np.random.default_rng(seed)
        for rows in epochs(len(data), recipe.batch_size, seed):
            texts = [str(rng.choice(data.sentences[row])) for row in rows]
            yield _pairs(data, rows, texts, tokenizer)

    def loss(self, model: RetrievalModel, batch: Pairs, generator: torch.Generator) -> Tensor:
        images = model.encode_image(batch.pixel_values)
        texts = model.encode_text(batch.input_ids, batch.attention_mask)
        logits = model.scale() * model.embed_image(images).float() @ model.embed_text(texts).float().T
        contrastive = _contrastive(logits, batch.same_text)
        return contrastive + _matching(model, batch, images, texts, logits, generator)

    def evaluate(self, model: RetrievalModel, family: Family, recipe: Recipe, device: torch.device) -> dict[str, float]:
        """R@1 and R@5 by the sum of both logits over the nearest by embeddings, and by embeddings alone (``itc_``)."""
        data = scenes("test", recipe.test_size)
        ids, mask = (torch.from_numpy(part).to(device) for part in family.tokenizer().encode_batch(data.captions))
        pixels = torch.from_numpy(data.pixel_values)
        images = torch.cat([model.encode_image(part.to(device)) for part in torch.split(pixels, TEST_BATCH)])
        texts = torch.cat(
            [model.encode_text(*part) for part in zip(torch.split(ids, TEST_BATCH), torch.split(mask, TEST_BATCH), strict=True)]
        )
        with torch.autocast(device.type, enabled=False):
            near = (model.scale() * model.embed_image(images.float()) @ model.embed_text(texts.float()).T).cpu()
        count = min(CANDIDATES, len(data))
        wanted = torch.zeros_like(near, dtype=torch.bool)
        wanted.scatter_(1, near.topk(count, dim=1).indices, True)
        wanted_by_image = torch.zeros_like(wanted).scatter_(0, near.topk(count, dim=0).indices, True)
        scored = _scores(model, images, texts, ids, mask, near, wanted | wanted_by_image)
        by_text = torch.where(wanted, scored, near - 1e6)
        by_image = torch.where(wanted_by_image, scored, near - 1e6)
        return {
            **_recalls(by_text.numpy(), by_image.T.numpy()),
            **{f"itc_{name}": value for name, value in _recalls(near.numpy(), near.T.numpy()).items()},
        }


def _pairs(data: SceneSet, rows: Sequence[int], texts: Sequence[str], tokenizer: Tokenizer) -> Pairs:
    input_ids, attention_mask = tokenizer.encode_batch(texts)
    words = np.array(texts)
    same = torch.from_numpy((words[:, None] == words[None]) & ~np.eye(len(words), dtype=bool))
    return Pairs(
        torch.from_numpy(data.pixel_values[list(rows)]), torch.from_numpy(input_ids), torch.from_numpy(attention_mask), same
    )


def _contrastive(logits: Tensor, same_text: Tensor) -> Tensor:
    """Symmetric cross-entropy of (B, B) logits; other pairs with an equal sentence are left out."""
    logits = logits.masked_fill(same_text, float("-inf"))
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _matching(
    model: RetrievalModel, batch: Pairs, images: Tensor, texts: Tensor, logits: Tensor, generator: torch.Generator
) -> Tensor:
    """Match or not: every true pair, one hard negative sentence and one hard negative image for each (ALBEF, X-VLM)."""
    own = torch.arange(len(logits))
    wrong = logits.detach().cpu().masked_fill(batch.same_text.cpu(), float("-inf")).fill_diagonal_(float("-inf"))
    other_texts = torch.multinomial(wrong.softmax(1), 1, generator=generator)[:, 0]
    other_images = torch.multinomial(wrong.T.softmax(1), 1, generator=generator)[:, 0]
    image_rows = torch.cat([own, own, other_images]).to(logits.device)
    text_rows = torch.cat([own, other_texts, own]).to(logits.device)
    sentences = (texts, batch.input_ids, batch.attention_mask)
    pairs = _matched(model, images, sentences, image_rows, text_rows, len(own))
    return F.cross_entropy(pairs, (image_rows == text_rows).long())


def _scores(
    model: RetrievalModel, images: Tensor, texts: Tensor, ids: Tensor, mask: Tensor, near: Tensor, wanted: Tensor
) -> Tensor:
    """(N, N) sums of the logits of embeddings and of matching, where wanted."""
    image_rows, text_rows = wanted.nonzero().T
    logits = _matched(
        model, images, (texts, ids, mask), image_rows.to(images.device), text_rows.to(images.device), 4 * TEST_BATCH
    )
    scored = torch.full_like(near, float("-inf"))
    scored[image_rows, text_rows] = (logits[:, 1] - logits[:, 0]).cpu() + near[image_rows, text_rows]
    return scored


def _matched(
    model: RetrievalModel,
    images: Tensor,
    sentences: tuple[Tensor, Tensor, Tensor],
    image_rows: Tensor,
    text_rows: Tensor,
    size: int,
) -> Tensor:
    """(P, 2) float32 logits of P pairs, computed with sentences of like length together: a third of all places is padding.

    Args:
        model: matches.
        images: image states.
        sentences: text states (N, L, D), ids (N, L) and padding mask (N, L).
        image_rows, text_rows: (P) rows of these.
        size: pairs at a time.
    """
    lengths = sentences[-1].sum(1)[text_rows]
    order = lengths.argsort(stable=True)
    logits = []
    for pairs in torch.split(order, size):
        texts, ids, mask = (part[:, : int(lengths[pairs[-1]])][text_rows[pairs]] for part in sentences)
        logits.append(model.match(images[image_rows[pairs]], texts, ids, mask).float())
    return torch.cat(logits)[order.argsort()]


def _recalls(by_text: Scores, by_image: Scores) -> dict[str, float]:
    return {"tr1": recall(by_text, 1), "tr5": recall(by_text, 5), "ir1": recall(by_image, 1), "ir5": recall(by_image, 5)}


RETRIEVAL = Retrieval()
