"""Variants: criterion x allocation x pattern x update in one word, as ``mfcompile compare`` takes them.

The word is ``CRITERION[,OPTION=VALUE...][@ALLOCATION][:PATTERN][+UPDATE[,OPTION=VALUE...]]``: ``multiflow``,
``multiflow@score-global``,
``wanda:2:4``, ``magnitude@uniform:4x1``, ``multiflow+sparsegpt``, ``itersnip,steps=20,batches_per_step=10``. A name may end
in ``+`` (``chita++``, ``chita+++sparsegpt``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mfcompile.errors import InputError
from mfcompile.passes.criteria.base import Need, Pruner
from mfcompile.passes.criteria.registry import names, pruner
from mfcompile.passes.mask_selection import SelectionOptions, check_options
from mfcompile.passes.sparsity_patterns import UNSTRUCTURED, parse_pattern

GRAMMAR = "CRITERION[,OPTION=VALUE...][@ALLOCATION][:PATTERN][+UPDATE[,OPTION=VALUE...]]"

FLOOR = "random"
"""What every other pruner must beat."""

_LEFT_OUT = frozenset({"multiflow-inverted"})
"""An ablation that shows what not to do: no choice for a user."""

_WITH_GRADIENTS = ("snip",)
"""Compared by default where there is a loss: one pass of gradients, while others take many."""

_WORD = re.compile(
    r"(?P<criterion>[^,@:]*?)(?P<options>(?:,[^,@:+]*)*)"
    r"(?:@(?P<allocation>[^,:+]+))?(?::(?P<pattern>[^,@+]+))?(?:\+(?P<update>[^,@:+]+)(?P<update_options>(?:,[^,@:+]*)*))?"
)

_KEYS = ("criterion", "criterion_options", "allocation", "pattern", "update", "update_options", "label")


@dataclass(frozen=True)
class Variant:
    """One way of pruning, at any sparsity.

    Attributes:
        label: what tables call it; made of the other attributes where it is not given.
        criterion, criterion_options, allocation, pattern, update, update_options: see ``mfcompile.select_masks``.
    """

    label: str
    criterion: str | Pruner
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str | Mapping[str, float] | None = None
    pattern: str = UNSTRUCTURED
    update: str | None = None
    update_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pruner(self) -> Pruner:
        """What chooses the masks."""
        return pruner(self.criterion, self.criterion_options)

    @property
    def sets_sparsity(self) -> bool:
        """The pattern or the allocation says how much is removed: there is nothing to ask for."""
        return parse_pattern(self.pattern).fixed_sparsity is not None or isinstance(self.allocation, Mapping)

    def options(
        self, sparsity: float | Mapping[str, float] | None, seed: int, *, padding_mask: str | None = None
    ) -> SelectionOptions:
        """The options of one pruning; the sparsity is left out where the variant sets its own.

        Args:
            sparsity: what is asked for.
            seed: of everything random.
            padding_mask: name of the mask input of the text, for an update that runs the model; None finds it.
        """
        shared = {} if self.update is None or padding_mask is None else {"padding_mask": padding_mask}
        return SelectionOptions(
            None if self.sets_sparsity else sparsity,
            self.criterion,
            self.criterion_options,
            self.allocation,
            self.pattern,
            self.update,
            seed=seed,
            update_options={**shared, **self.update_options},
        )

    def describe(self) -> dict[str, Any]:
        """The variant as JSON knows it, with the allocation that is in force, and what its criterion needs."""
        told = self.options(None, 0).describe()
        published = "set by the pattern" if told["allocation"] is None and self.sets_sparsity else self.pruner.allocation
        return {
            "label": self.label,
            **{key: told[key] for key in ("criterion", "criterion_options", "pattern", "update", "update_options")},
            "allocation": told["allocation"] or published,
            "is_allocation_chosen": told["allocation"] is not None,
            "needs": sorted(need.value for need in self.pruner.needs),
            "is_floor": self.pruner.name == FLOOR,
        }


def read_variant(given: str | Pruner | Mapping[str, Any] | Variant, own: Pruner | None = None) -> Variant:
    """A variant from what a user names it by.

    Args:
        given: a word (see the module), a criterion object, or a mapping with ``criterion`` and, as ``compile_pruned`` takes
            them, ``criterion_options``, ``allocation``, ``pattern``, ``update``, ``update_options``; its ``label`` names it in
            tables.
        own: a criterion object that the source brings along: meant where its name is given.

    Raises:
        InputError: the word does not follow the grammar, or an option is not valid.
    """
    if isinstance(given, Variant):
        found = given
    elif isinstance(given, Pruner):
        found = _of_parts({"criterion": given})
    elif isinstance(given, Mapping):
        unknown = [key for key in given if key not in _KEYS]
        if unknown or "criterion" not in given:
            what = f"has the unknown key {unknown[0]!r}" if unknown else "names no criterion"
            raise InputError(f"criteria: {dict(given)!r} {what}; the keys are {', '.join(_KEYS)}")
        found = _of_parts(given)
    elif isinstance(given, str):
        found = _of_parts(parse_word(given))
    else:
        hint = f"; make an object of it: {given.__name__}()" if isinstance(given, type) else ""
        raise InputError(f"criteria: {given!r} is neither a word ({GRAMMAR}), a Criterion object nor a mapping{hint}")
    if own is not None and found.criterion == own.name and not found.criterion_options:
        found = replace(found, criterion=own)
    try:
        check_options(found.options(None, 0))
    except InputError as error:
        raise InputError(f"{found.label!r}: {error}") from error
    return found


def read_variants(
    given: Iterable[Any] | None, *, has_loss: bool, own: Pruner | None = None, floor: bool = True
) -> list[Variant]:
    """All variants of a comparison.

    Args:
        given: what a user names them by; None for the defaults: every criterion without gradients, and SNIP where there is
            a loss.
        has_loss: a loss is defined.
        own: a criterion object that the source brings along: first among the defaults, and meant where its name is given.
        floor: random scores are compared too, last, whether or not they were named.

    Raises:
        InputError: none is named, one is named twice, or one is not valid.
    """
    if isinstance(given, (str, Mapping, Pruner)):
        raise InputError(f"criteria is one pruner, {given!r}: give a list of them")
    found = [read_variant(item, own) for item in (default_criteria(has_loss, own) if given is None else given)]
    if not found:
        raise InputError("criteria is empty: name at least one, 'multiflow' say")
    if floor and not any(item.pruner.name == FLOOR for item in found):
        found.append(read_variant(FLOOR))
    labels = [item.label for item in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"criteria: {twice!r} is there twice; leave one out, or tell them apart by a label")
    return found


def default_criteria(has_loss: bool, own: Pruner | None = None) -> list[str | Pruner]:
    """What is compared where a user names nothing; random scores come last."""
    without = [name for name in names() if name not in _LEFT_OUT and Need.GRADIENTS not in pruner(name).needs]
    named = [name for name in without if name != FLOOR] + list(_WITH_GRADIENTS if has_loss else ())
    mine = [] if own is None or (Need.GRADIENTS in own.needs and not has_loss) else [own]
    return [*mine, *(name for name in named if own is None or name != own.name)]


def parse_word(word: str) -> dict[str, Any]:
    """The parts of a word, as ``read_variant`` takes them.

    Raises:
        InputError: the word does not follow the grammar.
    """
    match = _WORD.fullmatch(word.strip())
    if match is None or not match["criterion"]:
        raise InputError(
            f"{word!r} names no pruner: the form is {GRAMMAR}, as in multiflow, multiflow@score-global, wanda:2:4 or "
            f"multiflow+sparsegpt"
        )
    parts = {key: match[key] for key in ("criterion", "allocation", "pattern", "update") if match[key] is not None}
    options = {"criterion_options": match["options"], "update_options": match["update_options"] or ""}
    return {**parts, **{key: _options(text, word) for key, text in options.items()}, "label": word.strip()}


def _options(text: str, word: str) -> dict[str, Any]:
    """The options of ``,NAME=VALUE,NAME=VALUE``."""
    found: dict[str, Any] = {}
    for item in text.split(",")[1:]:
        name, separator, value = item.partition("=")
        if not (name and separator and value):
            raise InputError(f"{word!r}: {item!r} is no option; write NAME,OPTION=VALUE, itersnip,steps=20 say")
        found[name] = option_value(value)
    return found


def option_value(text: str) -> Any:
    """The value of an option: a number, true, false or null, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _of_parts(parts: Mapping[str, Any]) -> Variant:
    given = {key: value for key, value in parts.items() if value is not None}
    return Variant(**{"label": _label(given), **given})


def _label(parts: Mapping[str, Any]) -> str:
    criterion, allocation, update = parts["criterion"], parts.get("allocation"), parts.get("update")

    def with_options(name: str, options: str) -> str:
        return name + "".join(f",{key}={value}" for key, value in parts.get(options, {}).items())

    named = criterion if isinstance(criterion, str) else getattr(criterion, "name", type(criterion).__name__)
    text = with_options(named, "criterion_options")
    text += "" if allocation is None else f"@{allocation}" if isinstance(allocation, str) else "@layers"
    text += f":{parts['pattern']}" if parts.get("pattern", UNSTRUCTURED) != UNSTRUCTURED else ""
    return text + (f"+{with_options(update, 'update_options')}" if update else "")
