"""Give every submodule and parameter of a model a random name; the model computes the same."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from torch import nn

_INDEXED = (nn.ModuleList, nn.Sequential, nn.ParameterList)


def rename(model: nn.Module, seed: int = 0, *, classes_too: bool = True) -> dict[str, str]:
    """Rename in place.

    Items of lists keep their numbers, keys of dicts are the model's own data and stay.

    Args:
        model: any module.
        seed: of the names.
        classes_too: also rename classes; transformers looks some of its own up by name.

    Returns:
        New FQN of every parameter -> old FQN.
    """
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    draw = random.Random(seed)
    classes: dict[type, type] = {}
    for module in list(model.modules()):
        if not isinstance(module, (*_INDEXED, nn.ModuleDict)):
            _rename_one(module, draw, classes, classes_too)
    return {name: before[id(parameter)] for name, parameter in model.named_parameters()}


def _rename_one(module: nn.Module, draw: random.Random, classes: dict[type, type], classes_too: bool) -> None:
    aliases: dict[str, str] = {}
    for attribute in ("_modules", "_parameters"):
        renamed: OrderedDict[str, Any] = OrderedDict()
        for name, value in module.__dict__[attribute].items():
            new = "".join(draw.choices("abcdefghjk", k=7))
            aliases[name] = new
            renamed[new] = value
        module.__dict__[attribute] = renamed
    module.__dict__["_aliases"] = aliases
    own = type(module)
    if own not in classes:
        name = f"Z{len(classes)}" if classes_too else own.__name__
        classes[own] = type(name, (own,), {"__getattr__": _getattr(own)})
    module.__class__ = classes[own]


def _getattr(own: type) -> Any:
    def lookup(self: Any, name: str) -> Any:
        new = self.__dict__.get("_aliases", {}).get(name)
        return getattr(self, new) if new is not None else own.__getattr__(self, name)  # type: ignore[attr-defined]

    return lookup
