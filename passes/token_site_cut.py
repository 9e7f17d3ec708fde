"""Tokens cut at one site: the score put in, the stream and its side inputs gathered, sizes rewritten, read-outs restored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mfcompile.errors import InputError, PassError
from mfcompile.graph import Diagnostic
from mfcompile.passes.operators import operator_name
from mfcompile.passes.program_editor import ProgramEditor
from mfcompile.passes.token_attention import NEGLIGIBLE
from mfcompile.passes.token_axis import Carried, Side, TokenAxisError
from mfcompile.passes.token_cutting import merge_rest, put_back, take, take_in_memory_order
from mfcompile.passes.token_places import Place, node_sizes
from mfcompile.passes.token_scores import TokenEvidence, TokenScorer, keep_best, weigh
from mfcompile.passes.token_sites import Protection, SitePlan, protect

Keep = int | float

_SHAPED = {"view": 1, "reshape": 1, "_unsafe_view": 1, "expand": 1, "broadcast_to": 1, "unflatten": 2}
"""Operator -> position of the argument that lists sizes."""


@dataclass(frozen=True)
class CutOptions:
    """How tokens are cut.

    Attributes:
        scorer: gives the scores.
        rest: "drop" or "merge".
        restore: "zeros" or "last".
    """

    scorer: TokenScorer
    rest: str
    restore: str


@dataclass(frozen=True)
class TokenCut:
    """What was done at one site.

    Attributes:
        site: its name.
        arriving: tokens before.
        kept: tokens after, the merged one not among them.
        protected: of these, how many stay whatever they score.
        merged: one more token stands for the dropped ones.
        sides: tensors that were cut beside the stream.
        restored: nodes that get all places again.
    """

    site: str
    arriving: int
    kept: int
    protected: int
    merged: bool
    sides: int
    restored: tuple[str, ...]


def kept_count(keep: Keep, tokens: int, protected: int, site: str) -> int:
    """Tokens that stay at a site.

    Args:
        keep: an int, or the share of the unprotected tokens, rounded up.
        tokens: tokens that arrive.
        protected: how many of them always stay.
        site: for messages.

    Raises:
        InputError: fewer than the protected ones, none, or more than there are.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise InputError(f"keep[{site!r}] is {keep!r}: give a number of tokens, or a share between 0 and 1")
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            raise InputError(f"keep[{site!r}] is {keep}: a share is above 0 and at most 1.0; a number of tokens is an int")
        count = protected + math.ceil(keep * (tokens - protected) - 1e-9)
    else:
        count = keep
    if not max(1, protected) <= count <= tokens:
        raise InputError(
            f"keep[{site!r}] is {keep}: of {tokens} tokens that arrive, {protected} are protected, so that "
            f"{max(1, protected)} to {tokens} can stay"
        )
    return count


