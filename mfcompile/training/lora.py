"""Masked LoRA: adapters under a mask, whose merge keeps the pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mfcompile.errors import InputError
from mfcompile.low_rank import LowRank
from mfcompile.masked_weights import adapter_of, masked_places, stored_weight
from mfcompile.patterns import WeightNames, select


def add_lora(
    module: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Train low-rank additions in the place of masked weights: each layer computes with mask * (W + alpha / rank * up @ down).

    The mask is laid over the sum (not over the product alone, which would be dense), in training as in the merge, so that
    ``merge_lora`` changes no output bit and no pruned place. Every other parameter is frozen; unfreeze what you train
    besides (a new head) with ``requires_grad_``. A layer forms its whole weight in every forward: it costs a product of
    (out, rank) and (rank, in) per layer, not per token.

    Low-rank additions: Hu et al., "LoRA" (ICLR 2022), Eq. 3.

    Args:
        module: with masks in force; changed in place.
        rank: of the additions.
        alpha: they are multiplied by alpha / rank; None for 2 * rank.
        targets: patterns of the masked weights to adapt; None adapts all matrices among them.
        ignore: patterns of those that are not.

    Returns:
        Names of the adapted weights.

    Raises:
        InputError: there is no masked matrix, a pattern matches none, or adapters are there already.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    names: dict[str, WeightNames] = {}
    for fqn, owner, leaf, mask in masked_places(module):
        stored = stored_weight(owner, leaf)
        if adapter_of(owner, leaf) is not None:
            raise InputError(f"{fqn} has an adapter already: merge it first (mfcompile.merge_lora(module))")
        if stored.ndim == 2:
            if id(stored) not in places:
                names[fqn] = WeightNames((fqn,), _classes(module, fqn), mask.record.region)
            places.setdefault(id(stored), []).append((fqn, owner, leaf))
    if not names:
        raise InputError(
            f"{type(module).__name__} has no masked matrix to adapt: give what compile_pruned (.module), mfcompile.load or "
            f"mfcompile.mask_module gives"
        )
    chosen = set(names) if targets is None else set(select(targets, names, what="targets"))
    chosen -= set() if ignore is None else set(select(ignore, names, what="ignore"))
    if not chosen:
        raise InputError("targets and ignore leave no masked matrix to adapt")
    module.requires_grad_(False)
    scale = (2.0 * rank if alpha is None else alpha) / rank
    for group in places.values():
        if group[0][0] in chosen:
            adapter = LowRank(stored_weight(*group[0][1:]).detach(), rank, scale)
            for _, owner, leaf in group:
                owner.add_module(f"{leaf}_lora", adapter)
    return tuple(fqn for fqn in names if fqn in chosen)


def merge_lora(module: nn.Module) -> nn.Module:
    """Add what adapters have learnt to the kept places of their weights, and take the adapters off, in place.

    Outputs stay as they were, to the bit; masks stay in force. Weights that the adapters froze stay frozen.

    Args:
        module: a module after ``add_lora``.

    Returns:
        The same object.

    Raises:
        InputError: it has no adapters.
    """
    merged: set[int] = set()
    adapted = [place for place in masked_places(module) if adapter_of(place[1], place[2]) is not None]
    for _, owner, leaf, mask in adapted:
        stored = stored_weight(owner, leaf)
        if id(stored) not in merged:
            merged.add(id(stored))
            with torch.no_grad():
                stored.copy_(torch.where(mask.over(stored), getattr(owner, leaf), stored))
    for _, owner, leaf, _ in adapted:
        delattr(owner, f"{leaf}_lora")
    if not merged:
        raise InputError(f"{type(module).__name__} has no adapters to merge: mfcompile.add_lora(module) adds them")
    return module


def _classes(module: nn.Module, fqn: str) -> frozenset[str]:
    """Class names of the owner of a weight and of the modules around it, as patterns know them."""
    parts = fqn.split(".")[:-1]
    return frozenset(type(module.get_submodule(".".join(parts[:length]))).__name__ for length in range(1, len(parts) + 1))
