"""Token-weighted norms (Eq. 4 of CoMP) in NumPy, from the equations, with what hooks hear of transformers' own modules.

Nothing of this comes from the passes: it is what they are compared with. Which layer reads which token scores is written
out by hand for each architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]


class Heard:
    """What submodules were given and gave in one forward pass, as lists of arrays, one item per call."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.given: dict[str, list[Array]] = {}
        self.gave: dict[str, list[Any]] = {}
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hear(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if args and isinstance(args[0], torch.Tensor):
                self.given.setdefault(name, []).append(args[0].double().numpy())
            parts = result if isinstance(result, tuple) else (result,)
            tensors = [item.double().numpy() if isinstance(item, torch.Tensor) else None for item in parts]
            self.gave.setdefault(name, []).append(tensors)

        return hear

    def one(self, name: str) -> Array:
        """What a submodule of one call gave."""
        ((value, *_),) = self.gave[name]
        result: Array = value
        return result


def split_heads(states: Array, heads: int) -> Array:
    """(batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
    batch, tokens, width = states.shape
    return states.reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, 3)


def token_scores(
    query: Array, key: Array, seen: NDArray[np.bool_], live: Iterable[float] | None = None, *, is_self: bool = True
) -> Array:
    """S^t_i = sum_n max_h A_hni (Eq. 6), (batch, keys). Rows of padding, which no query may look at, pay nothing.

    Args:
        query: (batch, heads, queries, d).
        key: (batch, heads, keys, d), the same number of heads.
        seen: (batch, queries, keys).
        live: (heads,) factors of Eq. 7.
        is_self: queries are the same tokens as keys.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    factors = list(live) if live is not None else [1.0] * heads
    scores = np.zeros((batch, keys))
    for b in range(batch):
        for n in range(queries):
            if is_self and not seen[b, :, n].any():
                continue
            largest = np.zeros(keys)
            for h in range(heads):
                logits = np.array([query[b, h, n] @ key[b, h, i] / np.sqrt(width) for i in range(keys)])
                logits[~seen[b, n]] = -np.inf
                weights = np.exp(logits - logits.max())
                largest = np.maximum(largest, factors[h] * weights / weights.sum())
            scores[b] += largest
    return scores


def weighted_norm(
    rows: Array, scores: Array, read: NDArray[np.int64] | None = None, real: NDArray[np.bool_] | None = None
) -> Array:
    """Mean over samples of (sum_n w_n x_n^2)^(1/2): Eq. 4 with w_0 = 1 for the token that is read.

    Args:
        rows: (batch, tokens, features).
        scores: (batch, tokens).
        read: (batch,) position of the token that is read.
        real: (batch, tokens), False for padding.
    """
    norms = []
    for b in range(len(rows)):
        others = [n for n in range(rows.shape[1]) if (read is None or n != read[b]) and (real is None or real[b, n])]
        total = sum(scores[b, n] for n in others)
        squares = sum(scores[b, n] / total * rows[b, n] ** 2 for n in others)
        if read is not None:
            squares = squares + rows[b, read[b]] ** 2
        norms.append(np.sqrt(squares))
    mean: Array = np.mean(norms, axis=0)
    return mean


def rotate(states: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions: (batch, heads, tokens, d) turned by (batch, tokens, d) tables."""
    half = states.shape[-1] // 2
    turned = np.concatenate([-states[..., half:], states[..., :half]], axis=-1)
    result: Array = states * cos[:, None] + turned * sin[:, None]
    return result
