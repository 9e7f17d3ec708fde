"""The tables and findings of docs/speed.md, from the results: ``python -m benchmarks.speed_page`` writes them into the page.

A block of the page begins with ``<!-- NAME -->`` and ends with ``<!-- end -->``; what is between is written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = Sequence[Mapping[str, Any]]
Results = Mapping[str, Any]


def render(page: str, results: Results) -> str:
    """The page with every block as the results have it.

    Args:
        page: its text.
        results: name of a result file -> what it holds.

    Raises:
        KeyError: a block has no writer.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](results)}\n{found[3]}", page)


def load_results() -> dict[str, Any]:
    """Every result that the page quotes."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("sparse", "sparse_kernels")}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def machine(results: Results) -> str:
    """Where it was measured."""
    own, options = results["sparse"]["machine"], results["sparse"]["options"]
    return (
        f"{own['processor']}, {own['cores']} cores, kernels for {own['sparse_runtime']}, onnxruntime {own['onnxruntime']}, "
        f"load average {own['load_average']:g}; {options['layers']} layers of width {options['width']}, "
        f"{options['rounds']} rounds."
    )


def end_to_end(results: Results) -> str:
    """Whole models at 197 tokens and more, one thread."""
    return _speeds([row for row in results["sparse"]["speed"] if row["threads"] == 1 and row["tokens"] >= 197])


def few_tokens(results: Results) -> str:
    """Whole models at fewer tokens, one thread."""
    return _speeds([row for row in results["sparse"]["speed"] if row["threads"] == 1 and row["tokens"] < 197])


def two_threads(results: Results) -> str:
    """Whole models with two threads."""
    return _speeds([row for row in results["sparse"]["speed"] if row["threads"] == 2])


def _speeds(rows: Rows) -> str:
    """Speed over dense, a column for every sparsity."""
    sparsities = sorted({row["sparsity"] for row in rows})
    keys = list(dict.fromkeys((row["model"], row["size"], row["pattern"]) for row in rows))
    lines = []
    for key in keys:
        own = {row["sparsity"]: row for row in rows if (row["model"], row["size"], row["pattern"]) == key}
        dense = min(row["dense_ms"] for row in own.values())
        lines.append([", ".join(key), f"{dense:,.0f} ms", *(_ratio(own.get(sparsity)) for sparsity in sparsities)])
    return table(["model, input, masks", "dense", *(f"{sparsity:.0%}" for sparsity in sparsities)], lines)


def _ratio(row: Mapping[str, Any] | None) -> str:
    """Median, quartiles and the limit."""
    if row is None:
        return ""
    limit = f" of {row['limit']:.2f}" if row.get("limit") else ""
    shown = f"{row['speedup']:.2f}"
    return f"{f'**{shown}**' if row['low'] > 1 else shown}{limit} ({row['low']:.2f} - {row['high']:.2f})"


def decode(results: Results) -> str:
    """One token through linear layers from memory."""
    rows = results["sparse"]["decode"]
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    sparsities = sorted({row["sparsity"] for row in rows})
    lines = []
    for pattern in patterns:
        own = {row["sparsity"]: row for row in rows if row["pattern"] == pattern}
        lines.append([pattern, *(_ratio(own.get(sparsity)) for sparsity in sparsities)])
    return table(["masks", *(f"{sparsity:.0%}" for sparsity in sparsities)], lines)


def int8(results: Results) -> str:
    """int8 forms against dense fp32 and dense int8."""
    lines = [
        [f"{row['model']}, {row['size']}, {row['pattern']}, {row['sparsity']:.0%}",
         *(f"{row[key]:.2f}" for key in ("int8", "int8_runtime", "over_int8")), f"{row['low']:.2f} - {row['high']:.2f}"]
        for row in results["sparse"].get("int8", ())
    ]  # fmt: skip
    head = [
        "model, input, masks",
        "dense int8 / dense fp32",
        "sparse int8 / dense fp32",
        "sparse int8 / dense int8",
        "quartiles",
    ]
    return table(head, lines) if lines else "Not measured."


def files(results: Results) -> str:
    """Sizes of files."""
    lines = [
        [f"{row['model']}, {row['pattern']}, {row['sparsity']:.0%}", f"{row['dense_mb']:.0f} MB", f"{row['file_mb']:.1f} MB",
         f"{row['file_mb'] / row['dense_mb']:.2f}", f"{row['over_ideal']:.3f}"]
        for row in results["sparse"]["files"]
    ]  # fmt: skip
    head = [
        "model, masks",
        "dense file",
        "packed file",
        "ratio",
        "pruned weights over 4 bytes per kept one and 1 bit per place",
    ]
    return table(head, lines)


def memory(results: Results) -> str:
    """Memory and loading."""
    lines = [
        [f"{row['model']}, {row['sparsity']:.0%}, weights {row['weights']}", f"{row['dense_resident_mb']:.0f} MB",
         f"{row['resident_mb']:.0f} MB", f"{row['file_mb']:.0f} MB", f"{row['activations_mb']:.0f} MB",
         f"{row['over_file']:.2f}", f"{row['over_file_own']:.2f}", f"{row['dense_load_ms']:.0f} ms",
         f"{row['load_ms']:.0f} ms"]
        for row in results["sparse"]["memory"]
    ]  # fmt: skip
    head = [
        "model, masks, place",
        "dense holds",
        "runtime holds",
        "packed file",
        "dense activations",
        "over file, dense activations apart",
        "over file, own apart",
        "dense loads in",
        "runtime loads in",
    ]
    return table(head, lines)


def operators(results: Results) -> str:
    """Where the time of one run goes."""
    rows = [row for row in results["sparse"]["operators"] if row.get("pattern", "unstructured") == "unstructured"]
    names = _largest(rows)
    lines = []
    for row in rows:
        label = f"{row['model']}, {'dense' if row['form'] == 'dense' else format(row['sparsity'], '.0%')}"
        rest = sum(value for name, value in row["operators_ms"].items() if name not in names)
        shown = [*(row["operators_ms"].get(name, 0.0) for name in names), rest]
        lines.append([label, *(f"{value:.1f}" for value in shown), f"{row['run_ms']:.1f}"])
    return table(["ms of one run", *names, "everything else", "all"], lines)


def _largest(rows: Rows, count: int = 6) -> list[str]:
    """The kinds of operators that take most, over all rows."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row["operators_ms"].items():
            totals[name] = totals.get(name, 0.0) + value
    return sorted(totals, key=lambda name: -totals[name])[:count]


