"""Running a model without the cache that generation fills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def without_cache(module: nn.Module) -> Iterator[list[Any]]:
    """Switch ``use_cache`` off in every configuration object that the module holds, and back on afterwards.

    Yields:
        The objects that were changed.
    """
    changed: list[Any] = []
    seen: set[int] = set()

    def visit(config: Any) -> None:
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            return
        seen.add(id(config))
        if vars(config).get("use_cache") is True or getattr(config, "use_cache", None) is True:
            config.use_cache = False
            changed.append(config)
        for value in list(vars(config).values()):
            if type(value).__module__ == type(config).__module__ or type(value).__name__.endswith("Config"):
                visit(value)

    for item in module.modules():
        visit(getattr(item, "config", None))
        visit(getattr(item, "generation_config", None))
    try:
        yield changed
    finally:
        for config in changed:
            config.use_cache = True
