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
from mfcompile.passes.program_editor import SCORING, ProgramEditor
from mfcompile.passes.token_attention import NEGLIGIBLE
from mfcompile.passes.token_axis import Carried, Side, TokenAxisError
from mfcompile.passes.token_cutting import put_back, take
from mfcompile.passes.token_merging import (
    MergedRow,
    best_dropped,
    mask_uses,
    merge_rest,
    spell_out_causal,
    take_with_merged,
)
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
        outputs: "restore" or "shorter".
    """

    scorer: TokenScorer
    rest: str
    restore: str
    outputs: str = "restore"


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
        listed: places of the program's outputs that are shorter already -> positions of what they list; extended.

    Raises:
        InputError: the request cannot be met at this site.
    """

    def __init__(
        self, editor: ProgramEditor, plan: SitePlan, keep: Keep, options: CutOptions, listed: dict[int, fx.Node]
    ) -> None:
        self.editor = editor
        self.plan = plan
        self.options = options
        self.listed = listed
        self.name = plan.attention.name
        self.protection = self._protect()
        self.count = kept_count(keep, plan.tokens, self.protection.count, self.name)
        self.merged: MergedRow | None = None
        if options.rest == "merge" and self.count < plan.tokens:
            spell_out_causal(editor, self.protection.flow.carried)
            self.protection = self._protect()
            self.merged = MergedRow(self.count - self.protection.kept.suffix)
        self.flow = self.protection.flow
        self._masks = {} if self.merged is None else mask_uses(editor.graph.nodes)
        self._sides: dict[tuple[Any, ...], fx.Node] = {}
        self._kept: dict[int, fx.Node] = {}
        self._dropped: list[fx.Node] = []
        """With a merged token: (batch, 1) position of the best dropped one, (batch, tokens) whether a token is in it."""
        self._indices: dict[tuple[fx.Node, int], fx.Node] = {}
        self._notes: list[Diagnostic] = []

    def _protect(self) -> Protection:
        try:
            return protect(self.plan, self.editor.order())
        except TokenAxisError as error:
            raise InputError(f"tokens cannot be cut at {self.name} behind the sites before it: {error}") from error

    @property
    def after(self) -> int:
        """Tokens behind the site."""
        return self.count + int(self.merged is not None)

    def notes(self) -> list[Diagnostic]:
        """What means something else from now on."""
        reduced = [Diagnostic(f"{self.name} at {node.name}", reason) for node, reason in self.flow.notes]
        return [*reduced, *self._notes]

    def run(self, later: Sequence[SitePlan]) -> TokenCut:
        """Cut, and carry the plans of later sites over."""
        before = {operand: node_sizes(operand) for _, operand in self.flow.barriers}
        stream = self._cut_stream()
        blocked = set(self.flow.barriers)
        for node in self._readers():
            if (node, self.plan.point) not in blocked:
                node.replace_input_with(self.plan.point, stream)
            for operand, side in self.flow.sides.get(node, {}).items():
                node.replace_input_with(operand, self._side(node, side))
            if node in self.flow.carried:
                self._resize(node, self.flow.carried[node])
                self.editor.refresh(node)
        restored = self._restore(before, stream)
        for node, (_, index) in self.flow.indices.items():
            node.replace_input_with(index, self._moved(index))
        for plan in later:
            if plan.point in self.flow.carried:
                self._carry_over(plan)
        self.editor.sort()
        counts = (self.flow.size, self.count, self.protection.count)
        return TokenCut(self.name, *counts, self.merged is not None, len(self._sides), restored)

    def _readers(self) -> list[fx.Node]:
        """Nodes that read cut tokens, in the order in which they are computed."""
        wanted = (set(self.flow.carried) | self.flow.readers) - {self.plan.point}
        return [node for node in self.editor.graph.nodes if node in wanted]

    def _cut_stream(self) -> fx.Node:
        """Score, choose, gather; gives the node of the cut stream."""
        plan, protection, merged = self.plan, self.protection, self.merged
        attention, count = plan.attention, len(plan.attention.operands)
        masks = [] if plan.image_mask is None else [plan.image_mask]

        def cut(*tensors: Tensor) -> tuple[Tensor, ...]:
            stream, placed = tensors[count], tensors[count + 1 :]
            states = stream.movedim((plan.batch, plan.token), (0, 1)).flatten(2)
            logits = attention.logits(*tensors[:count])
            weights, valid = weigh(logits, states.shape[0], attention.masked, NEGLIGIBLE)
            indices = placed[len(masks) :]
            protected = _protected(protection, valid, placed[: len(masks)], indices)
            evidence = TokenEvidence(weights, states, valid, _readout(protection, valid, indices), plan.live_heads)
            score = self.options.scorer(evidence)
            if score.shape != valid.shape:
                raise InputError(
                    f"the scorer gives {tuple(score.shape)} at {self.name}, not (batch, tokens), {tuple(valid.shape)}"
                )
            kept = keep_best(score, protected, valid, self.count)
            taken = take(stream, kept, [plan.token], Place(plan.batch))
            if merged is None:
                return kept, taken
            rest = merge_rest(states, kept, score.float(), valid)
            sizes = [size for axis, size in enumerate(stream.shape) if axis not in (plan.batch, plan.token)]
            row = rest.reshape(*rest.shape[:2], *sizes).movedim((0, 1), (plan.batch, plan.token))
            return kept, merged.insert(taken, row, plan.token), *best_dropped(score, kept, valid)

        operands = [*attention.operands, plan.point, *masks, *protection.indices]
        kept, stream, *self._dropped = self.editor.insert(cut, operands, plan.point, marks={SCORING: True})
        self._kept[0] = kept
        return stream

    def _kept_behind(self, offset: int) -> fx.Node:
        """Kept positions of a tensor without its first tokens."""
        if offset not in self._kept:
            (self._kept[offset],) = self.editor.insert(lambda kept: kept[:, offset:] - offset, [self._kept[0]], self.plan.point)
        return self._kept[offset]

    def _moved(self, index: fx.Node, offset: int = 0) -> fx.Node:
        """(batch,) positions among the kept tokens, of positions among all behind an offset."""
        key, merged = (index, offset), self.merged

        def moved(kept: Tensor, index: Tensor) -> Tensor:
            before = (kept < index[:, None]).sum(dim=1)
            before = before if merged is None else before + (before >= merged.at - offset)
            return before.to(index.dtype)

        if key not in self._indices:
            (self._indices[key],) = self.editor.insert(moved, [self._kept_behind(offset), index], self.plan.point)
        return self._indices[key]

    def _side(self, reader: fx.Node, side: Side) -> fx.Node:
        mask, merged = self._masks.get((reader, side.operand)), self.merged
        key = (*side.key, mask)
        if key not in self._sides:
            axes, offset = sorted(side.axes), side.offset

            def cut(tensor: Tensor, kept: Tensor, *dropped: Tensor) -> Tensor:
                if merged is None:
                    return take(tensor, kept, axes, side.batch, side.lead)
                best, members = dropped
                rows = merged.insert(kept, best) - offset
                return take_with_merged(
                    tensor, rows, members[:, offset:], axes, side.batch, side.lead, merged.at - offset, mask
                )

            kept = self._kept_behind(offset) if merged is None else self._kept[0]
            (self._sides[key],) = self.editor.insert(cut, [side.operand, kept, *self._dropped], self.plan.point)
        return self._sides[key]

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

    def _restore(self, before: dict[fx.Node, tuple[Any, ...]], stream: fx.Node) -> tuple[str, ...]:
        """All places again for readers that need them; they keep the sizes they had."""
        made: dict[fx.Node, fx.Node] = {}
        for reader, operand in self.flow.barriers:
            if reader.op == "output" and self.options.outputs == "shorter":
                self._list_kept(reader, operand)
                reader.replace_input_with(operand, stream if operand is self.plan.point else operand)
                continue
            if operand is self.plan.point:
                continue
            if operand not in made:
                made[operand] = self._put_back(reader, operand, before[operand])
            reader.replace_input_with(operand, made[operand])
        return tuple(dict.fromkeys(operand.name for operand in made))

    def _list_kept(self, output: fx.Node, operand: fx.Node) -> None:
        """Positions, among all tokens, of those that an output lists; -1 for the merged one."""
        offset, merged = self.flow.carried[operand].offset, self.merged

        def positions(kept: Tensor, *earlier: Tensor) -> Tensor:
            found = earlier[0].gather(1, kept[:, offset:] - offset) if earlier else kept[:, offset:] - offset
            if merged is None:
                return found
            return MergedRow(merged.at - offset).insert(found, torch.full_like(found[:, :1], -1))

        places = [place for place, value in enumerate(output.args[0]) if value is operand]  # type: ignore[arg-type]
        for place in places:
            earlier = [self.listed[place]] if place in self.listed else []
            (self.listed[place],) = self.editor.insert(positions, [self._kept[0], *earlier], self.plan.point)

    def _put_back(self, reader: fx.Node, operand: fx.Node, size_before: tuple[Any, ...]) -> fx.Node:
        carried, point, merged = self.flow.carried[operand], self.plan.point, self.merged
        axes, batch = sorted(place.axis for place in carried.tokens), carried.batch
        assert batch is not None  # following the axis looked
        size = self.flow.length(carried)
        is_stream = axes == [self.plan.token] and batch == Place(self.plan.batch)
        same = node_sizes(point)
        fits = (*same[: self.plan.token], size, *same[self.plan.token + 1 :]) == size_before
        is_last = self.options.restore == "last" and is_stream and fits
        if self.options.restore == "last" and not is_last:
            self._notes.append(_no_last_state(self.name, reader, operand, size_before, same))

        def back(tensor: Tensor, kept: Tensor, *full: Tensor) -> Tensor:
            if merged is not None:
                for axis in axes:
                    tensor = merged.remove(tensor, axis, carried.offset)
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
            merged = self.merged

            def cut(mask: Tensor, kept: Tensor) -> Tensor:
                taken = take(mask, kept, [1], Place(0))
                return taken if merged is None else merged.insert(taken, torch.ones_like(taken[:, :1]))

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


def _no_last_state(site: str, reader: fx.Node, operand: fx.Node, wanted: Sequence[Any], known: Sequence[Any]) -> Diagnostic:
    what = "an output" if reader.op == "output" else f"{reader.name} ({operator_name(reader)})"
    return Diagnostic(
        f"{site} at {operand.name}",
        f"restore='last' is not possible for what {what} reads: it has sizes {list(wanted)}, and the last state of a dropped "
        f"token has those of the stream, {list(known)}; dropped tokens are zero there",
    )
