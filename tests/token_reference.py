"""Token pruning done eagerly and by hand: loops over samples, heads and tokens, and the models' own layers.

Nothing of this comes from the passes: it is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_weights(query: Tensor, key: Tensor, seen: Tensor | None = None) -> Tensor:
    """(batch, heads, queries, keys) softmax weights, row by row over the keys that may be seen; rows of padding are zero."""
    batch, heads, tokens, width = query.shape
    weights = torch.zeros(batch, heads, tokens, tokens)
    for sample in range(batch):
        allowed = torch.ones(tokens, tokens, dtype=torch.bool) if seen is None else seen[sample].expand(tokens, tokens)
        real = [token for token in range(tokens) if bool(allowed[:, token].any())]
        for head in range(heads):
            for row in real:
                columns = allowed[row].nonzero().flatten()
                if len(columns):
                    logits = key[sample, head, columns] @ query[sample, head, row] / width**0.5
                    weights[sample, head, row, columns] = logits.softmax(0)
    return weights


def received(weights: Tensor) -> Tensor:
    """(batch, tokens): the sum over queries of the largest weight over heads (Eq. 6 of CoMP)."""
    batch, heads, tokens, _ = weights.shape
    score = torch.zeros(batch, tokens)
    for sample in range(batch):
        for token in range(tokens):
            for row in range(tokens):
                score[sample, token] += max(float(weights[sample, head, row, token]) for head in range(heads))
    return score


def choose(score: Tensor, count: int, protected: Sequence[Sequence[int]], padding: Sequence[Sequence[int]] = ()) -> Tensor:
    """(batch, count) positions, ascending: the protected ones, then those of the highest scores, padding last."""
    rows = []
    for sample, stays in enumerate(protected):
        last = set(padding[sample]) if padding else set()
        others = [token for token in range(score.shape[1]) if token not in stays]
        others.sort(key=lambda token: (token in last, -float(score[sample, token])))
        rows.append(sorted([*stays, *others][:count]))
    return torch.tensor(rows)


def pick(states: Tensor, kept: Tensor) -> Tensor:
    """The kept rows of every sample."""
    return torch.stack([states[sample, kept[sample]] for sample in range(len(states))])


def restored(states: Tensor, kept: Sequence[Tensor], tokens: int) -> Tensor:
    """Rows at the places that they had before all cuts, zeros elsewhere."""
    places = kept[0]
    for later in kept[1:]:
        places = torch.stack([places[sample, later[sample]] for sample in range(len(places))])
    full = torch.zeros(len(states), tokens, states.shape[2])
    for sample in range(len(states)):
        full[sample, places[sample]] = states[sample]
    return full


def heads_of(states: Tensor, heads: int) -> Tensor:
    """(batch, tokens, width) as (batch, heads, tokens, width / heads)."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def clip_layers(
    layers: Any, states: Tensor, keep: Mapping[int, int], protected: list[list[int]], seen: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """CLIP's encoder layers with tokens cut between attention and MLP of some.

    Args:
        layers: of transformers' encoder.
        states: (batch, tokens, width).
        keep: layer -> tokens that stay.
        protected: positions per sample.
        seen: (batch, tokens, tokens) bool, or None.

    Returns:
        The last states; the kept positions of every cut, each among those that were there.
    """
    cuts: list[Tensor] = []
    for number, layer in enumerate(layers):
        normed, attention, heads = layer.layer_norm1(states), layer.self_attn, layer.self_attn.num_heads
        query, key = heads_of(attention.q_proj(normed), heads), heads_of(attention.k_proj(normed), heads)
        mask = None if seen is None else seen[:, None]
        value = heads_of(attention.v_proj(normed), heads)
        mixed = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        states = states + attention.out_proj(mixed)
        if number in keep:
            kept = choose(received(attention_weights(query, key, seen)), keep[number], protected, padding_of(seen, len(states)))
            states, cuts = pick(states, kept), [*cuts, kept]
            protected = [[row.tolist().index(item) for item in stays] for row, stays in zip(kept, protected, strict=True)]
            seen = None if seen is None else torch.stack([seen[at][row][:, row] for at, row in enumerate(kept)])
        states = states + layer.mlp(layer.layer_norm2(states))
    return states, cuts


def padding_of(seen: Tensor | None, rows: int) -> list[list[int]]:
    """Tokens of every sample that none may look at."""
    if seen is None:
        return [[] for _ in range(rows)]
    return [[token for token in range(seen.shape[2]) if not bool(seen[at, :, token].any())] for at in range(rows)]


def causal(mask: Tensor) -> Tensor:
    """(batch, tokens, tokens) bool: who may look at whom, to the left and not at padding."""
    tokens = mask.shape[1]
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()[None] & mask.bool()[:, None, :]
