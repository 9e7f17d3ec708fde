"""Sizes and positions that operators list, as they are when positions of their tensors are gone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from mfcompile.errors import InputError, PassError
from mfcompile.passes.operators import CONVOLUTIONS, argument, operator_name
from mfcompile.passes.program_editor import SCORING, ProgramEditor
from mfcompile.passes.structured_relations import SPLITS, dims
from mfcompile.passes.token_ties import axis_of

Cuts = Mapping[fx.Node, Mapping[int, NDArray[np.bool_]]]
"""Node -> axis -> which of its positions stay."""

_LISTED = {
    "view": 1, "reshape": 1, "_unsafe_view": 1, "expand": 1, "broadcast_to": 1, "unflatten": 2,
    "full": 0, "zeros": 0, "ones": 0, "empty": 0, "new_full": 1, "new_zeros": 1, "new_ones": 1, "new_empty": 1,
}  # fmt: skip
"""Operator -> position of the argument that lists sizes."""

_INFERRING = frozenset({"view", "reshape", "_unsafe_view", "unflatten"})
"""Operators that compute a size that is listed as -1."""


def rewrite(editor: ProgramEditor, cuts: Cuts) -> None:
    """Rewrite what nodes list, and compute all sizes again.

    Args:
        editor: its stored tensors have their new sizes already.
        cuts: what goes; the sizes of nodes that are not there stay.

    Raises:
        InputError: what is left of an operator cannot be written.
        PassError: sizes come out otherwise than the cuts say.
    """
    before = {node: dims(node) for node in editor.graph.nodes}
    changed = {node for node in cuts if node.op == "placeholder"}
    for node in list(editor.graph.nodes):
        if node.op == "call_function" and (node in cuts or not changed.isdisjoint(node.all_input_nodes)):
            _rewrite_node(editor, node, cuts, before)
            editor.refresh(node)
            changed.add(node)
    for node in changed:
        if isinstance(node.meta.get("val"), Tensor):
            expected = list(before[node])
            for axis, kept in cuts.get(node, {}).items():
                expected[axis] = int(kept.sum())
            if list(dims(node)) != expected:
                raise PassError(f"{node.name} has sizes {dims(node)} where {tuple(expected)} must be left of {before[node]}")


def _rewrite_node(editor: ProgramEditor, node: fx.Node, cuts: Cuts, before: Mapping[fx.Node, tuple[int, ...]]) -> None:
    name = operator_name(node)
    if name in _LISTED:
        _resize(editor, node, cuts.get(node, {}), _LISTED[name])
    elif name == "repeat":
        _recount(editor, node, cuts.get(node, {}), before)
    elif name == "repeat_interleave":
        for axis, kept in cuts.get(node, {}).items():
            if before[node.args[0]][axis] == 1:  # type: ignore[index]  # by the schema
                _set(node, "repeats", 1, int(kept.sum()))
    elif name in _POSITIONS:
        source = node.args[0]
        assert isinstance(source, fx.Node)  # by the schema
        _POSITIONS[name](node, before[source], cuts.get(source, {}))
    elif name in CONVOLUTIONS and int(argument(node, "groups", 6, 1)) > 1:
        weight = argument(node, "weight", 1)
        if weight in cuts:
            _set(node, "groups", 6, int(cuts[weight][0].sum()))


def _resize(editor: ProgramEditor, node: fx.Node, own: Mapping[int, NDArray[np.bool_]], at: int) -> None:
    name = operator_name(node)
    listed = list(node.args[at])  # type: ignore[arg-type]
    first = axis_of(node.args[1], len(dims(node.args[0]))) if name == "unflatten" else 0  # type: ignore[arg-type]
    for axis, kept in own.items():
        if not 0 <= axis - first < len(listed) or (isinstance(listed[axis - first], int) and listed[axis - first] == -1):
            continue
        if isinstance(listed[axis - first], int):
            listed[axis - first] = int(kept.sum())
        elif name in _INFERRING and not any(isinstance(item, int) and item == -1 for item in listed):
            listed[axis - first] = -1
        else:
            listed[axis - first] = _scaled(editor, node, listed[axis - first], kept)
    node.update_arg(at, listed)


def _recount(
    editor: ProgramEditor, node: fx.Node, own: Mapping[int, NDArray[np.bool_]], before: Mapping[fx.Node, tuple[int, ...]]
) -> None:
    """Copies along an axis that had one position: as many as stay."""
    source, counts = node.args[0], list(node.args[1])  # type: ignore[arg-type]  # by the schema
    assert isinstance(source, fx.Node)
    added = len(counts) - len(before[source])
    for axis, kept in own.items():
        if axis < added or before[source][axis - added] == 1:
            counts[axis] = int(kept.sum()) if isinstance(counts[axis], int) else _scaled(editor, node, counts[axis], kept)
    node.update_arg(1, counts)


def _scaled(editor: ProgramEditor, node: fx.Node, size: Any, kept: NDArray[np.bool_]) -> fx.Node:
    """A computed size, times the share that stays."""
    count, whole = int(kept.sum()), len(kept)
    shared = gcd(count, whole)
    value = size.meta["val"]
    with editor.graph.inserting_before(node):
        runs = editor.graph.call_function(operator.floordiv, (size, whole // shared))
        scaled = editor.graph.call_function(operator.mul, (runs, count // shared))
    runs.meta["val"] = value // (whole // shared)
    scaled.meta["val"] = runs.meta["val"] * (count // shared)
    return scaled


def _slice(node: fx.Node, before: tuple[int, ...], cut: Mapping[int, NDArray[np.bool_]]) -> None:
    axis = axis_of(argument(node, "dim", 1, 0), len(before))
    if axis not in cut:
        return
    bounds = slice(argument(node, "start", 2), argument(node, "end", 3), argument(node, "step", 4, 1))
    places = _left(range(before[axis])[bounds], cut[axis])
    steps = set(np.diff(places))
    if not len(places) or len(steps) > 1:
        raise InputError(f"what is left of {node.name} (slice) is no slice; remove other elements")
    step = int(steps.pop()) if steps else 1
    node.args = (node.args[0], axis, int(places[0]), int(places[-1]) + 1, step)
    node.kwargs = {}


def _narrow(node: fx.Node, before: tuple[int, ...], cut: Mapping[int, NDArray[np.bool_]]) -> None:
    axis = axis_of(argument(node, "dim", 1), len(before))
    if axis in cut:
        start = argument(node, "start", 2)
        places = _left(range(start, start + argument(node, "length", 3)), cut[axis])
        if not len(places):
            raise InputError(f"nothing would be left of {node.name} (narrow); remove other elements")
        node.args, node.kwargs = (node.args[0], axis, int(places[0]), len(places)), {}


def _select(node: fx.Node, before: tuple[int, ...], cut: Mapping[int, NDArray[np.bool_]]) -> None:
    axis = axis_of(argument(node, "dim", 1, 0), len(before))
    if axis in cut:
        places = _left([argument(node, "index", 2) % before[axis]], cut[axis])
        if not len(places) and SCORING not in node.meta:
            raise InputError(f"the position that {node.name} (select) takes would be gone; remove other elements")
        _set(node, "index", 2, int(places[0]) if len(places) else 0)


def _split(node: fx.Node, before: tuple[int, ...], cut: Mapping[int, NDArray[np.bool_]]) -> None:
    is_unbound = operator_name(node) == "unbind"
    axis = axis_of(argument(node, "dim", 1 if is_unbound else 2, 0), len(before))
    if axis not in cut:
        return
    if is_unbound:
        raise InputError(f"{node.name} (unbind) would give fewer tensors than are read; remove other elements")
    ends = np.cumsum([0, *(int(item.shape[axis]) for item in node.meta["val"])])
    parts = [int(cut[axis][start:end].sum()) for start, end in pairwise(ends)]
    if not all(parts):
        raise InputError(f"nothing would be left of an item of {node.name} ({operator_name(node)}); remove other elements")
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], parts, axis), {}


def _left(places: Any, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where those of some positions that stay are afterwards."""
    chosen = np.asarray(places, dtype=np.int64)
    left: NDArray[np.int64] = (np.cumsum(kept) - 1)[chosen[kept[chosen]]]
    return left


def _set(node: fx.Node, name: str, position: int, value: Any) -> None:
    if name in node.kwargs or len(node.args) <= position:
        node.update_kwarg(name, value)
    else:
        node.update_arg(position, value)


_POSITIONS: dict[str, Callable[[fx.Node, tuple[int, ...], Mapping[int, NDArray[np.bool_]]], None]] = {
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(SPLITS, _split),
}
