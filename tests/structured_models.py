"""For tests of structured removal: removal against zeros in the original model, and models with traps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.frontends.exporting import candidates
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import output_tensors
from mfcompile.structure import StructuralUnits

Remove = Mapping[str, Sequence[int]]


def spread_out(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights and biases large enough that every part of it shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def zeroed(model: nn.Module, units: StructuralUnits, remove: Remove, stored_in_out: bool = False) -> nn.Module:
    """The original model with the columns of W_out that belong to the removed elements set to zero.

    Args:
        model: is copied.
        units: of the model.
        remove: unit -> elements.
        stored_in_out: its weights are stored (in, out), not (out, in).
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, elements in remove.items():
            unit = units.unit(name)
            weight = changed.get_parameter(unit.output_weight)
            for element in elements:
                (weight.T if stored_in_out else weight)[:, list(unit.columns(element))] = 0
    return changed


def some_of(units: StructuralUnits, seed: int = 0, share: float = 0.5) -> dict[str, list[int]]:
    """Elements of every unit, at random; about a share, at least one, never all."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for unit in units.units:
        count = min(max(1, round(share * unit.count)), unit.count - 1)
        chosen[unit.name] = torch.randperm(unit.count, generator=generator)[:count].tolist()
    return chosen


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensor outputs by name."""
    with torch.no_grad():
        return output_tensors(model(**batch))


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Over all outputs, relative to the largest value of each."""
    assert list(first) == list(second)
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp_min(1e-6)) for name in first)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def with_program(captured: CapturedGraph) -> CapturedGraph:
    """The same graph with the program that units are found in and removed from, so that it is exported once for both."""
    if captured.exported is not None:
        return captured
    made = (exported for _, exported in candidates(captured, first="torch.export without cache"))
    return replace(captured, exported=next(exported for exported in made if exported is not None))


def check_removal(
    model: nn.Module,
    batch: Mapping[str, Any],
    captured: CapturedGraph | None = None,
    seed: int = 0,
    stored_in_out: bool = False,
) -> tuple[StructuralUnits, CapturedGraph]:
    """Removal gives what zeros in W_out give, which is not what the dense model gives; gives units and the smaller graph."""
    captured = with_program(mfcompile.capture(model, dict(batch)) if captured is None else captured)
    units = mfcompile.find_units(captured)
    remove = some_of(units, seed)
    smaller = mfcompile.remove_units(captured, remove)
    zeros = zeroed(model, units, remove, stored_in_out)
    expected, found, dense = (outputs(item, batch) for item in (zeros, smaller.module, model))
    assert largest_difference(expected, found) < 1e-4
    assert largest_difference(dense, expected) > 1e-2
    assert parameters(smaller.module) < parameters(model)
    return units, smaller
