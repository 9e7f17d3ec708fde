"""Name patterns: how a user points at weights (``targets``, ``ignore``, ``regions``).

A pattern is one of

* an exact FQN, or the path of a submodule (all weights below it);
* a glob over either: ``text_encoder.*``, ``*.layers.[0-3]``;
* ``re:`` and a regular expression that matches the FQN from its start;
* ``region:`` and the name of a region;
* the class name of the module that holds the weight, or of a module around it.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mfcompile.errors import InputError


@dataclass(frozen=True)
class WeightNames:
    """Everything a pattern can match of one weight.

    Attributes:
        fqns: the FQN and its aliases.
        classes: class names of the owning module and of the modules around it.
        region: region of the weight, "" while it is not known.
    """

    fqns: tuple[str, ...]
    classes: frozenset[str]
    region: str = ""


def weight_names(module: nn.Module, fqn: str, aliases: Iterable[str] = (), region: str = "") -> WeightNames:
    """Collect what patterns can match of a weight of ``module``."""
    fqns = tuple(dict.fromkeys((fqn, *aliases)))
    classes: set[str] = set()
    for name in fqns:
        parts = name.split(".")[:-1]
        for length in range(1, len(parts) + 1):
            classes.add(type(module.get_submodule(".".join(parts[:length]))).__name__)
    return WeightNames(fqns, frozenset(classes), region)


def matches(pattern: str, names: WeightNames) -> bool:
    """Whether a pattern points at the weight.

    Raises:
        InputError: the regular expression of a ``re:`` pattern is not valid.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise InputError(f"the pattern {pattern!r} is not a valid regular expression: {error}") from error
        return any(expression.match(fqn) for fqn in names.fqns)
    if pattern.startswith("region:"):
        return names.region == pattern[len("region:") :]
    if pattern in names.classes:
        return True
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for fqn in names.fqns for name in _paths(fqn))


def _paths(fqn: str) -> list[str]:
    """The FQN and the path of every submodule around the weight, outermost first."""
    parts = fqn.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def specificity(pattern: str) -> int:
    """How narrowly a pattern points: the number of its literal characters."""
    return len(re.sub(r"[*?]|\[[^]]*\]", "", pattern.removeprefix("re:")))


def select(patterns: Sequence[str], weights: Mapping[str, WeightNames], *, what: str) -> dict[str, str]:
    """FQN -> the most specific pattern that matches it; among equals the later one.

    Args:
        patterns: the user's patterns; a single one may be given as it is.
        weights: FQN -> names of every weight.
        what: the argument that the patterns came from, for messages.

    Raises:
        InputError: a pattern matches no weight; the nearest names are given.
    """
    chosen: dict[str, str] = {}
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in sorted(patterns, key=specificity):
        hits = [fqn for fqn, names in weights.items() if matches(pattern, names)]
        if not hits:
            raise InputError(_no_match(pattern, weights, what))
        for fqn in hits:
            chosen[fqn] = pattern
    return chosen


def _no_match(pattern: str, weights: Mapping[str, WeightNames], what: str) -> str:
    if pattern.startswith("region:"):
        known = sorted({names.region for names in weights.values()})
        return f"{what}: the pattern {pattern!r} matches no weight; this model's regions are {', '.join(known)}"
    paths = {path for names in weights.values() for fqn in names.fqns for path in _paths(fqn)}
    bare = re.sub(r"[\\^$*?]|\.\*$", "", pattern.removeprefix("re:")).strip(".")
    # A submodule that is called so further down is what was most likely meant; its whole path is what a pattern needs.
    near = sorted((path for path in paths if path.endswith(f".{bare}")), key=len) if bare else []
    near += difflib.get_close_matches(bare, sorted(paths), n=3, cutoff=0.4)
    shown = list(dict.fromkeys(near))[:3]
    if re.fullmatch(r"\w+", pattern):  # what has no dot may have been meant as a class
        classes = sorted({name for names in weights.values() for name in names.classes})
        shown += [f"the class {name}" for name in difflib.get_close_matches(pattern, classes, n=1, cutoff=0.6)]
    return (
        f"{what}: the pattern {pattern!r} matches no linear weight of the model. "
        f"Nearest names: {', '.join(shown or sorted(paths)[:3])}. "
        f"Use an exact name, a submodule, a glob (text_encoder.*), re:..., region:..., or a class name"
    )
