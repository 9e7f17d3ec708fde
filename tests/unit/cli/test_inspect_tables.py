"""The tables of inspect: what they count, how equal layers are folded, and what is never hidden."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from mfcompile.cli import inspect_tables


def weight(name: str, *, region: str = "fusion", calls: int = 1, **changes: Any) -> dict[str, Any]:
    block = name.rpartition(".")[0].rpartition(".")[0]
    use = {
        "node": "n",
        "activation": "a",
        "rows": [0, 4],
        "label": [region],
        "block": block,
        "block_label": [region],
        "module": "",
    }
    return {
        "name": name, "region": region, "shape": [4, 8], "weights": 32, "reason": None, "override": None, "tied_with": [],
        "label": [region], "block": block, "block_label": [region], "uses": [use] * calls, **changes,
    }  # fmt: skip


def shown(table: RenderableType | None) -> str:
    assert table is not None
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


STACK = [weight(f"text.layers.{index}.{name}.weight") for index in range(60) for name in ("q", "k")]


def test_equal_layers_are_one_row_with_their_number() -> None:
    assert [(name, len(members)) for name, members in inspect_tables.folded(STACK)] == [
        ("text.layers.{0..59}.q.weight", 60),
        ("text.layers.{0..59}.k.weight", 60),
    ]
    text = shown(inspect_tables.weights_table({"weights": STACK}, everything=False))
    assert "Linear weights: 120 (equal layers are folded; --all lists every one)" in text
    assert "text.layers.{0..59} (fusion)" in text
    assert len(text.splitlines()) < 8
    everything = shown(inspect_tables.weights_table({"weights": STACK}, everything=True))
    assert all(f"text.layers.{index}.q.weight" in everything for index in range(60))


@pytest.mark.parametrize(
    "change",
    [{"region": "text"}, {"reason": "ignored"}, {"shape": [2, 8]}, {"label": []}, {"calls": 2}, {"tied_with": ["x"]}],
)
def test_a_layer_that_differs_is_never_folded_away(change: dict[str, Any]) -> None:
    odd = weight("text.layers.7.q.weight", **change)
    found = dict(inspect_tables.folded([item for item in STACK if item["name"] != odd["name"]] + [odd]))
    assert found["text.layers.7.q.weight"] == [odd]
    assert "text.layers.{0,1,2,3,4,5,…}.q.weight" in found


def test_numbers_inside_words_are_not_folded() -> None:
    names = ["layers.0.fc1.weight", "layers.0.fc2.weight", "experts[3]", "experts[4]"]
    assert [name for name, _ in inspect_tables.folded([weight(name, block=None) for name in names])] == [
        "layers.0.fc1.weight", "layers.0.fc2.weight", "experts[{3..4}]",
    ]  # fmt: skip


def test_short_tables_are_not_folded() -> None:
    text = shown(inspect_tables.weights_table({"weights": STACK[:4]}, everything=False))
    assert "text.layers.0.q.weight" in text
    assert "text.layers.1.k.weight" in text
    assert "times" not in text


def test_regions_are_counted_with_what_stays_dense() -> None:
    row = {"region": "vision", "weights": 3, "elements": 96, "pruned_weights": 2, "pruned_elements": 64, "blocks": 2}
    empty = {"region": "untagged", "weights": 1, "elements": 0, "pruned_weights": 0, "pruned_elements": 0, "blocks": 0}
    lines = shown(inspect_tables.regions_table({"regions": [row, empty]})).splitlines()
    assert next(line for line in lines if "vision" in line).split() == ["vision", "3", "96", "2", "64", "66.67", "%", "2"]
    assert next(line for line in lines if "untagged" in line).split()[-3:] == ["0.00", "%", "0"]
    assert next(line for line in lines if "all linear" in line).split()[3:] == ["4", "96", "2", "64", "66.67", "%", "2"]


def test_shared_weights_list_the_modalities_of_their_calls() -> None:
    twice = weight("x.layers.0.q.weight", calls=2)
    twice["uses"] = [{**twice["uses"][0], "label": ["text"]}, {**twice["uses"][0], "label": ["vision"]}]
    text = shown(
        inspect_tables.shared_table({"weights": [twice, weight("y.weight", tied_with=["z.weight"])]}, everything=False)
    )
    assert "text; vision" in text
    assert "z.weight" in text
    assert inspect_tables.shared_table({"weights": STACK}, everything=False) is None


def test_fused_rows_are_one_call_each() -> None:
    fused = weight("x.qkv.weight")
    fused["uses"] = [{**fused["uses"][0], "rows": [4 * part, 4 * part + 4]} for part in range(3)]
    assert inspect_tables.shared_table({"weights": [fused]}, everything=False) is None


def test_notes_are_grouped_by_reason() -> None:
    view = {"diagnostics": [{"subject": f"w{index}", "reason": f"changed by mul_{index}"} for index in range(9)]}
    text = shown(inspect_tables.diagnostics_table(view, everything=False))
    assert "w0, w1 and 7 more" in text
    assert "changed by mul" in text
    assert "w8" in shown(inspect_tables.diagnostics_table(view, everything=True))
    assert inspect_tables.diagnostics_table({"diagnostics": []}, everything=False) is None
