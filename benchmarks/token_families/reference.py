"""Fewer tokens without cutting any: the eager model, whose later attentions may not look at the dropped ones.

A token that is dropped is one that nobody looks at any more, as long as everything but attention works token by token. The
user's module is run as it is, under a mode that sees every call of scaled dot product attention; nothing of the passes takes
part, and the kept positions come from the output of the pruned model that lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Masked(TorchFunctionMode):
    """Attentions behind one site do not look at tokens that were dropped there.

    Args:
        module: the eager model.
        site: path of the submodule whose attention it is.
        kept: (batch, kept) positions.
        tokens: how many there were.
    """

    def __init__(self, module: nn.Module, site: str, kept: Tensor, tokens: int) -> None:
        super().__init__()
        self.seen = torch.zeros(kept.shape[0], tokens, dtype=torch.bool).scatter(1, kept, True)
        self.tokens = tokens
        self.is_inside = False
        self.is_behind = False
        self.scores: Tensor | None = None
        owner = module.get_submodule(site)
        self.handles = [owner.register_forward_pre_hook(self._enter), owner.register_forward_hook(self._leave)]

    def _enter(self, *_: Any) -> None:
        self.is_inside = True

    def _leave(self, *_: Any) -> None:
        self.is_inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """See TorchFunctionMode."""
        named = dict(kwargs or {})
        if func is F.multi_head_attention_forward and self.is_behind and args[1].shape[0] == self.tokens:
            return func(*args, **{**named, "key_padding_mask": ~self.seen})  # a pooling head
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        named |= dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
        if self.is_behind and named["key"].shape[-2] == self.tokens and named["key"].shape[0] == self.seen.shape[0]:
            named = self._masked(named)
        result = func(**named)
        if self.is_inside and not self.is_behind:
            self.scores = received(named)
            self.is_behind = True
        return result

    def _masked(self, named: dict[str, Any]) -> dict[str, Any]:
        mask, seen = named.get("attn_mask"), self.seen[:, None, None, :]
        if named.get("is_causal"):
            mask = torch.ones(named["query"].shape[-2], self.tokens, dtype=torch.bool).tril()
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        return {**named, "attn_mask": mask, "is_causal": False}


def received(named: Mapping[str, Any]) -> Tensor:
    """(batch, keys) attention received: over queries that are no padding, the sum of the largest over heads."""
    query, key, mask = named["query"].double(), named["key"].double(), named.get("attn_mask")
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = named.get("scale")
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones_like(logits, dtype=torch.bool)
    if named.get("is_causal"):
        seen = seen.tril()
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > -1000)
        logits = logits if mask.dtype == torch.bool else logits + mask.clamp(min=-1e4)
    weights = torch.where(seen, logits, -torch.inf).softmax(-1).nan_to_num(0.0)
    real = seen.any(dim=1).any(dim=1)  # somebody may look at it
    return (weights * real[:, None, :, None]).amax(dim=1).sum(dim=1)


def run(module: nn.Module, inputs: Mapping[str, Any], site: str, kept: Tensor, tokens: int) -> tuple[Any, Tensor | None]:
    """What the eager model gives without looking at dropped tokens, and the scores at the site.

    Returns:
        (its output; (batch, tokens) scores, None where the site is not one call of attention).
    """
    mode = Masked(module, site.partition("@")[0], kept, tokens)
    try:
        with torch.no_grad(), mode:
            output = module(**inputs)
    finally:
        for handle in mode.handles:
            handle.remove()
    return output, mode.scores