def losses(results: Results) -> str:
    """Where the sparse runtime is not faster than dense, in words."""
    told = []
    for row in results["sparse"]["speed"]:
        if row["low"] <= 1:
            threads = _count(row["threads"], "thread")
            word = "slower" if row["high"] < 1 else "not faster"
            told.append(
                f"- {row['model']}, {row['size']}, {row['pattern']}, {row['sparsity']:.0%}, {threads}: {word} "
                f"({row['speedup']:.2f}x, {row['low']:.2f} - {row['high']:.2f})"
            )
    layers = results["sparse_kernels"]["layers"]
    kinds = dict.fromkeys((row["pattern"], row["sparsity"], row["tokens"]) for row in layers)
    for pattern, sparsity, tokens in kinds:
        own = [row for row in layers if (row["pattern"], row["sparsity"], row["tokens"]) == (pattern, sparsity, tokens)]
        slow = [row["ratio"] for row in own if row["ratio_high"] < 1]
        if slow:
            what = f"{pattern}, {sparsity:.0%}, {_count(tokens, 'token')}, 1 thread"
            told.append(
                f"- single layers whose weights are in the caches, {what}: "
                f"slower in {len(slow)} of {len(own)} shapes ({_range(slow)})"
            )
    return "\n".join(told) or "Nowhere in what was measured."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _range(ratios: Sequence[float]) -> str:
    low, high = (f"{value:.2f}x" for value in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def goals(results: Results) -> str:
    """Every goal, reached or not."""
    lines = [
        [row["goal"], f"{row['wanted']:g}", f"{row['found']:g}", "" if row["limit"] is None else f"{row['limit']:g}",
         "yes" if row["is_reached"] else "**no**"]
        for row in results["sparse"]["goals"]
    ]  # fmt: skip
    return table(["goal", "wanted", "found", "limit", "reached"], lines)


BLOCKS: Mapping[str, Callable[[Results], str]] = {
    "machine": machine,
    "end-to-end": end_to_end,
    "few-tokens": few_tokens,
    "two-threads": two_threads,
    "decode": decode,
    "int8": int8,
    "files": files,
    "memory": memory,
    "operators": operators,
    "losses": losses,
    "goals": goals,
}
"""Name of a block -> what writes it."""


def main() -> None:
    """Write every block of the page."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), load_results()), encoding="utf-8")


if __name__ == "__main__":
    main()
