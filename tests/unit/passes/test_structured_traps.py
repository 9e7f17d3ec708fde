"""Units in models with traps: found by what operators do, removed as zeros would, refused with node and reason."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import mfcompile
from mfcompile.structure import StructuralUnits
from tests.structured_models import check_removal, spread_out
from tests.structured_traps import (
    Around,
    Attention,
    ConvolvedMiddle,
    Gated,
    GatedInOne,
    Library,
    Parallel,
    Part,
    Plain,
    PointwiseConvolutions,
    SharedBias,
    SharedInput,
    SharedMiddle,
    Twice,
    tokens,
)

Found = list[tuple[str, int]]
Cases = tuple[tuple[Callable[[], nn.Module], Found], ...]

WAYS_TO_ATTEND = (
    "sdpa", "fused", "interleaved", "slices", "flat", "einsum", "temperature", "bias", "alibi", "table", "head_norm",
    "repeated mask",
)  # fmt: skip
FEED_FORWARD: Cases = (
    (Plain, [("channels", 16)]),
    (Gated, [("channels", 16)]),
    *((functools.partial(GatedInOne, way), [("channels", 16)]) for way in ("chunk", "split", "slice", "glu", "interleaved")),
    (ConvolvedMiddle, [("channels", 8)]),
    (PointwiseConvolutions, [("channels", 8)]),
    (lambda: Twice(Plain()), [("channels", 16)]),
    (Parallel, [("heads", 4), ("channels", 8)]),
)  # fmt: skip
ATTENTION: Cases = (
    *((functools.partial(Attention, way), [("heads", 4)]) for way in WAYS_TO_ATTEND),
    (lambda: Twice(Attention()), [("heads", 4)]),
    (lambda: Attention("talk"), [("channels", 4), ("heads", 4)]),
)
WAYS_TO_GROUP = ("sdpa", "slices", "sdpa_groups", "shared", "repeat", "einsum")
GROUPS: Cases = (
    *((functools.partial(Attention, way, groups=2), [("heads", 2)]) for way in WAYS_TO_GROUP),
    *((functools.partial(Attention, way, groups=1), [("heads", 4)]) for way in ("sdpa", "sdpa_groups")),
)
REFUSED: tuple[tuple[Callable[[], Part], str], ...] = (
    (lambda: SharedMiddle("norm"), r"layer_norm.*computes across"),
    (lambda: SharedMiddle("linear"), r"linear.*more than W_out"),
    (lambda: SharedMiddle("mean"), r"mean.*reduces over"),
    (lambda: SharedMiddle("position"), r"slice.*reads elements by their position"),
    (lambda: SharedMiddle("residual"), r"linear.*ties all elements"),
    (SharedInput, r"linear.*more than W_out"),
    (lambda: Attention("across"), r"softmax.*computes across"),
    (lambda: Attention("wide_norm"), r"layer_norm"),
)


def by_part(units: StructuralUnits) -> dict[int, Found]:
    """Number of a part -> kinds and counts of its units."""
    found: dict[int, Found] = {}
    for unit in units.units:
        found.setdefault(int(unit.output_weight.split(".")[1]), []).append((unit.kind, unit.count))
    return found


def check_trainable(module: nn.Module, units: StructuralUnits) -> None:
    """A step of SGD changes every parameter of every unit."""
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    module(**tokens()).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for unit in units.units for name in unit.weights if name in before} <= moved


@pytest.mark.parametrize("cases", [FEED_FORWARD, ATTENTION, GROUPS], ids=["feed-forward", "attention", "groups"])
def test_removal_is_zeros_in_the_output_weight_however_a_part_is_written(
    cases: Cases,
) -> None:
    torch.manual_seed(0)
    model = spread_out(Around(*(build() for build, _ in cases)))
    units, smaller = check_removal(model, tokens())
    assert {part: sorted(found) for part, found in by_part(units).items()} == {
        part: sorted(expected) for part, (_, expected) in enumerate(cases)
    }
    assert not units.refused, units
    check_trainable(smaller.module, units)


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"decoder": True}], ids=str)
def test_packed_projections_of_the_library_lose_rows_of_all_three(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    units, smaller = check_removal(spread_out(Library(**options)), tokens())
    heads = [unit for unit in units.units if unit.kind == "heads"]
    assert [(unit.kind, unit.count) for unit in units.units] == [("heads", 4)] * len(heads) + [("channels", 8)]
    assert len(heads) == 1 + options.get("decoder", False)
    assert smaller.module.get_parameter("layer.self_attn.in_proj_weight").shape == (24, 16)
    assert smaller.module.get_parameter("layer.self_attn.in_proj_bias").shape == (24,)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_bias_that_several_attentions_share_is_cut_where_each_reads_it(is_transposed: bool) -> None:
    torch.manual_seed(0)
    batch = {**tokens(), "mask": torch.ones(4, 4, dtype=torch.long).tril()}
    units, smaller = check_removal(spread_out(SharedBias(is_transposed)), batch)
    assert [(unit.kind, unit.count) for unit in units.units] == [("heads", 4)] * 2
    assert smaller.module.get_parameter("table.weight").numel() == 32
    assert smaller.module.get_parameter("parts.1.q.weight").shape == (8, 16)


def test_what_cannot_be_removed_says_where_and_why() -> None:
    torch.manual_seed(0)
    captured = mfcompile.capture(spread_out(Around(*(build() for build, _ in REFUSED))), tokens())
    units = mfcompile.find_units(captured)
    assert not units.units, units
    for part, (_, reason) in enumerate(REFUSED):
        said = [str(item) for item in units.refused if item.name.startswith(f"parts.{part}")]
        assert any(re.search(reason, text) for text in said), (part, said)
    name = units.refused[0].name
    with pytest.raises(mfcompile.InputError, match=re.escape(f"nothing can be removed of {name}: {name} (")):
        mfcompile.remove_units(captured, {name: [0]})
