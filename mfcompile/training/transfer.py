"""Masks of one model carried over to another that shares a trunk with it: retrieval to captioning to VQA."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mfcompile.errors import InputError
from mfcompile.frontends.unwrapping import unwrap
from mfcompile.masks import MaskSet, PackedMask


@dataclass(frozen=True)
class MaskTransfer:
    """Masks under the names of another model, and what did not match.

    Attributes:
        masks: for the other model (``mask_module``); the fingerprint is dropped, regions and new values go with the masks.
        matched: weight of the other model -> weight that its mask was made for.
        unmatched: weight whose mask went nowhere -> why.
        dense: matrices of the other model, of two or more dimensions, that got no mask; a tied one under its first name.
    """

    masks: MaskSet
    matched: Mapping[str, str]
    unmatched: Mapping[str, str]
    dense: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{len(self.matched)} weights got masks, {len(self.unmatched)} masks went nowhere, {len(self.dense)} matrices stay "
            f"dense"
        ]
        moves = Counter(_changed(source, target) for target, source in self.matched.items() if source != target)
        lines += [f"{count} from {source or 'the root'} to {target or 'the root'}" for (source, target), count in moves.items()]
        lines += [f"no place for {source}: {reason}" for source, reason in self.unmatched.items()]
        return "\n".join(lines)


def transfer_masks(
    masks: MaskSet, module: nn.Module, names: Mapping[str, str | Sequence[str]] | None = None, *, strict: bool = False
) -> MaskTransfer:
    """Give masks the names of another model's weights.

    A mask goes where ``names`` sends it; else to the weight of its own name; else to the one whose name ends alike and differs
    in a prefix only (``clip.text.layers.0.q.weight`` and ``text.layers.0.q.weight``, ``text_encoder.layer.0.q.weight`` and
    ``text_decoder.bert.layer.0.q.weight``): shapes and the numbers of layers must be equal, and no second weight may fit as
    well. A mask for which several do is left, with their names.

    Args:
        masks: FQN -> mask.
        module: the other model; it is not changed.
        names: pattern of masked weights -> their names in the other model, or several of them: a path of a submodule
            ({"text_encoder": "decoder.bert"}), a glob whose wildcards stand for the same in both ({"clip.*.layers.*":
            "*.blocks.*"}), or ``re:`` and a regular expression with ``\\1`` in the name.
        strict: refuse masks that went nowhere.

    Raises:
        InputError: a pattern matches no mask, sends masks where the model has no weight at all, or cannot be used; or a mask
            went nowhere (``strict``).
    """
    module, _ = unwrap(module)
    first: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    alias: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        alias[name] = first.setdefault(id(parameter), name)
        shapes[name] = tuple(parameter.shape)
    wanted = _by_names(masks, names or {}, shapes)
    unmatched: dict[str, str] = {}
    found: dict[str, str] = {}

    def claim(source: str, target: str) -> None:
        if target not in shapes:
            unmatched[source] = f"the model has no weight called {target}"
        elif shapes[target] != masks.packed[source].shape:
            unmatched[source] = f"{target} is {shapes[target]}, the mask {masks.packed[source].shape}"
        else:
            _place(source, alias[target], masks, found, unmatched)

    for source, targets in wanted.items():
        for target in targets:
            claim(source, target)
    rest = [source for source in masks if source not in wanted]
    for source in rest:
        if source in shapes:
            claim(source, source)
    rest = [source for source in rest if source not in shapes]
    free = [name for name in shapes if name == alias[name] and name not in found and len(shapes[name]) > 1]
    for source, target in _by_prefix(rest, free, masks, shapes, unmatched):
        claim(source, target)
    packed = {target: masks.packed[source] for target, source in found.items()}
    regions = {target: masks.regions[source] for target, source in found.items() if source in masks.regions}
    values = {target: masks.new_values[source] for target, source in found.items() if source in masks.new_values}
    dense = tuple(name for name in shapes if name == alias[name] and len(shapes[name]) > 1 and name not in found)
    moved = replace(masks, packed=packed, regions=regions, new_values=values, refitted={}, fingerprint="")
    result = MaskTransfer(moved, found, {source: unmatched[source] for source in masks if source in unmatched}, dense)
    if strict and unmatched:
        shown = "; ".join(f"{source}: {reason}" for source, reason in list(unmatched.items())[:4])
        raise InputError(
            f"{len(unmatched)} of {len(masks)} masks have no place in {type(module).__name__} ({shown}). Say where they go "
            f"(names={{pattern: name}}), or pass strict=False"
        )
    return result


def _place(source: str, target: str, masks: MaskSet, found: dict[str, str], unmatched: dict[str, str]) -> None:
    """Note a match, unless a tied weight has another mask already."""
    other = found.setdefault(target, source)
    if other != source and not _equal(masks.packed[other], masks.packed[source]):
        unmatched[source] = f"{target} has the mask of {other} already, which is another one"


def _equal(one: PackedMask, other: PackedMask) -> bool:
    return one.shape == other.shape and bool((one.bits == other.bits).all())


def _changed(source: str, target: str) -> tuple[str, str]:
    """The parts in which two names begin, without the end that they have in common."""
    ours, theirs = source.split("."), target.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours, theirs = ours[:-1], theirs[:-1]
    return ".".join(ours), ".".join(theirs)


def _by_names(
    masks: MaskSet, names: Mapping[str, str | Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """Masked weight -> where the user sends it."""
    wanted: dict[str, list[str]] = {}
    for pattern, given in names.items():
        expression = _expression(pattern)
        hits = [(source, match) for source in masks if (match := expression.fullmatch(source))]
        if not hits:
            raise InputError(
                f"names: the pattern {pattern!r} matches no mask; the masks are of {', '.join(list(masks)[:3])}, ..."
            )
        for target in [given] if isinstance(given, str) else given:
            template = _template(pattern, target)
            try:
                sent = [(source, match.expand(template)) for source, match in hits]
            except (re.error, IndexError) as error:
                raise InputError(f"names: {target!r} does not fit the pattern {pattern!r}: {error}") from error
            if all(name not in shapes for _, name in sent):
                near = difflib.get_close_matches(sent[0][1], shapes, n=3)
                raise InputError(
                    f"names: {pattern!r} sends {sent[0][0]} to {sent[0][1]}, and the model has no weight of that name, nor of "
                    f"any other that {target!r} stands for. Nearest names: {', '.join(near) or 'none'}"
                )
            for source, name in sent:
                wanted.setdefault(source, []).append(name)
    return wanted


_WILDCARD = re.compile(r"\*|\?|\[[^]]*\]")


def _expression(pattern: str) -> re.Pattern[str]:
    """What matches the whole name of a weight, with a group for everything that a target refers to."""
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except re.error as error:
            raise InputError(f"names: the pattern {pattern!r} is not a valid regular expression: {error}") from error
    kinds = {"*": "(.*)", "?": "(.)"}
    pieces, end = [], 0
    for item in _WILDCARD.finditer(pattern):
        pieces += [re.escape(pattern[end : item.start()]), kinds.get(item[0], f"({item[0].replace('[!', '[^')})")]
        end = item.end()
    return re.compile("".join([*pieces, re.escape(pattern[end:]), r"(|\..+)"]))  # the path of a submodule stands for all below


def _template(pattern: str, target: str) -> str:
    """What a match of the pattern is expanded by."""
    if pattern.startswith("re:"):
        return target
    wildcards = _WILDCARD.findall(pattern)
    count = len(_WILDCARD.findall(target))
    if count != len(wildcards):
        raise InputError(
            f"names: {pattern!r} has {len(wildcards)} wildcards and {target!r} {count}: each stands for the same in both"
        )
    numbers = iter(range(1, count + 1))
    return _WILDCARD.sub(lambda _: f"\\g<{next(numbers)}>", target.replace("\\", r"\\")) + f"\\g<{count + 1}>"


def _by_prefix(
    sources: Sequence[str],
    targets: Sequence[str],
    masks: MaskSet,
    shapes: Mapping[str, tuple[int, ...]],
    unmatched: dict[str, str],
) -> list[tuple[str, str]]:
    """Pairs of names that end alike, each the only one of its kind."""
    by_end: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in targets:
        by_end.setdefault((_end(name), shapes[name]), []).append(name)
    fitting: dict[str, list[str]] = {}
    for source in sources:
        lengths = {name: _common_end(source, name) for name in by_end.get((_end(source), masks.packed[source].shape), ())}
        longest = max(lengths.values(), default=0)
        fitting[source] = [name for name, length in lengths.items() if length == longest] if longest else []
        if not fitting[source]:
            unmatched[source] = "no weight of its shape has a name that ends alike"
    asked = Counter(name for names in fitting.values() for name in names)
    pairs = []
    for source, names in fitting.items():
        if len(names) == 1:
            rivals = (
                [other for other in sources if other != source and names[0] in fitting[other]] if asked[names[0]] > 1 else []
            )
            nearer = [other for other in rivals if _common_end(other, names[0]) >= _common_end(source, names[0])]
            if not nearer:
                pairs.append((source, names[0]))
            else:
                unmatched[source] = f"{names[0]} fits {nearer[0]} as well: say which goes there with names"
        elif names:
            unmatched[source] = f"{', '.join(names[:3])} fit alike: say which with names"
    return pairs


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _common_end(source: str, target: str) -> int:
    """How many parts two names have in common at their end; 0 where a layer's number is not among them."""
    ours, theirs = source.split("."), target.split(".")
    count = 0
    while count < min(len(ours), len(theirs)) and ours[-1 - count] == theirs[-1 - count]:
        count += 1
    prefixes = ours[: len(ours) - count], theirs[: len(theirs) - count]
    if any(part.isdigit() for prefix in prefixes for part in prefix):
        return 0
    in_block = any(part.isdigit() for part in ours[len(ours) - count :])
    return count if count > 1 and (in_block or not all(prefixes)) else 0
