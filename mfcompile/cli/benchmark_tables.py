"""A benchmark as tables and sentences. Every number comes from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from mfcompile.cli.tables import size, table

Row = Mapping[str, Any]
"""One timing of the JSON."""

WRONG_ABOVE = 0.01
"""Outputs that differ from the baseline's by more than this fraction of the largest are pointed out."""


def speed_table(document: Mapping[str, Any]) -> RenderableType:
    """Every form at every size and number of threads, the fastest of each in bold."""
    rows: list[tuple[str, ...]] = []
    bold, ends = set(), set()
    winners = {(index, threads): row["variant"] for index, threads, row in _winners(document)}
    for index, threads in settings(document):
        own = [row for row in document["timings"] if (row["size"], row["threads"]) == (index, threads)]
        for row in own:
            if row["variant"] == winners[index, threads]:
                bold.add(len(rows))
            rows.append(
                (
                    document["sizes"][index]["label"] if row is own[0] else "",
                    str(threads) if row is own[0] else "",
                    row["variant"],
                    _ms(row["ms"]),
                    f"{_ms(row['ms_low'])} - {_ms(row['ms_high'])}",
                    _ratio(row, document["baseline"]),
                    "" if row["speedup"] is None else f"{row['speedup_low']:.2f} - {row['speedup_high']:.2f}",
                    _error(row["max_error"]) if row["variant"] != document["baseline"] else "-",
                    str(row["rounds"]),
                )
            )
        ends.add(len(rows) - 1)
    columns = (
        "size", ">threads", "form", ">ms", ">quartiles", f">x {document['baseline']}", ">quartiles", ">output error", ">rounds",
    )  # fmt: skip
    title = f"Time of one run, median of rounds in turns; above 1 is faster than {document['baseline']}"
    return table(title, columns, rows, bold=bold, ends=ends)


def cost_table(document: Mapping[str, Any]) -> RenderableType:
    """What every form takes of disk, memory and time before its second run; and why a form is missing."""
    rows = [
        (
            item["name"],
            item["description"],
            "-" if item["size_bytes"] is None else size(item["size_bytes"]),
            _bytes(item.get("resident_bytes")),
            _bytes(item.get("peak_bytes")),
            *("-" if item.get(key) is None else f"{_ms(item[key])} ms" for key in ("creation_ms", "first_run_ms")),
        )
        for item in document["variants"]
    ]
    title = "Cost, each form in a process of its own" + (f" ({document['sizes'][-1]['label']})" if document["sizes"] else "")
    return table(title, ("form", "what it is", ">file", ">memory held", ">peak", ">loading", ">first run"), rows)


def settings(document: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(size, threads) of everything that was measured, sizes first."""
    found = {(row["size"], row["threads"]) for row in document["timings"]}
    order = list(dict.fromkeys(row["threads"] for row in document["timings"]))
    return sorted(found, key=lambda item: (item[0], order.index(item[1])))


def findings(document: Mapping[str, Any]) -> Iterator[str]:
    """In words: which form is fastest where, which are slower than the baseline where, and which are missing and why."""
    baseline = document["baseline"]
    for winner, rows in _grouped([row for _, _, row in _winners(document)]):
        if winner == baseline:
            yield f"Nothing is faster than {baseline} {_places(document, rows)}."
        else:
            yield f"Fastest: {winner} {_places(document, rows)}."
    for verdict, words in (("slower", "slower than"), ("same", "neither faster nor slower than")):
        compared = [row for row in document["timings"] if row["variant"] != baseline and row["speedup"] is not None]
        for name, rows in _grouped([row for row in compared if row["verdict"] == verdict]):
            yield f"{name} is {words} {baseline} {_places(document, rows)}."
    reasons: dict[str, list[str]] = {}
    for item in document["variants"]:
        if item["reason"] is not None:
            reasons.setdefault(item["reason"], []).append(item["name"])
    for reason, names in reasons.items():
        yield f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'} not measured: {reason}"
    missing = {item["name"] for item in document["variants"] if item["reason"] is not None}
    for failure in document["failures"]:
        if failure["variant"] not in missing:
            yield f"{failure['variant']} at {_place(document, failure['size'], failure['threads'])}: {failure['reason']}"
    wrong = {row["variant"]: row["max_error"] for row in document["timings"] if (row["max_error"] or 0) > WRONG_ABOVE}
    for name, error in wrong.items():
        yield f"note: outputs of {name} differ from those of {baseline} by {error:.2g} of the largest: see that this is meant"


def machine_line(document: Mapping[str, Any]) -> str:
    """Where it was measured."""
    machine = document["machine"]
    load = "" if machine["load_average"] is None else f", load average {machine['load_average']:g}"
    sets = ", ".join(machine["instruction_sets"]) or "instruction sets unknown"
    return (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {sets}{load}; "
        f"onnxruntime {machine['onnxruntime']}; sparse runtime: {machine['sparse_runtime'] or 'none'}."
    )


def _winners(document: Mapping[str, Any]) -> list[tuple[int, int, Row]]:
    """(size, threads, fastest form) of every setting; the baseline wins unless another is clearly faster."""
    found = []
    for index, threads in settings(document):
        own = [row for row in document["timings"] if (row["size"], row["threads"]) == (index, threads)]
        faster = [row for row in own if row["verdict"] == "faster"]
        usual = [row for row in own if row["variant"] == document["baseline"]]
        found.append((index, threads, min(faster or usual or own, key=lambda row: row["ms"])))
    return found


def _grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by their form, in the order in which forms first come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return list(found.items())


def _places(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Where, with the speedup there."""
    everywhere = len(settings(document))
    ratios = [row["speedup"] for row in rows if row["speedup"] is not None and row["variant"] != document["baseline"]]
    if len(rows) == everywhere > 1:
        spread = f" ({min(ratios):.2f}x to {max(ratios):.2f}x)" if ratios else ""
        return f"at every size and number of threads{spread}"
    listed = [_place(document, row["size"], row["threads"]) + (f" ({row['speedup']:.2f}x)" if ratios else "") for row in rows]
    return f"at {'; '.join(listed)}"


def _place(document: Mapping[str, Any], index: int, threads: int) -> str:
    return f"{document['sizes'][index]['label']}, {threads} thread{'' if threads == 1 else 's'}"


def _ratio(row: Mapping[str, Any], baseline: str) -> str:
    return "-" if row["speedup"] is None else "1" if row["variant"] == baseline else f"{row['speedup']:.2f}"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else size(value)


def _error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
