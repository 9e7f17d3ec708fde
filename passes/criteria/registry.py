"""Pruners by name: those of this package, and those that other packages register."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mfcompile.errors import InputError
from mfcompile.passes.allocation import ALLOCATIONS
from mfcompile.passes.criteria.base import Need, Pruner

ENTRY_POINT_GROUP = "mfcompile.criteria"
"""Other packages name their pruners under ``[project.entry-points."mfcompile.criteria"]``."""

_OWN = {
    "multiflow": "multiflow:Multiflow",
    "multiflow-inverted": "multiflow:InvertedMultiflow",
    "magnitude": "magnitude:Magnitude",
    "random": "random_scores:Random",
    "lamp": "lamp:Lamp",
    "l2": "magnitude:L2",
    "wanda": "wanda:Wanda",
    "snip": "snip:Snip",
    "itersnip": "itersnip:IterSnip",
    "chita": "chita:Chita",
    "chita++": "chita:IteratedChita",
    "tamt": "tamt:Tamt",
}


def names() -> tuple[str, ...]:
    """Every name that ``pruner`` knows: this package's in a fixed order, then those of entry points."""
    return (*_OWN, *sorted(_registered().keys() - _OWN.keys()))


def pruner(criterion: str | Pruner, options: Mapping[str, Any] | None = None) -> Pruner:
    """The pruner of that name, or the one that was given.

    Args:
        criterion: a name, or an object of a user's own class.
        options: values of the pruner's fields; only for a name.

    Raises:
        InputError: the name is not known (the nearest is given), an option is none of the pruner's, or what was
            registered under the name is no pruner.
    """
    if isinstance(criterion, Pruner):
        if options:
            raise InputError(f"options of a criterion go with its name; {type(criterion).__name__} was given as an object")
        return _checked(criterion)
    if not isinstance(criterion, str):
        hint = "; make an object of it: " + criterion.__name__ + "()" if isinstance(criterion, type) else ""
        raise InputError(f"criterion must be a name or a Criterion object, got {criterion!r}{hint}")
    chosen = _class_of(criterion)
    known: set[str] = {item.name for item in fields(chosen) if item.init} if is_dataclass(chosen) else set()
    for key in options or {}:
        if key not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise InputError(f"the criterion {criterion!r} has no option {key!r}; {has}")
    try:
        made = chosen(**(options or {}))
    except TypeError as error:  # an abstract method is left, or an option has no default
        raise InputError(f"the criterion {criterion!r} cannot be made: {error}. Every option needs a default") from error
    return _checked(made)


def _checked(made: Pruner) -> Pruner:
    """The pruner, whose class may be anyone's.

    Raises:
        InputError: its class says nothing, or something unknown, of its name, its needs or its allocation.
    """
    owner = type(made).__name__
    name = getattr(made, "name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f'the criterion {owner} has no name: give the class one, name = "mine"')
    if isinstance(made.needs, str) or not set(made.needs) <= set(Need):
        raise InputError(
            f"the criterion {name!r} needs {made.needs!r}; needs is a frozenset of {', '.join(map(repr, map(str, Need)))}"
        )
    if made.allocation not in ALLOCATIONS:
        raise InputError(
            f"the criterion {name!r} is of the allocation {made.allocation!r}, which is unknown; choose one of "
            f"{', '.join(ALLOCATIONS)}"
        )
    return made


def _class_of(name: str) -> type[Pruner]:
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        own: type[Pruner] = getattr(import_module(f"mfcompile.passes.criteria.{module}"), attribute)
        return own
    registered = _registered().get(name)
    if registered is None:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"criterion={name!r} is unknown; {hint}choose one of {', '.join(names())}")
    try:
        found = registered.load()
    except Exception as error:
        raise InputError(
            f"the criterion {name!r} is registered as {registered.value}, which cannot be imported "
            f"({type(error).__name__}: {error}). Repair or uninstall the package that registers it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pruner)):
        raise InputError(
            f"the criterion {name!r} is registered as {registered.value}, which is no subclass of mfcompile.Criterion. "
            f"Register the class itself"
        )
    return found


@cache
def _registered() -> Mapping[str, Any]:
    return {item.name: item for item in entry_points(group=ENTRY_POINT_GROUP)}