class SiteCut:
    """One site, cut in the editor's graph by ``run``.

    Args:
        editor: of the program.
        plan: the site.
        keep: how many tokens stay.
        options: how.

    Raises:
        InputError: the request cannot be met at this site.
    """

    def __init__(self, editor: ProgramEditor, plan: SitePlan, keep: Keep, options: CutOptions) -> None:
        self.editor = editor
        self.plan = plan
        self.options = options
        self.name = plan.attention.name
        try:
            self.protection: Protection = protect(plan, editor.order())
        except TokenAxisError as error:
            raise InputError(f"tokens cannot be cut at {self.name} behind the sites before it: {error}") from error
        self.flow = self.protection.flow
        self.count = kept_count(keep, plan.tokens, self.protection.count, self.name)
        self.merges = options.rest == "merge" and self.count < plan.tokens
        self._sides: dict[tuple[Any, ...], fx.Node] = {}
        self._kept: dict[int, fx.Node] = {}
        self._indices: dict[tuple[fx.Node, int], fx.Node] = {}
        self._refuse_merge()

    @property
    def after(self) -> int:
        """Tokens behind the site."""
        return self.count + int(self.merges)

    def notes(self) -> list[Diagnostic]:
        """What means something else from now on."""
        return [Diagnostic(f"{self.name} at {node.name}", reason) for node, reason in self.flow.notes]

    def run(self, later: Sequence[SitePlan]) -> TokenCut:
        """Cut, and carry the plans of later sites over."""
        before = {operand: node_sizes(operand) for _, operand in self.flow.barriers}
        stream = self._cut_stream()
        blocked = set(self.flow.barriers)
        for node in self._readers():
            if (node, self.plan.point) not in blocked:
                node.replace_input_with(self.plan.point, stream)
            for operand, side in self.flow.sides.get(node, {}).items():
                node.replace_input_with(operand, self._side(side))
            if node in self.flow.carried:
                self._resize(node, self.flow.carried[node])
                self.editor.refresh(node)
        restored = self._restore(before)
        for node, (_, index) in self.flow.indices.items():
            node.replace_input_with(index, self._moved(index))
        for plan in later:
            if plan.point in self.flow.carried:
                self._carry_over(plan)
        self.editor.sort()
        counts = (self.flow.size, self.count, self.protection.count)
        return TokenCut(self.name, *counts, self.merges, len(self._sides), restored)

    def _refuse_merge(self) -> None:
        if not self.merges:
            return
        sides = [operand.name for operands in self.flow.sides.values() for operand in operands]
        is_plain = (self.plan.batch, self.plan.token, len(node_sizes(self.plan.point))) == (0, 1, 3)
        if sides or self.protection.kept.suffix or not is_plain:
            why = f"{sides[0]} gives every token a row of its own, and the merged one has none" if sides else ""
            why = why or "its last position is read, or its tokens are not (batch, tokens, width)"
            raise InputError(f"tokens of {self.name} cannot be merged: {why}. Use rest='drop'")

    def _readers(self) -> list[fx.Node]:
        """Nodes that read cut tokens, in the order in which they are computed."""
        wanted = (set(self.flow.carried) | self.flow.readers) - {self.plan.point}
        return [node for node in self.editor.graph.nodes if node in wanted]

    def _cut_stream(self) -> fx.Node:
        """Score, choose, gather; gives the node of the cut stream."""
        plan, protection = self.plan, self.protection
        attention, count = plan.attention, len(plan.attention.operands)
        masks = [] if plan.image_mask is None else [plan.image_mask]

        def cut(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            stream, placed = tensors[count], tensors[count + 1 :]
            states = stream.movedim((plan.batch, plan.token), (0, 1)).flatten(2)
            logits = attention.logits(*tensors[:count])
            weights, valid = weigh(logits, states.shape[0], attention.masked, NEGLIGIBLE)
            indices = placed[len(masks) :]
            protected = _protected(protection, valid, placed[: len(masks)], indices)
            evidence = TokenEvidence(weights, states, valid, _readout(protection, valid, indices))
            score = self.options.scorer(evidence)
            if score.shape != valid.shape:
                raise InputError(
                    f"the scorer gives {tuple(score.shape)} at {self.name}, not (batch, tokens), {tuple(valid.shape)}"
                )
            kept = keep_best(score, protected, valid, self.count)
            taken = take_in_memory_order(stream, kept, plan.token, plan.batch)
            if self.merges:
                taken = torch.cat([taken, merge_rest(states, kept, score.float(), valid)], dim=1)
            return kept, taken

        operands = [*attention.operands, plan.point, *masks, *protection.indices]
        kept, stream = self.editor.insert(cut, operands, plan.point)
        self._kept[0] = kept
        return stream

    def _kept_behind(self, offset: int) -> fx.Node:
        """Kept positions of a tensor without its first tokens."""
        if offset not in self._kept:
            (self._kept[offset],) = self.editor.insert(lambda kept: kept[:, offset:] - offset, [self._kept[0]], self.plan.point)
        return self._kept[offset]

    def _moved(self, index: fx.Node, offset: int = 0) -> fx.Node:
        """(batch,) positions among the kept tokens, of positions among all behind an offset."""
        key = (index, offset)
        if key not in self._indices:
            (self._indices[key],) = self.editor.insert(_count_before, [self._kept_behind(offset), index], self.plan.point)
        return self._indices[key]

    def _side(self, side: Side) -> fx.Node:
        if side.key not in self._sides:
            axes = sorted(side.axes)
            (self._sides[side.key],) = self.editor.insert(
                lambda tensor, kept: take(tensor, kept, axes, side.batch, side.lead),
                [side.operand, self._kept_behind(side.offset)],
                self.plan.point,
            )
        return self._sides[side.key]

    def _resize(self, node: fx.Node, carried: Carried) -> None:
        """Sizes that a view or an expansion lists: the number of tokens, where the token axis is."""
        name = operator_name(node)
        if name not in _SHAPED:
            return
        at = _SHAPED[name]
        listed = list(node.args[at])  # type: ignore[arg-type]
        first = int(node.args[1]) % len(node_sizes(node.args[0])) if name == "unflatten" else 0  # type: ignore[arg-type]
        old, new = self.flow.length(carried), self.after - carried.offset
        for place in carried.tokens:
            axis = place.axis - first
            if not 0 <= axis < len(listed) or listed[axis] == -1:
                continue
            if isinstance(listed[axis], int):
                listed[axis] = listed[axis] // old * new
            elif -1 not in listed and name != "expand":
                listed[axis] = -1
            else:
                raise PassError(f"{node.name} lists a computed size for tokens and samples together, which cannot be rewritten")
        node.update_arg(at, listed)

    def _restore(self, before: dict[fx.Node, tuple[Any, ...]]) -> tuple[str, ...]:
        """All places again for readers that need them; they keep the sizes they had."""
        made: dict[fx.Node, fx.Node] = {}
        for reader, operand in self.flow.barriers:
            if operand is self.plan.point:
                continue
            if operand not in made:
                made[operand] = self._put_back(operand, before[operand])
            reader.replace_input_with(operand, made[operand])
        return tuple(dict.fromkeys(operand.name for operand in made))

    def _put_back(self, operand: fx.Node, size_before: tuple[Any, ...]) -> fx.Node:
        carried, point = self.flow.carried[operand], self.plan.point
        axes, batch = sorted(place.axis for place in carried.tokens), carried.batch
        assert batch is not None  # following the axis looked
        size, count = self.flow.length(carried), self.count - carried.offset
        is_stream = axes == [self.plan.token] and batch == Place(self.plan.batch)
        same = node_sizes(point)
        fits = (*same[: self.plan.token], size, *same[self.plan.token + 1 :]) == size_before
        is_last = self.options.restore == "last" and is_stream and fits

        def back(tensor: Tensor, kept: Tensor, *full: Tensor) -> Tensor:
            for axis in axes if self.merges else ():
                tensor = _leading(tensor, axis, 0, count)
            onto = _leading(full[0], self.plan.token, carried.offset, carried.offset + size) if full else None
            return put_back(tensor, kept, axes, batch, size, onto)

        operands = [operand, self._kept_behind(carried.offset), *([point] if is_last else [])]
        return self.editor.insert(back, operands, operand)[0]

    def _carry_over(self, plan: SitePlan) -> None:
        """Protected places of a later site of the same stream, as they are behind this cut."""
        offset = self.flow.carried[plan.point].offset
        front = self.protection.kept.prefix - offset
        if self.protection.middle:
            raise InputError(
                f"tokens cannot be cut at {plan.attention.name} behind {self.name}: protected tokens lie between others, and "
                f"where they are then differs from sample to sample. Cut at one of the two"
            )
        plan.indices = tuple(self._moved(index, offset) for index in plan.indices)
        shift = self.after - self.flow.size
        plan.static = frozenset(item if item < front else item + shift for item in plan.static)
        if plan.image_mask is not None:
            merges = self.merges

            def cut(mask: Tensor, kept: Tensor) -> Tensor:
                taken = take(mask, kept, [1], Place(0))
                return torch.cat([taken, torch.ones_like(taken[:, :1])], dim=1) if merges else taken

            (plan.image_mask,) = self.editor.insert(cut, [plan.image_mask, self._kept_behind(0)], self.plan.point)


def _leading(tensor: Tensor, axis: int, start: int, end: int) -> Tensor:
    """Positions start to end along an axis."""
    return tensor[(*[slice(None)] * axis, slice(start, end))]


def _protected(protection: Protection, valid: Tensor, masks: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """(batch, tokens) bool: what stays whatever it scores."""
    tokens = int(valid.shape[1])
    places = torch.arange(tokens)
    kept = protection.kept
    chosen = (places < kept.prefix) | (places >= tokens - kept.suffix)
    for position in sorted(protection.middle):
        chosen = chosen | (places == position)
    protected = chosen[None, :] | torch.zeros_like(valid)
    for index in indices:
        protected = protected | (places[None, :] == index[:, None])
    for mask in masks:
        protected = protected | ~(mask if mask.ndim == 2 else mask.flatten(2)[:, :, 0])
    return protected


def _readout(protection: Protection, valid: Tensor, indices: Sequence[Tensor]) -> Tensor | None:
    """(batch,) position of the token that is read in the end."""
    if indices:
        return indices[0].long()
    if not protection.kept.prefix and not protection.kept.suffix:
        return None
    first = 0 if protection.kept.prefix else int(valid.shape[1]) - 1
    return torch.zeros_like(valid[:, 0], dtype=torch.int64) + first


def _count_before(kept: Tensor, index: Tensor) -> Tensor:
    """(batch,) place of a kept position among the kept ones: how many of them come before it."""
    return (kept < index[:, None]).sum(dim=1).to(index.dtype)
