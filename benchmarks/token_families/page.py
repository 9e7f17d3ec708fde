"""The table of docs/tokens.md: one line per model that was tried, between two marks that the page keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- token_families: begin -->", "<!-- token_families: end -->"
CLOSE = 1e-4

_COLUMNS = (
    "model", "sites", "refused", "all kept: equal bits", "fewer: finite", "eager reference", "alone = in a batch", "padding",
    "merged", "ONNX",
)  # fmt: skip


def write_table(page: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the table between its marks.

    Args:
        page: holds both marks.
        rows: records of ``check``.
    """
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What it comes to, and the table, as Markdown."""
    lines = [_summary(rows), "", f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*lines, *map(_line, rows)])


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    cut = [row for row in rows if row["sites"]]
    identical = sum(row.get("identical") is True for row in cut)
    agreed = sum(bool((row.get("parity") or {}).get("passed")) for row in cut)
    return (
        f"Of {len(rows)} models {len(cut)} have places where tokens can be cut. With all tokens kept {identical} of these give "
        f"the same bits; with fewer, onnxruntime agrees with the module for {agreed}."
    )


def _line(row: Mapping[str, Any]) -> str:
    sites = ", ".join(f"{count} {modality}" for modality, count in row["sites"].items()) or "none"
    refused = "<br>".join(f"{count} x {_short(reason)}" for reason, count in row["refused"].items()) or "-"
    if row["failed"] in ("run", "sites"):
        return f"| {row['key']} | refused | {_short(row['reason'])} |" + " - |" * 7
    cells = [_yes(row.get("identical")), _yes(row.get("finite")), _references(row), _close(row.get("samples"))]
    merge = row.get("merge")
    parity = row.get("parity")
    cells += [_yes(row.get("padding")), _yes(merge and merge["runs"] and merge["finite"])]
    failed = f"no: {_short(row['reason'])}" if row["failed"] else "-"
    cells.append(failed if parity is None else f"{'yes' if parity['passed'] else 'no'}, {parity['difference']:.0e}")
    return f"| {row['key']} | {sites} | {refused} | {' | '.join(cells)} |"


def _yes(value: Any) -> str:
    return "-" if value is None else "yes" if value else "**no**"


def _close(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value <= CLOSE else f"**{value:.0e}**"


def _references(row: Mapping[str, Any]) -> str:
    found = [item["difference"] for item in row.get("reference", ()) if item["difference"] is not None]
    ranked = [item["ranked"] for item in row.get("reference", ()) if item.get("ranked") is not None]
    return "-" if not found else _close(max(found)) + ("" if all(ranked) else ", **ranks differ**")


def _short(reason: str) -> str:
    words = reason.replace("|", "/").replace("\n", " ")
    return words if len(words) <= 110 else words[:107] + "..."
