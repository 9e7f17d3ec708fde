"""What the tokens of a stream are made of, position by position: learned ones, text, image, image placed among text by a mask.

A stream is followed backwards to where its token axis begins. Concatenations put positions side by side and slices take some
of them, so that what a position is does not get lost in layers that take a stream apart and join it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mfcompile.passes.modalities import TEXT
from mfcompile.passes.operators import argument, operator_name
from mfcompile.passes.token_places import Place, node_sizes
from mfcompile.passes.token_spread import sources_of

PLACED = "placed by a mask"
"""Label of positions at which a mask decides, per sample, whether they are image or text."""

Labels = Mapping[fx.Node, frozenset[str]]
"""Node -> modalities whose inputs it depends on."""

_JOINS = frozenset({"cat", "concat"})


class OriginError(Exception):
    """The tokens cannot be told apart; not an error of the user, who gets it as a refused site.

    Attributes:
        node: where.
        reason: why.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class Origins:
    """What the tokens of a stream are.

    Attributes:
        kinds: the modalities of every position; none for learned tokens.
        image_mask: (batch, tokens, ...) bool, True for image, where a mask places image among text.
    """

    kinds: tuple[frozenset[str], ...]
    image_mask: fx.Node | None

    @property
    def is_learned(self) -> bool:
        """No token comes from an input."""
        return not any(self.kinds)

    @property
    def content(self) -> frozenset[str]:
        """Modalities of what may be cut: of image and the like where there is any, else of text."""
        every = frozenset[str]().union(*self.kinds) - {PLACED}
        return every - {TEXT} or every

    @property
    def protected(self) -> frozenset[int]:
        """Learned positions, and those of text where others are image."""
        has_image = any(_is_image(kind) for kind in self.kinds)
        return frozenset(at for at, kind in enumerate(self.kinds) if not kind or (has_image and not _is_image(kind)))


def origins_of(stream: fx.Node, axis: int, labels: Labels) -> Origins:
    """What the tokens of a stream are made of.

    Args:
        stream: gives the states.
        axis: of its tokens, of fixed size.
        labels: of every node before it.

    Raises:
        OriginError: a concatenation has a part of a free number, or image is placed in a way that is not known.
    """
    walk = _Walk(labels)
    kinds = walk.kinds_of(stream, Place(axis))
    masks = list(dict.fromkeys(walk.masks))
    if len(masks) > 1:
        raise OriginError(stream, f"image tokens are placed by several masks ({', '.join(item.name for item in masks)})")
    mask = masks[0] if masks else None
    if mask is not None and (node_sizes(mask)[1] != len(kinds) or not all(PLACED in kind for kind in kinds)):
        raise OriginError(mask, "image tokens are placed among some of its tokens only")
    return Origins(kinds, mask)


Key = tuple[fx.Node, Place, int]
"""A node, where its token axis is, and how many tokens that has."""


