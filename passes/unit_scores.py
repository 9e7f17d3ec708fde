"""Scores of structural units: how much each hidden channel or attention head matters, by what it gives to W_out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mfcompile.errors import CalibrationError, InputError


class Unit(Protocol):
    """What a score needs of a structural unit (``mfcompile.structure.StructuralUnit``)."""

    @property
    def name(self) -> str:
        """Path of the submodule."""

    @property
    def count(self) -> int:
        """Elements (channels, heads) of which some may be removed."""

    @property
    def output_weight(self) -> str:
        """FQN of W_out, whose input channels the elements are."""

    def columns(self, element: int) -> Sequence[int]:
        """The input channels of W_out that belong to an element."""


UnitScorer = Callable[[Sequence[Unit], Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""Takes units, weights and norms as ``unit_scores`` does, and gives what it gives."""


def unit_scores(units: Iterable[Unit], weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Score every element of every unit by its output weights and its activation norm.

    S_i = (1/d) sum_j |W_ij| ||x_i|| for an input channel i of W_out, Eq. 3 of CoMP (CVPR 2026). With norms of
    ``calibrate(weighting="cip")`` it is Eq. 4. An element of several channels (a head, or a group of query heads with their
    key and value) scores the mean of them.

    Args:
        units: what ``find_units`` found.
        weights: FQN of W_out -> (out_features, in_features), any float dtype; not changed.
        norms: FQN of W_out -> (in_features,) norm of each input channel.

    Returns:
        Name of the unit -> (count,) float64 on the CPU, not negative. Scores compare across units of one kind of norm.

    Raises:
        InputError: a weight is missing or is no matrix, or a unit names a channel that it has not.
        CalibrationError: a unit's W_out has no norm, one of another size, or one that is not finite.
    """
    found = {}
    for unit in units:
        weight = _weight_of(unit, weights)
        norm = norms.get(unit.output_weight)
        if norm is None or norm.shape != (weight.shape[1],):
            seen = "none" if norm is None else f"one of shape {tuple(norm.shape)}"
            raise CalibrationError(
                f"unit {unit.name}: {unit.output_weight} has {weight.shape[1]} input channels, and the norms hold {seen} for "
                f"it. Calibrate with this weight among the targets"
            )
        norm = norm.detach().cpu().double()
        if not bool(torch.isfinite(norm).all()):
            raise CalibrationError(f"unit {unit.name}: the norm of {unit.output_weight} holds NaN or infinity. Check the data")
        found[unit.name] = _by_element(unit, weight.abs().mean(dim=0) * norm)
    return found


def unit_magnitudes(units: Iterable[Unit], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores without data: (1/d) sum_j |W_ij|; arguments and errors are those of ``unit_scores``."""
    return {unit.name: _by_element(unit, _weight_of(unit, weights).abs().mean(dim=0)) for unit in units}


def random_unit_scores(units: Iterable[Unit], seed: int = 0) -> dict[str, Tensor]:
    """Scores drawn from [0, 1), (count,) float64 each; those of a unit do not depend on which others there are."""
    found = {}
    for unit in units:
        own = sum(byte * 257**place for place, byte in enumerate(unit.name.encode())) % 2**31
        generator = torch.Generator().manual_seed(seed * 2**31 + own)
        found[unit.name] = torch.rand(unit.count, generator=generator, dtype=torch.float64)
    return found


def normed_scores(units: Sequence[Unit], weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``unit_scores``, as a ``UnitScorer``."""
    return unit_scores(units, weights, norms)


UNIT_SCORERS: Mapping[str, UnitScorer] = {
    "wanda": normed_scores,
    "cip": normed_scores,
    "magnitude": lambda units, weights, _: unit_magnitudes(units, weights),
    "random": lambda units, _, __: random_unit_scores(units),
}
"""The scorers that have a name. "wanda" and "cip" are one formula on other norms: see ``scorer_weighting``."""


def scorer_weighting(scorer: str | UnitScorer) -> str | None:
    """The ``weighting`` of calibration whose norms a scorer takes: "none" or "cip"; None where it needs no norms."""
    return {"wanda": "none", "cip": "cip", "magnitude": None, "random": None}[scorer] if isinstance(scorer, str) else "none"


def resolve_unit_scorer(scorer: str | UnitScorer) -> UnitScorer:
    """A scorer by its name, or the given object.

    Raises:
        InputError: there is none of that name, or the object cannot be called.
    """
    if isinstance(scorer, str):
        if scorer not in UNIT_SCORERS:
            raise InputError(f"scorer={scorer!r} is not known; choose one of {', '.join(UNIT_SCORERS)}, or give a callable")
        return UNIT_SCORERS[scorer]
    if not callable(scorer):
        raise InputError(f"scorer is a {type(scorer).__name__}; give a name or a callable that takes units, weights and norms")
    return scorer


def _weight_of(unit: Unit, weights: Mapping[str, Tensor]) -> Tensor:
    """(out_features, in_features) float64 on the CPU."""
    weight = weights.get(unit.output_weight)
    if weight is None or weight.ndim != 2:
        seen = "is missing" if weight is None else f"is of shape {tuple(weight.shape)}"
        raise InputError(
            f"unit {unit.name}: its output weight {unit.output_weight} {seen}; give it as (out_features, in_features)"
        )
    return weight.detach().cpu().double()


def _by_element(unit: Unit, channels: Tensor) -> Tensor:
    """(count,) means over the channels of each element."""
    means = []
    for element in range(unit.count):
        columns = torch.as_tensor(list(unit.columns(element)), dtype=torch.int64)
        if not columns.numel() or int(columns.min()) < 0 or int(columns.max()) >= channels.numel():
            raise InputError(
                f"unit {unit.name}: element {element} names the channels {columns.tolist()[:4]} of {unit.output_weight}, which "
                f"has {channels.numel()}"
            )
        means.append(channels[columns].mean())
    return torch.stack(means) if means else torch.zeros(0, dtype=torch.float64)
