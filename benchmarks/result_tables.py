"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def as_table(title: str, figures: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Table:
    """Figures by name in two columns; a list of rows with a column for every name."""
    if isinstance(figures, Mapping):
        table = Table(title=title, show_header=False)
        for key, value in figures.items():
            table.add_row(key, f"{value:,.3f}" if isinstance(value, float) else str(value))
        return table
    names = list(dict.fromkeys(name for row in figures for name in row))
    table = Table(*names, title=title)
    for row in figures:
        table.add_row(*(str(row.get(name, "")) for name in names))
    return table
