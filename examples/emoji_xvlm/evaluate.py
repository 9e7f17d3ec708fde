"""Held-out retrieval: which sentence belongs to which scene, by embeddings and by matching scores.

Everything that is scored comes from the whole graph, ``(pixel_values, input_ids, attention_mask) -> outputs``, so the
same code scores a PyTorch module and an onnxruntime session.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from emoji_xvlm.scenes import held_out_batch
from emoji_xvlm.tokenizer import Tokenizer

Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Forward = Callable[[Array, IntArray, IntArray], Mapping[str, npt.NDArray[np.float32]]]

SCENES = 500
CANDIDATES = 5
BATCH_SIZE = 100


@functools.lru_cache(maxsize=4)
def held_out_set(scenes: int = SCENES) -> tuple[Array, IntArray, IntArray]:
    """The test set: (N, 3, 64, 64) pixel values, (N, L) ids and (N, L) padding mask."""
    batch = held_out_batch(scenes)
    input_ids, attention_mask = Tokenizer.from_file().encode_batch(batch.captions)
    return batch.pixel_values, input_ids, attention_mask


def module_forward(model: nn.Module) -> Forward:
    """A callable over arrays for a module that takes and returns tensors by name."""

    def forward(pixel_values: Array, input_ids: IntArray, attention_mask: IntArray) -> dict[str, Array]:
        parameter = next(model.parameters())
        with torch.inference_mode():
            outputs = model(
                pixel_values=torch.from_numpy(pixel_values).to(parameter.device, parameter.dtype),
                input_ids=torch.from_numpy(input_ids).to(parameter.device),
                attention_mask=torch.from_numpy(attention_mask).to(parameter.device),
            )
        return {name: value.float().cpu().numpy() for name, value in outputs.items()}

    return forward


def evaluate_callable(forward: Forward, scenes: int = SCENES, candidates: int = CANDIDATES) -> dict[str, float]:
    """Score a callable on the held-out scenes.

    Args:
        forward: takes (B, 3, 64, 64), (B, L), (B, L) and returns at least image_embeds (B, E), text_embeds (B, E) and
            itm_logits (B, 2). It sees batches of 100, and of fewer pairs at the end.
        scenes: how many test scenes; chance is one in this number.
        candidates: how many of the nearest sentences (images) the matching score re-ranks; 0 skips it.

    Returns:
        In per cent: ``itc_tr1``, ``itc_ir1``, ``itc_tr5``, ``itc_ir5`` (text and image retrieval by embeddings) and
        ``itm_tr1``, ``itm_ir1`` (candidates ranked by the matching score alone), with ``r1``, the mean of all R@1: half
        of it asks the vision and text stacks, half the fusion stack as well.
    """
    pixel_values, input_ids, attention_mask = held_out_set(scenes)
    image_embeds, text_embeds = [], []
    for start in range(0, scenes, BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        outputs = forward(pixel_values[rows], input_ids[rows], attention_mask[rows])
        image_embeds.append(outputs["image_embeds"])
        text_embeds.append(outputs["text_embeds"])
    similarity = np.concatenate(image_embeds) @ np.concatenate(text_embeds).T

    metrics = {
        "itc_tr1": _recall(similarity, 1),
        "itc_ir1": _recall(similarity.T, 1),
        "itc_tr5": _recall(similarity, 5),
        "itc_ir5": _recall(similarity.T, 5),
    }
    if candidates:
        texts = _nearest(similarity, candidates)
        images = _nearest(similarity.T, candidates)
        own = np.arange(scenes)[:, None]
        pairs = {(int(i), int(t)) for i, t in zip(np.repeat(own, candidates), texts.ravel(), strict=True)}
        pairs |= {(int(i), int(t)) for t, i in zip(np.repeat(own, candidates), images.ravel(), strict=True)}
        scores = _match(forward, sorted(pairs), scenes)
        metrics["itm_tr1"] = _reranked_recall(scores, texts)
        metrics["itm_ir1"] = _reranked_recall(scores.T, images)
    metrics["r1"] = float(np.mean([value for name, value in metrics.items() if name.endswith("r1")]))
    return metrics


def evaluate(model: nn.Module, scenes: int = SCENES, candidates: int = CANDIDATES) -> dict[str, float]:
    """`evaluate_callable` for a module; it is scored in eval mode and left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        return evaluate_callable(module_forward(model), scenes, candidates)
    finally:
        model.train(was_training)


def _match(forward: Forward, pairs: list[tuple[int, int]], scenes: int) -> Array:
    """(N, N) matching scores of (image, text) pairs; -inf where a pair is not among them."""
    pixel_values, input_ids, attention_mask = held_out_set(scenes)
    scores = np.full((scenes, scenes), -np.inf, dtype=np.float32)
    for start in range(0, len(pairs), BATCH_SIZE):
        images, texts = np.array(pairs[start : start + BATCH_SIZE]).T
        logits = forward(pixel_values[images], input_ids[texts], attention_mask[texts])["itm_logits"]
        scores[images, texts] = logits[:, 1] - logits[:, 0]
    return scores


def _nearest(similarity: Array, count: int) -> IntArray:
    """(N, count) columns of the largest entries of each row of an (N, N) matrix."""
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def _recall(similarity: Array, count: int) -> float:
    """Per cent of rows whose own column is among the ``count`` best."""
    own = np.arange(len(similarity))[:, None]
    return 100 * float((_nearest(similarity, count) == own).any(axis=1).mean())


def _reranked_recall(scores: Array, candidates: IntArray) -> float:
    """Per cent of rows whose own column has the best score among the row's candidates."""
    rows = np.arange(len(scores))
    best = candidates[rows, np.take_along_axis(scores, candidates, axis=1).argmax(axis=1)]
    return 100 * float((best == rows).mean())
