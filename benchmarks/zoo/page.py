"""docs/zoo.md: the zoo's results as tables for readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.zoo.row import Row

Records = Mapping[str, Mapping[str, Any]]


def summary(rows: Mapping[str, Row], records: Records) -> str:
    """How many rows passed which stage, in words."""
    ran = [record for record in records.values() if "run" in record.get("passed", ())]
    families = {record["family"] for record in ran}
    counts = Counter(stage for record in ran for stage in record["passed"])

    def share(stage: str) -> str:
        return f"{counts[stage]} ({counts[stage] / len(ran):.1%})" if ran else "0"

    unable = [record for record in records.values() if "run" not in record.get("passed", ())]
    left = len(rows) - len(records)
    unchecked = f" {left} rows of the table have no result yet (`make zoo ZOO=--missing`)." if left else ""
    return (
        f"{len(ran)} classes of {len(families)} architectures run: {share('capture')} captured, {share('regions')} tagged, "
        f"{share('module')} pruned with outputs equal to the model with zeroed weights, {share('onnx')} exported to ONNX, "
        f"{share('parity')} with parity in onnxruntime. {len(unable)} classes do not run in the installed transformers."
        f"{unchecked}"
    )


def render(rows: Mapping[str, Row], records: Records) -> str:
    """The page, in Markdown."""
    able = {key: record for key, record in records.items() if "run" in record.get("passed", ())}
    unable = {key: record for key, record in records.items() if key not in able}
    parts = [
        "# The zoo",
        "Written by `make zoo`; do not edit. Every class is built offline with a tiny random configuration, captured, tagged, "
        "pruned by half, compared with the dense model whose weights are zeroed, exported to ONNX and compared in onnxruntime, "
        "at a second batch size where the batch is free.",
        summary(rows, records),
        "## What works",
        *(
            f"### {kind}\n\n" + _table(_works(record) for record in able.values() if record["kind"] == kind)
            for kind in dict.fromkeys(record["kind"] for record in able.values())
        ),
        "## What fails, and whose limit it is",
        _failures(able.values()),
        "## What the installed transformers does not run",
        _failures(unable.values()),
    ]
    return "\n\n".join(parts) + "\n"


HEADER = ("class", "sites by region (weights)", "pruned", "ONNX by", "difference", "batch", "seconds")


def _works(record: Mapping[str, Any]) -> tuple[str, ...]:
    passed = record["passed"]
    regions = ", ".join(f"{name} {item['sites']} ({item['weights']:,})" for name, item in record.get("regions", {}).items())
    return (
        f"`{record['key']}`",
        regions or "-",
        f"{record['sparsity']:.0%}" if "module" in passed else "no",
        record["route"] if "onnx" in passed else "no",
        f"{record['difference']:.0e}" if "parity" in passed else "no",
        ", ".join(str(size) for size in record["batch_sizes"]) or "fixed" if "parity" in passed else "-",
        f"{record['seconds']:.0f}",
    )


def _table(lines: Any) -> str:
    ordered = [HEADER, ("---",) * len(HEADER), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ordered)


def _failures(records: Any) -> str:
    lines = [
        f"| `{record['key']}` | {record['failed']} | {record['limit']} | {_cell(record['reason'])} |"
        for record in records
        if record["failed"]
    ]
    if not lines:
        return "None."
    return "\n".join(["| class | stage | limit of | reason |", "| --- | --- | --- | --- |", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:700]
