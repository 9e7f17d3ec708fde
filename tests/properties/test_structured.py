"""Whatever elements are removed, in one go or in two: outputs are those with zeros in W_out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.structure import StructuralUnits
from tests.structured_models import largest_difference, outputs, spread_out, zeroed
from tests.structured_traps import Around, Attention, GatedInOne, Plain, tokens


@functools.cache
def built() -> tuple[Any, CapturedGraph, StructuralUnits]:
    torch.manual_seed(0)
    model = spread_out(Around(Attention("slices", groups=2), GatedInOne("chunk"), Attention("fused"), Plain()))
    captured = mfcompile.with_token_program(mfcompile.capture(model, tokens()))
    return model, captured, mfcompile.find_units(captured)


@st.composite
def removals(draw: st.DrawFn) -> dict[str, list[int]]:
    units = built()[2].units
    chosen = draw(st.lists(st.sampled_from(units), unique_by=lambda unit: unit.name, min_size=1))
    return {unit.name: draw(st.lists(st.integers(0, unit.count - 1), unique=True, max_size=unit.count - 1)) for unit in chosen}


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(removals())
def test_any_elements_of_any_units(remove: dict[str, list[int]]) -> None:
    model, captured, units = built()
    smaller = mfcompile.remove_units(captured, remove)
    expected = zeroed(model, units, remove)
    assert largest_difference(outputs(expected, tokens()), outputs(smaller.module, tokens())) < 1e-5
    for name, elements in remove.items():
        kept = units.unit(name).count - len(elements)
        assert sum(kept == int(word) for word in _stay(smaller, name)) == bool(elements)


def _stay(smaller: CapturedGraph, name: str) -> list[str]:
    """What the notes say of how many elements of a unit stay."""
    return [note.rpartition(": ")[2].split(" ")[0] for note in smaller.specialised if f" of {name}: " in note]


@pytest.mark.parametrize("scope", ["unit", "pattern"])
def test_the_share_that_is_asked_for_goes_lowest_first(scope: str) -> None:
    _, captured, units = built()
    scores = {unit.name: torch.arange(unit.count).double() for unit in units.units}
    smaller = mfcompile.prune_structure(captured, {"kind:channels": 0.5, "parts.0": 0.5}, scores=scores, scope=scope)
    weight = captured.parameter("parts.3.a.weight")
    assert torch.equal(smaller.module.get_parameter("parts.3.a.weight"), weight[8:])
    assert torch.equal(smaller.module.get_parameter("parts.3.b.weight"), captured.parameter("parts.3.b.weight")[:, 8:])
    assert smaller.module.get_parameter("parts.0.qkv.weight").shape == (8 + 4 + 4, 16)  # two query heads share what is left
    assert {unit.name: unit.count for unit in mfcompile.find_units(smaller).units} == {
        "parts.0": 2, "parts.1": 8, "parts.2": 4, "parts.3": 8,
    }  # fmt: skip


def test_scores_come_from_weights_or_from_norms() -> None:
    _, captured, units = built()
    regions = mfcompile.infer_regions(captured, targets=["*"])
    statistics = mfcompile.calibrate(captured, regions=regions)
    weights = mfcompile.output_weights(captured, units.units, regions)
    norms = mfcompile.unit_norms(units.units, statistics)
    kept = {}
    for label, options in {"magnitude": {}, "wanda": {"statistics": statistics}}.items():
        smaller = mfcompile.prune_structure(captured, {"parts.3": 0.25}, **options)  # type: ignore[arg-type]
        score = weights["parts.3.b.weight"].abs().mean(0) * (norms["parts.3.b.weight"] if options else 1)
        kept[label] = score.topk(12).indices.sort().values
        assert torch.equal(
            smaller.module.get_parameter("parts.3.a.weight"), captured.parameter("parts.3.a.weight")[kept[label]]
        )
    assert not torch.equal(kept["magnitude"], kept["wanda"])
    with pytest.raises(mfcompile.InputError, match="needs activation norms"):
        mfcompile.prune_structure(captured, 0.5, scorer="wanda")


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"region:audio": 0.5}, "names no unit.*Units are parts.0 .heads"),
        (1.0, "share to remove, from 0 to below 1"),
        ({"re:(": 0.5}, "no regular expression"),
    ],
)
def test_requests_that_name_nothing(shares: Any, message: str) -> None:
    with pytest.raises(mfcompile.InputError, match=message):
        mfcompile.prune_structure(built()[1], shares)
