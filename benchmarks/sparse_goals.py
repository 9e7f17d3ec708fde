"""What the sparse runtime is meant to reach, and whether it does; and results that are measured in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sparse_subjects import PATTERNS, SPARSITIES, SUBJECTS

GOALS = {"unstructured": (1.3, 1.7, 2.5), "16x1": (1.5, 2.0, 3.2)}
"""Pattern -> speed over dense fp32 at the three sparsities, one thread, 197 tokens or more."""

MANY_TOKENS = 197
"""From this many the goals are set."""

DECODE_GOALS = (2.4, 3.3, 5.0)
INT8_GOAL, FILE_GOAL, MEMORY_GOAL = 1.5, 1.05, 1.1


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what was measured, beside its limit, and whether it was reached."""
    rows: list[dict[str, Any]] = []

    def add(goal: str, wanted: float, row: Mapping[str, Any], key: str, *, at_most: bool = False) -> None:
        reached = row[key] <= wanted if at_most else row[key] >= wanted
        rows.append(
            {"goal": goal, "wanted": wanted, "found": row[key], "low": row.get("low"), "high": row.get("high"),
             "limit": row.get("limit"), "is_reached": reached}
        )  # fmt: skip

    for row in result.get("speed", ()):
        if row["pattern"] in GOALS and row["threads"] == 1 and row["tokens"] >= MANY_TOKENS:
            wanted = GOALS[row["pattern"]][SPARSITIES.index(row["sparsity"])]
            add(f"speed, {row['model']}, {row['size']}, {row['pattern']}, {row['sparsity']:.0%}", wanted, row, "speedup")
    for row in result.get("decode", ()):
        wanted = DECODE_GOALS[SPARSITIES.index(row["sparsity"])]
        add(f"one token, linear layers, {row['pattern']}, {row['sparsity']:.0%}", wanted, row, "speedup")
    for row in result.get("int8", ()):
        if row["pattern"] == "1x4" and row["sparsity"] == 0.75:
            add(f"sparse int8 over dense int8, {row['model']}, {row['pattern']}, 75%", INT8_GOAL, row, "over_int8")
    for row in result.get("files", ()):
        head = f"{row['model']}, {row['pattern']}, {row['sparsity']:.0%}"
        add(f"file over kept weights and one bit per place, {head}", FILE_GOAL, row, "over_ideal", at_most=True)
    for row in result.get("memory", ()):
        head = f"{row['model']}, {row['pattern']}, {row['sparsity']:.0%}, weights {row['weights']}"
        add(f"memory over file, activations apart, {head}", MEMORY_GOAL, row, "over_file", at_most=True)
        add(f"time to load in ms, {head}", row["dense_load_ms"], row, "load_ms", at_most=True)
    return rows


def joined(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier result with the rows of masks and parts that were measured again in place of its own."""
    again = {_masks_of(row) for row in now["operators"]}
    result = {**before, **{part: now[part] for part in ("machine", "options")}}
    for part in ("speed", "files", "memory", "operators"):
        rows = [row for row in before.get(part, ()) if _masks_of(row) not in again] + now[part]
        result[part] = sorted(rows, key=_place)
    result |= {part: now[part] for part in ("decode", "int8") if part in now}
    return {**result, "goals": judge(result)}


def _masks_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row.get("pattern"), row.get("sparsity")


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Models, patterns and sparsities in their own order, dense first; rows of one mask stay in theirs."""
    pattern = PATTERNS.index(row["pattern"]) if "pattern" in row else -1
    return list(SUBJECTS).index(row["model"]), pattern, row.get("sparsity", 0.0)
