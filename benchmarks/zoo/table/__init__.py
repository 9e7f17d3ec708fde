"""The table: one module per kind of architecture, each with its ``ROWS``."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.zoo.row import Row


def all_rows() -> dict[str, Row]:
    """Key -> row, over all modules of this package.

    Raises:
        ValueError: two rows have the same key.
    """
    found: dict[str, Row] = {}
    for module in pkgutil.iter_modules(__path__):
        rows: tuple[Row, ...] = importlib.import_module(f"{__name__}.{module.name}").ROWS
        for row in rows:
            if row.key in found:
                raise ValueError(f"two rows are called {row.key}: give one a variant")
            found[row.key] = row
    return found
