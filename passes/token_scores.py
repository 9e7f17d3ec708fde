"""How tokens are scored, and which of them a score keeps: plain functions of tensors, traced into the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mfcompile.errors import InputError


@dataclass(frozen=True)
class TokenEvidence:
    """What a scorer may look at, at one site.

    Attributes:
        attention: (batch, heads, queries, keys) weights, in float32. Zero where a key is masked, and in the rows of padding.
        states: (batch, tokens, width) of the stream at the place where tokens are cut.
        valid: (batch, tokens) bool, False for padding: what no token may look at.
        readout: (batch,) position of the token that is read in the end (CLS, EOS); None where there is none.
        live_heads: (heads,) float32 weight of every head, between 0 and 1: zero for heads whose results masks have removed,
            while the graph still computes them. Such a head looks at all tokens alike, or as it did before it was pruned; its
            ``attention`` must not count (Eq. 7 of CoMP). None where all heads count.
    """

    attention: Tensor
    states: Tensor
    valid: Tensor
    readout: Tensor | None
    live_heads: Tensor | None = None


class TokenScorer(Protocol):
    """Gives every token a score; those with the highest are kept."""

    def __call__(self, evidence: TokenEvidence) -> Tensor:
        """(batch, tokens) scores, not negative, by torch operators alone: the call is traced, not run."""
        ...


@dataclass(frozen=True)
class Cit:
    """Attention that a token receives: sum over queries of the largest over heads, S_i = sum_n max_h A_hni.

    Token importance of CoMP (CVPR 2026), Eq. 6; the self-attention term of MADTP (CVPR 2024). Its normalisation to a sum
    of one changes no rank. Heads that were removed from the graph are not in the attention, and those that masks removed do
    not count, which is Eq. 7.
    """

    def __call__(self, evidence: TokenEvidence) -> Tensor:
        """(batch, tokens) attention received."""
        return received(evidence.attention, evidence.live_heads)


@dataclass(frozen=True)
class ReadoutAttention:
    """Mean over heads of the attention that the read-out token (CLS, EOS) pays to a token.

    EViT (ICLR 2022), Eq. 3; VisionZip (CVPR 2025).
    """

    def __call__(self, evidence: TokenEvidence) -> Tensor:
        """(batch, tokens) attention paid by the read-out token."""
        if evidence.readout is None:
            raise InputError(
                "scorer 'cls_attention' needs a token that is read in the end (CLS in front, EOS at an index), and this site "
                "has none. Use scorer 'cit', which needs no such token"
            )
        return _row(evidence.attention.mean(dim=1), evidence.readout)


@dataclass(frozen=True)
class LastTokenAttention:
    """Mean over heads of the attention that the last token that is no padding pays to a token: PyramidDrop (CVPR 2025)."""

    def __call__(self, evidence: TokenEvidence) -> Tensor:
        """(batch, tokens) attention paid by the last token."""
        places = torch.arange(evidence.valid.shape[1])
        last = torch.where(evidence.valid, places, torch.zeros_like(places)).amax(dim=1)
        return _row(evidence.attention.mean(dim=1), last)


@dataclass(frozen=True)
class Norm:
    """L2 norm of a token's state."""

    def __call__(self, evidence: TokenEvidence) -> Tensor:
        """(batch, tokens) norms."""
        return evidence.states.float().pow(2).sum(dim=-1).sqrt()


@dataclass(frozen=True)
class RandomScore:
    """One random order of positions for all samples, drawn when the graph is made; the base line of every other score.

    Attributes:
        seed: of the order.
    """

    seed: int = 0

    def __call__(self, evidence: TokenEvidence) -> Tensor:
        """(batch, tokens) places in the drawn order."""
        count = int(evidence.valid.shape[1])
        generator = torch.Generator().manual_seed(self.seed)
        with torch.utils._python_dispatch._disable_current_modes():
            drawn = torch.randperm(count, generator=generator).to(torch.float32)
        return drawn + torch.zeros_like(evidence.valid, dtype=torch.float32)


SCORERS: Mapping[str, TokenScorer] = {
    "cit": Cit(),
    "cls_attention": ReadoutAttention(),
    "last_token": LastTokenAttention(),
    "norm": Norm(),
    "random": RandomScore(),
}
"""The scorers that have a name."""


def resolve_scorer(scorer: str | TokenScorer) -> TokenScorer:
    """A scorer by its name, or the given object.

    Raises:
        InputError: there is none of that name, or the object cannot be called.
    """
    if isinstance(scorer, str):
        if scorer not in SCORERS:
            raise InputError(f"scorer={scorer!r} is not known; choose one of {', '.join(SCORERS)}, or give a TokenScorer")
        return SCORERS[scorer]
    if not callable(scorer):
        raise InputError(f"scorer is a {type(scorer).__name__}; give a name or a callable that takes a TokenEvidence")
    return scorer


def received(attention: Tensor, live_heads: Tensor | None = None) -> Tensor:
    """Attention that every key receives: sum over queries of the largest over heads, Eq. 6 and 7 of CoMP (CVPR 2026).

    Args:
        attention: (batch, heads, queries, keys) weights.
        live_heads: (heads,) factors between 0 and 1, one per head; None for all one. Soft factors suppress heads gradually.

    Returns:
        (batch, keys).
    """
    if live_heads is not None:
        attention = attention * live_heads[:, None, None]
    return attention.amax(dim=1).sum(dim=1)


def weigh(logits: Tensor, batch_size: int, masked: bool, negligible: float, *, is_self: bool = True) -> tuple[Tensor, Tensor]:
    """Attention weights without NaN, and which tokens are no padding.

    The softmax of a row that may look at nothing is NaN in torch, and would poison the score of every token of the sample:
    masked weights are set to zero after a softmax over finite numbers. A token that nothing may look at is padding; what it
    looks at itself does not count.

    Args:
        logits: (batch, ...heads, queries, keys), heads and samples in one axis or in two.
        batch_size: number of samples.
        masked: some tokens may not look at some others.
        negligible: logits at or below are masked.
        is_self: queries are the same tokens as keys.

    Returns:
        (batch, heads, queries, keys) weights; (batch, keys) bool.
    """
    tokens = logits.shape[-1]
    rows = logits.reshape(batch_size, -1, logits.shape[-2], tokens)
    if not masked:
        return rows.softmax(dim=-1), torch.ones_like(rows[:, 0, 0], dtype=torch.bool)
    seen = rows > negligible
    weights = torch.where(seen, rows, 4 * negligible).softmax(dim=-1) * seen
    valid = seen.any(dim=2).any(dim=1)
    return weights * valid[:, None, :, None] if is_self else weights, valid


def keep_best(score: Tensor, protected: Tensor, valid: Tensor, count: int) -> Tensor:
    """Positions of the tokens that stay, ascending.

    Protected ones first, then by score, padding last; of equal ones the first. The order is that of ONNX TopK.

    Args:
        score: (batch, tokens).
        protected: (batch, tokens) bool.
        valid: (batch, tokens) bool.
        count: tokens that stay.

    Returns:
        (batch, count) int64.
    """
    limits = torch.finfo(torch.float32)
    ranked = torch.where(valid, score.float().nan_to_num(nan=0.0, posinf=limits.max / 4, neginf=limits.min / 4), limits.min / 2)
    ranked = torch.where(protected, limits.max / 2, ranked)
    best = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.sort(best, dim=1).values


def _row(attention: Tensor, position: Tensor) -> Tensor:
    """(batch, keys): the row of one query per sample."""
    index = position[:, None, None].expand(-1, 1, attention.shape[2])
    return attention.gather(1, index).squeeze(1)
