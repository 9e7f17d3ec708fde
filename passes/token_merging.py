"""One more token for those that are dropped: its state, and its row in every tensor that gives tokens rows of their own.

The state is the mean of the dropped tokens weighted by their scores, as in MADTP (CVPR 2024). What runs beside the stream
(masks, rotary tables, position embeddings) has a row per token; the merged token's is

- in a table of positions, that of the best-scored token in it: a mean of rotary tables would be no rotation;
- in a mask, as a key: a query may look at it if it might look at *all* that is in it. Where padding alone is masked, this is
  whether any of them may be looked at, since padding is not in it; in a causal mask it lets nobody see what comes later;
- in a mask, as a query: it may look at what *any* of them might look at.

Plain functions of tensors, traced into the graph; and the masks of a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mfcompile.passes.operators import CONTRACTIONS, argument, operator_name
from mfcompile.passes.program_editor import ProgramEditor
from mfcompile.passes.token_attention import NEGLIGIBLE, find_attentions
from mfcompile.passes.token_cutting import take
from mfcompile.passes.token_places import Place, node_sizes

_STEPS = 24
"""How far logits are followed back from a softmax to their product."""


@dataclass(frozen=True)
class MaskUse:
    """How a reader takes an operand that lets attention look or not: its last axis are keys, the one before queries.

    Attributes:
        is_inverted: True stands for what may not be looked at.
    """

    is_inverted: bool = False


@dataclass(frozen=True)
class MergedRow:
    """Where the merged token stands among the kept ones.

    Attributes:
        at: its position behind the cut: at the end, but before protected tokens at the back.
    """

    at: int

    def insert(self, rows: Tensor, row: Tensor, axis: int = 1) -> Tensor:
        """Kept rows with one more at its place."""
        return torch.cat([rows.narrow(axis, 0, self.at), row, rows.narrow(axis, self.at, rows.shape[axis] - self.at)], dim=axis)

    def remove(self, tensor: Tensor, axis: int, offset: int) -> Tensor:
        """A cut tensor without the merged token; ``offset`` leading tokens are gone already."""
        at = self.at - offset
        return torch.cat([tensor.narrow(axis, 0, at), tensor.narrow(axis, at + 1, tensor.shape[axis] - at - 1)], dim=axis)


def merge_rest(states: Tensor, kept: Tensor, score: Tensor, valid: Tensor) -> Tensor:
    """The mean of the tokens that are dropped, weighted by their scores: one more token, as in MADTP (CVPR 2024).

    Args:
        states: (batch, tokens, width).
        kept: (batch, kept) positions.
        score: (batch, tokens), not negative.
        valid: (batch, tokens) bool.

    Returns:
        (batch, 1, width).
    """
    weights = (score.clamp(min=0.0) * valid).scatter(1, kept, 0.0)
    total = weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (weights / total).to(states.dtype)[:, None, :] @ states


def best_dropped(score: Tensor, kept: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The dropped token of the highest score, and which tokens are dropped and no padding.

    Args:
        score: (batch, tokens).
        kept: (batch, kept) positions.
        valid: (batch, tokens) bool.

    Returns:
        (batch, 1) position, of padding where nothing else is dropped; (batch, tokens) float, 1 for those in the merged token.
    """
    limits = torch.finfo(torch.float32)
    ranked = torch.where(valid, score.float().nan_to_num(nan=0.0, posinf=limits.max / 4, neginf=limits.min / 4), limits.min / 2)
    ranked = ranked.scatter(1, kept, limits.min)
    best = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :1]
    return best, valid.float().scatter(1, kept, 0.0)


def take_with_merged(
    tensor: Tensor,
    rows: Tensor,
    members: Tensor,
    axes: Iterable[int],
    batch: Place,
    lead: int,
    at: int,
    mask: MaskUse | None,
) -> Tensor:
    """The kept tokens of a side input, with the merged token's row at its place.

    Args:
        tensor: any tensor with a token axis.
        rows: (batch, kept + 1) positions, the best dropped token's at ``at``.
        members: (batch, tokens), 1 for tokens that are in the merged one.
        axes: token axes, counted after ``lead`` axes of size one are put in front.
        batch: batch axis, likewise.
        lead: axes to put in front.
        at: place of the merged token.
        mask: how it masks logits; None where it is a table of positions or anything else.
    """
    for axis in sorted(axes, reverse=True):  # keys before queries: what all may see, then who sees any of it
        taken = take(tensor, rows, [axis], batch, lead)
        if mask is not None and axis >= taken.ndim - 2 and (taken.dtype == torch.bool or taken.dtype.is_floating_point):
            for _ in range(lead):
                tensor = tensor.unsqueeze(0)
            among = _aligned(members, tensor, axis, batch) > 0
            own = _masked_row(tensor, among, taken.narrow(axis, at, 1), axis, axis == taken.ndim - 1, mask.is_inverted)
            behind = taken.narrow(axis, at + 1, taken.shape[axis] - at - 1)
            taken = torch.cat([taken.narrow(axis, 0, at), own, behind], dim=axis)
        tensor, lead = taken, 0
    return tensor


