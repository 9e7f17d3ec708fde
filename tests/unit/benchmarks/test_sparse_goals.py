"""Goals are judged by what was measured, and results that are measured in parts are put together."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.sparse_goals import joined, judge


def speed(pattern: str, sparsity: float, speedup: float, **given: Any) -> dict[str, Any]:
    plain = {"model": "BERT-like", "size": "batch 1", "tokens": 197, "threads": 1, "low": 1.0, "high": 2.0, "limit": 3.0}
    return {**plain, "pattern": pattern, "sparsity": sparsity, "speedup": speedup, **given}


def result(*rows: dict[str, Any], **given: Any) -> dict[str, Any]:
    keys = ("model", "pattern", "sparsity")
    masks = [{**{key: row[key] for key in keys}, "form": "runtime"} for row in rows]
    return {"machine": {}, "options": {}, "speed": list(rows), "files": [], "memory": [], "operators": masks, **given}


@pytest.mark.parametrize(
    ("row", "wanted", "is_reached"),
    [
        (speed("unstructured", 0.63, 1.3), 1.3, True),
        (speed("unstructured", 0.75, 1.69), 1.7, False),
        (speed("16x1", 0.9, 3.3), 3.2, True),
    ],
)
def test_speed_is_held_against_the_goal_of_its_mask(row: dict[str, Any], wanted: float, is_reached: bool) -> None:
    (found,) = judge({"speed": [row]})
    assert (found["wanted"], found["found"], found["is_reached"], found["limit"]) == (wanted, row["speedup"], is_reached, 3.0)


def test_no_goal_is_set_for_few_tokens_two_threads_and_other_blocks() -> None:
    rows = [speed("unstructured", 0.9, 9.0, tokens=8), speed("unstructured", 0.9, 9.0, threads=2), speed("4x1", 0.9, 9.0)]
    assert judge({"speed": rows}) == []


def test_size_memory_and_loading_are_to_be_small() -> None:
    head = {"model": "BERT-like", "pattern": "unstructured", "sparsity": 0.75}
    memory = {**head, "weights": "inside", "over_file": 1.2, "load_ms": 5.0, "dense_load_ms": 6.0}
    found = judge({"files": [{**head, "over_ideal": 1.04}], "memory": [memory]})
    assert [(item["wanted"], item["found"], item["is_reached"]) for item in found] == [
        (1.05, 1.04, True), (1.1, 1.2, False), (6.0, 5.0, True),
    ]  # fmt: skip


def test_what_is_measured_again_takes_the_place_of_its_own_mask() -> None:
    before = result(speed("16x1", 0.9, 1.0), speed("unstructured", 0.63, 1.0), decode=[])
    found = joined(before, result(speed("unstructured", 0.63, 2.0), speed("unstructured", 0.9, 3.0)))
    assert [(row["pattern"], row["sparsity"], row["speedup"]) for row in found["speed"]] == [
        ("unstructured", 0.63, 2.0), ("unstructured", 0.9, 3.0), ("16x1", 0.9, 1.0),
    ]  # fmt: skip
    assert found["decode"] == []
    assert [goal["found"] for goal in found["goals"]] == [2.0, 3.0, 1.0]
