"""Weight updates by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mfcompile.errors import InputError
from mfcompile.passes.gradual import GradualOptions
from mfcompile.passes.least_squares import LeastSquaresOptions
from mfcompile.passes.sparsegpt import SparseGptOptions
from mfcompile.passes.weight_update import UpdateOptions
from mfcompile.recipe import UPDATES

_KINDS: dict[str, type[UpdateOptions]] = {kind.name: kind for kind in (SparseGptOptions, LeastSquaresOptions, GradualOptions)}
assert tuple(_KINDS) == UPDATES, "recipe.UPDATES names them for those who must not import torch"


def update_options(name: str, options: Mapping[str, Any]) -> UpdateOptions:
    """The update of that name.

    Args:
        name: one of ``mfcompile.recipe.UPDATES``.
        options: its options by name.

    Raises:
        InputError: the name or an option is unknown, or an option is not valid.
    """
    if name not in _KINDS:
        raise InputError(f"update={name!r} is unknown; choose {', '.join(UPDATES)}, or None to leave weights as they are")
    return _KINDS[name].from_mapping(options)
