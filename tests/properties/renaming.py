"""Renamed copies: the same computation under other names of modules, classes and parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def renamed(model: nn.Module, name: Callable[[str], str]) -> tuple[nn.Module, dict[str, str]]:
    """A deep copy in which every attribute that holds a submodule or a parameter, and every class, has another name.

    The code of the modules still asks for the old names; a class of its own per module translates them. Items of
    containers keep their numbers.

    Args:
        model: any module.
        name: old name -> new name, for attributes and for classes; different for attributes of one module.

    Returns:
        (the copy, FQN in the model -> FQN in the copy).
    """
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if not isinstance(module, _CONTAINERS):
            _rename(module, name)
    old, new = ([fqn for fqn, _ in item.named_parameters()] for item in (model, twin))
    return twin, dict(zip(old, new, strict=True))


def _rename(module: nn.Module, name: Callable[[str], str]) -> None:
    translation = {old: name(old) for old in (*module._modules, *module._parameters)}
    assert len(set(translation.values())) == len(translation)
    for stored in (module._modules, module._parameters):
        items = [(translation[old], value) for old, value in stored.items()]
        stored.clear()
        stored.update(items)  # type: ignore[arg-type]
    parent = type(module)

    def __getattr__(self: nn.Module, attribute: str) -> Any:
        return parent.__getattr__(self, translation.get(attribute, attribute))

    module.__class__ = type(name(parent.__name__).title(), (parent,), {"__getattr__": __getattr__})


def reordered(model: nn.Module, order: Callable[[list[str]], list[str]]) -> nn.Module:
    """A deep copy whose attributes were registered in another order; items of containers keep theirs."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if not isinstance(module, _CONTAINERS):
            for stored in (module._modules, module._parameters):
                items = [(name, stored[name]) for name in order(list(stored))]
                stored.clear()
                stored.update(items)  # type: ignore[arg-type]
    return twin
