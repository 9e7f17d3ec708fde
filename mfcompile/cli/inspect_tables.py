"""The tables of ``mfcompile inspect``: regions, weights with their evidence, what is shared, what stays dense."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from mfcompile.cli.tables import percent, table

if TYPE_CHECKING:
    from mfcompile.passes.structured_units import StructuralUnits

FOLD_OVER = 24
"""Tables of more rows than this are folded: rows that differ only in a number of their name become one."""

_NUMBER = re.compile(r"(?<![A-Za-z_])\d+(?![A-Za-z_])")


def regions_table(view: Mapping[str, Any]) -> RenderableType:
    """What every region holds, and how much of it would be pruned."""
    rows = [
        (
            row["region"],
            f"{row['weights']:,}",
            f"{row['elements']:,}",
            f"{row['pruned_weights']:,}",
            f"{row['pruned_elements']:,}",
            percent(row["pruned_elements"] / row["elements"] if row["elements"] else 0.0),
            f"{row['blocks']:,}",
        )
        for row in view["regions"]
    ]
    keys = ("weights", "elements", "pruned_weights", "pruned_elements", "blocks")
    totals = {key: sum(row[key] for row in view["regions"]) for key in keys}
    share = totals["pruned_elements"] / totals["elements"] if totals["elements"] else 0.0
    rows.append(
        (
            "all linear weights",
            f"{totals['weights']:,}",
            f"{totals['elements']:,}",
            f"{totals['pruned_weights']:,}",
            f"{totals['pruned_elements']:,}",
            percent(share),
            f"{totals['blocks']:,}",
        )
    )
    columns = ("region", ">weights", ">elements", ">prunable weights", ">prunable elements", ">share", ">blocks")
    return table("Regions", columns, rows, emphasis=1)


def weights_table(view: Mapping[str, Any], *, everything: bool) -> RenderableType:
    """Every linear weight with the dataflow that decided its region; equal layers of a stack as one row, unless asked."""
    weights = view["weights"]
    is_folded = len(weights) > FOLD_OVER and not everything
    rows = [
        (
            name,
            f"{len(members):,}" if is_folded else None,
            members[0]["region"],
            " x ".join(str(length) for length in members[0]["shape"]),
            " + ".join(members[0]["label"]) or "nothing",
            _block(members),
            "yes" if members[0]["reason"] is None else "no",
        )
        for name, members in folded(weights, fold=is_folded)
    ]
    columns: Sequence[str] = (
        "weight", ">times", "region", "out x in", "reached by", "block (and what leaves it)", "pruned?"
    )  # fmt: skip
    if not is_folded:
        columns = [column for column in columns if column != ">times"]
    title = f"Linear weights: {len(weights):,}" + (" (equal layers are folded; --all lists every one)" if is_folded else "")
    return table(title, columns, ([cell for cell in row if cell is not None] for row in rows))


def shared_table(view: Mapping[str, Any], *, everything: bool) -> RenderableType | None:
    """Weights that are tied, or that several calls use with different modalities; None where there are none."""
    rows = []
    for name, members in folded(
        [item for item in view["weights"] if item["tied_with"] or _calls(item) > 1], fold=not everything
    ):
        first = members[0]
        labels = list(dict.fromkeys(" + ".join(use["label"]) or "nothing" for use in first["uses"]))
        rows.append(
            (
                name,
                f"{len(members):,}",
                first["region"],
                f"{_calls(first)}",
                "; ".join(labels) or "-",
                ", ".join(first["tied_with"]) or "-",
            )
        )
    if not rows:
        return None
    columns = ("weight", ">times", "region", ">calls", "modalities of the calls", "tied with")
    return table("Shared: called more than once, or tied", columns, rows)


def diagnostics_table(view: Mapping[str, Any], *, everything: bool) -> RenderableType | None:
    """What was decided by a weaker rule or left alone, by reason; None where there is nothing to say."""
    grouped: dict[str, list[str]] = {}
    for item in view["diagnostics"]:
        reason = item["reason"] if everything else _NUMBER.sub("*", re.sub(r"_\d+\b", "", item["reason"]))
        grouped.setdefault(reason, []).append(item["subject"])
    if not grouped:
        return None
    rows = []
    for reason, subjects in grouped.items():
        shown = subjects if everything else subjects[:2]
        more = f" and {len(subjects) - len(shown):,} more" if len(subjects) > len(shown) else ""
        rows.append((reason, f"{len(subjects):,}", ", ".join(shown) + more))
    return table("Notes", ("what", ">weights", "which"), rows)


def describe_units(units: StructuralUnits) -> dict[str, Any]:
    """Structural units as JSON."""
    return {
        "units": [
            {
                "name": unit.name,
                "kind": unit.kind,
                "region": unit.region,
                "count": unit.count,
                "output_weight": unit.output_weight,
            }
            for unit in units.units
        ],
        "refused": [{"name": item.name, "kind": item.kind, "node": item.node, "reason": item.reason} for item in units.refused],
    }


def units_tables(view: Mapping[str, Any]) -> list[RenderableType]:
    """Hidden channels and attention heads that can be removed, and those that cannot and why."""
    rows = [(unit["name"], unit["kind"], unit["region"], f"{unit['count']:,}", unit["output_weight"]) for unit in view["units"]]
    found = [table(f"Structural units: {len(rows)}", ("unit", "kind", "region", ">count", "output weight"), rows)]
    if view["refused"]:
        refused = [(item["name"], item["kind"], item["node"], item["reason"]) for item in view["refused"]]
        columns = ("unit", "kind", "node", "because")
        found.append(table(f"Cannot be removed: {len(refused)}", columns, refused))
    return found


def folded(weights: Iterable[Mapping[str, Any]], *, fold: bool = True) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Weights whose names differ only in numbers and whose evidence is equal, under one name ("layers.{0..59}.q.weight").

    Args:
        weights: rows of the inspection.
        fold: False keeps every row by itself.
    """
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for index, item in enumerate(weights):
        key: tuple[object, ...] = (index,)
        if fold:
            key = (
                _NUMBER.sub("*", item["name"]), item["region"], item["reason"], tuple(item["shape"]), tuple(item["label"]),
                tuple(item["block_label"]), _calls(item), bool(item["tied_with"]),
            )  # fmt: skip
        groups.setdefault(key, []).append(item)
    return [(_range_name([item["name"] for item in members]), members) for members in groups.values()]


def _range_name(names: Sequence[str]) -> str:
    """One name for several: numbers that change are given as their range."""
    columns = list(zip(*(_NUMBER.findall(name) for name in names), strict=True))
    parts = _NUMBER.split(names[0])
    text = parts[0]
    for column, part in zip(columns, parts[1:], strict=True):
        text += _range(sorted({int(number) for number in column})) + part
    return text


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    listed = ",".join(str(number) for number in numbers[:6])
    return f"{{{listed}{',…' if len(numbers) > 6 else ''}}}"


def _block(members: Sequence[Mapping[str, Any]]) -> str:
    first = members[0]
    if not first["block"]:
        return "-"
    return f"{_range_name([item['block'] for item in members])} ({' + '.join(first['block_label']) or 'nothing'})"


def _calls(item: Mapping[str, Any]) -> int:
    """How many nodes use the same rows at most."""
    rows: dict[tuple[int, ...], int] = {}
    for use in item["uses"]:
        key = tuple(use["rows"])
        rows[key] = rows.get(key, 0) + 1
    return max(rows.values(), default=0)