def _aligned(members: Tensor, tensor: Tensor, axis: int, batch: Place) -> Tensor:
    """``members`` with the tensor's axes, of size one but for samples and tokens."""
    if batch.inner != 1:
        members = members[:, None, :].expand(-1, batch.inner, -1).reshape(-1, members.shape[1])
    shape = [1] * tensor.ndim
    shape[batch.axis], shape[axis] = members.shape
    return (members if batch.axis < axis else members.transpose(0, 1)).reshape(shape)


def _masked_row(tensor: Tensor, among: Tensor, best: Tensor, axis: int, is_key: bool, is_inverted: bool) -> Tensor:
    """The row of the merged token in a mask, along one axis.

    Args:
        tensor: the mask, with all tokens along ``axis``.
        among: which of them are in the merged token; broadcasts to the mask.
        best: the row of the best of them; its numbers are taken where it may be looked at (a bias of positions).
        axis: of tokens.
        is_key: they are looked at.
        is_inverted: of a bool mask, True stands for what may not be looked at.
    """
    is_any = among.any(dim=axis, keepdim=True)
    if tensor.dtype == torch.bool:
        seen = ~tensor if is_inverted else tensor
        found = (seen | ~among).all(dim=axis, keepdim=True) & is_any if is_key else (seen & among).any(dim=axis, keepdim=True)
        return ~found if is_inverted else found
    limits = torch.finfo(tensor.dtype)
    if is_key:
        lowest = torch.where(among, tensor, limits.max).amin(dim=axis, keepdim=True)
        return torch.where(is_any & (lowest <= NEGLIGIBLE), lowest, best)
    highest = torch.where(among, tensor, limits.min).amax(dim=axis, keepdim=True)
    return torch.where(is_any & (best <= NEGLIGIBLE), highest, best)


def mask_uses(nodes: Iterable[fx.Node]) -> Mapping[tuple[fx.Node, fx.Node], MaskUse]:
    """(reader, operand) -> how, for every operand by which an attention's logits are masked or biased."""
    found: dict[tuple[fx.Node, fx.Node], MaskUse] = {}
    for attention in find_attentions(nodes, {}):
        if attention.written is None:
            mask = argument(attention.node, "attn_mask", 3)
            if isinstance(mask, fx.Node):
                found[attention.node, mask] = MaskUse()
            continue
        current, seen = [attention.written], 0
        while current and seen < _STEPS:
            node, seen = current.pop(), seen + 1
            if operator_name(node) in CONTRACTIONS or len(node_sizes(node)) < 3:
                continue
            for operand in node.all_input_nodes:
                found[node, operand] = MaskUse(_is_inverted(node, operand))
                current.append(operand)
    return found


def _is_inverted(node: fx.Node, operand: fx.Node) -> bool:
    """A bool operand stands for what is masked: filled in, or where the lowest number comes from the first branch."""
    if operator_name(node) == "masked_fill":
        return operand is argument(node, "mask", 1)
    if operator_name(node) == "where" and operand is argument(node, "condition", 0):
        first, second = argument(node, "self", 1), argument(node, "other", 2)
        sizes = [len(node_sizes(item)) if isinstance(item, fx.Node) else 0 for item in (first, second)]
        return sizes[0] < sizes[1]
    return False


def spell_out_causal(editor: ProgramEditor, nodes: Iterable[fx.Node]) -> None:
    """Give attentions that are causal by a flag the mask that the flag stands for, so that it can be cut.

    Args:
        editor: of the program.
        nodes: attentions among others; what is none, or not causal, stays as it is.
    """
    for node in nodes:
        if operator_name(node) != "scaled_dot_product_attention" or not argument(node, "is_causal", 5, False):
            continue
        queries, keys = (int(node_sizes(item)[-2]) for item in node.args[:2] if isinstance(item, fx.Node))
        mask = editor.add_constant(torch.ones(queries, keys, dtype=torch.bool).tril())
        given = {key: value for key, value in node.kwargs.items() if key not in {"attn_mask", "is_causal"}}
        named = {"dropout_p": argument(node, "dropout_p", 4, 0.0), "attn_mask": mask, "is_causal": False}
        node.args, node.kwargs = node.args[:3], {**given, **named}
