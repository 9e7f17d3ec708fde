"""Held-out scores of the whole graph: retrieval, and next words."""

from emoji_xvlm.evaluate import BATCH_SIZE, SCENES, held_out_set, module_forward
from emoji_xvlm.evaluate import evaluate as evaluate_retrieval
from torch import nn


def evaluate(model: nn.Module, scenes: int = SCENES) -> dict[str, float]:
    """Held-out retrieval in per cent as the sister example measures it, and ``next_word``.

    ``next_word`` is the share of tokens after [CLS], [SEP] included, that the decoder guesses from the image and the right
    tokens before. Word order is free where several sentences are true, so 100 is out of reach.
    """
    metrics = evaluate_retrieval(model, scenes)
    forward = module_forward(model)
    pixel_values, input_ids, attention_mask = held_out_set(scenes)
    right = total = 0
    for start in range(0, scenes, BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        logits = forward(pixel_values[rows], input_ids[rows], attention_mask[rows])["lm_logits"]
        is_word = attention_mask[rows, 1:] == 1
        right += int((logits[:, :-1].argmax(axis=-1) == input_ids[rows, 1:])[is_word].sum())
        total += int(is_word.sum())
    return {**metrics, "next_word": 100 * right / total}