class _Walk:
    """One walk backwards; without recursion, since models are deep."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.masks: list[fx.Node] = []
        self._known: dict[Key, tuple[frozenset[str], ...]] = {}

    def kinds_of(self, node: fx.Node, place: Place) -> tuple[frozenset[str], ...]:
        start = (node, place, int(node_sizes(node)[place.axis]))
        pending: list[Key] = [start]
        open_: set[Key] = set()
        while pending:
            key = pending[-1]
            if key in self._known:
                pending.pop()
                continue
            sources = self._sources(key)
            missing = [item for item in sources if item not in self._known and item not in open_]
            open_.add(key)
            if missing:
                pending += missing
                continue
            self._known[key] = self._combine(key, [self._known[item] for item in sources if item in self._known])
            pending.pop()
        return self._known[start]

    def _sources(self, key: Key) -> list[Key]:
        node, place, size = key
        name = operator_name(node)
        if _image_mask(node, self.labels) is not None:
            return []
        if name in _JOINS and place.is_whole and place.axis == _axis(node):
            parts = [(item, place, node_sizes(item)[place.axis]) for item in _parts(node)]
            if not all(isinstance(count, int) for _, _, count in parts):
                raise OriginError(node, "it joins tokens of which one part has a free number")
            return parts
        if name == "slice" and place.is_whole and place.axis == _axis(node) and argument(node, "step", 4, 1) == 1:
            source = node.args[0]
            assert isinstance(source, fx.Node)  # by the schema
            length = node_sizes(source)[place.axis]
            return [(source, place, length)] if isinstance(length, int) else []
        return [(source, at, size) for source, at in sources_of(node, place, size)]

    def _combine(self, key: Key, found: Sequence[tuple[frozenset[str], ...]]) -> tuple[frozenset[str], ...]:
        node, place, size = key
        name = operator_name(node)
        mask = _image_mask(node, self.labels)
        if mask is not None:
            self.masks.append(_placed_by(node, place, size, mask))
            return (self.labels[node] | {PLACED},) * size
        if not found:
            return (self.labels[node],) * size
        if name in _JOINS and place.axis == _axis(node) and place.is_whole:
            return tuple(kind for part in found for kind in part)
        if name == "slice" and len(found[0]) != size:
            start = argument(node, "start", 2) or 0
            first = max(start + len(found[0]), 0) if start < 0 else min(start, len(found[0]))
            return found[0][first : first + size]
        return tuple(frozenset[str]().union(*kinds) for kinds in zip(*found, strict=True))


def _axis(node: fx.Node) -> int:
    return int(argument(node, "dim", 1, 0)) % max(len(node_sizes(node)), 1)


def _parts(node: fx.Node) -> list[fx.Node]:
    return [item for item in argument(node, "tensors", 0) if isinstance(item, fx.Node)]


def _is_image(labels: frozenset[str]) -> bool:
    return bool(labels - {TEXT})


def _image_mask(node: fx.Node, labels: Labels) -> fx.Node | None:
    """The mask by which an operator puts image tokens among text tokens."""
    name = operator_name(node)
    if name == "masked_scatter":
        base, mask, source = (argument(node, key, at) for at, key in enumerate(("self", "mask", "source")))
    elif name == "where":
        mask, source, base = (argument(node, key, at) for at, key in enumerate(("condition", "self", "other")))
    elif name == "index_put":
        base, source = argument(node, "self", 0), argument(node, "values", 2)
        indices = argument(node, "indices", 1)
        mask = indices[0] if len(indices) == 1 else None
    else:
        return None
    nodes = [item for item in (base, mask, source) if isinstance(item, fx.Node)]
    if len(nodes) != 3 or getattr(mask.meta.get("val"), "dtype", None) != torch.bool:
        return None
    return mask if _is_image(labels[source]) and not _is_image(labels[base]) else None


def _placed_by(node: fx.Node, place: Place, size: int, mask: fx.Node) -> fx.Node:
    """The mask as (batch, tokens, ...); one over all numbers of the states is followed back to where it was that."""
    is_index = operator_name(node) == "index_put"
    current, at = mask, place
    while not is_index and not _is_per_token(current, at, size):
        sources: list[tuple[Any, Place]] = [item for item in sources_of(current, at, size) if item[0] is current.args[0]]
        if not sources:
            raise OriginError(
                node, f"image tokens are placed by a mask of sizes {node_sizes(mask)}, which is not (batch, tokens, ...)"
            )
        current, at = sources[0]
    sizes, whole = node_sizes(current), node_sizes(node)
    if is_index and (place != Place(1) or len(sizes) < 2 or sizes[1] != whole[1]):
        raise OriginError(node, f"image tokens are placed by a mask of sizes {sizes}, which is not (batch, tokens, ...)")
    return current


def _is_per_token(mask: fx.Node, place: Place, size: int) -> bool:
    return place == Place(1) and len(node_sizes(mask)) in (2, 3) and node_sizes(mask)[1] == size
