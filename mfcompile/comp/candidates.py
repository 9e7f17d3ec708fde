"""What of a model joint pruning may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mfcompile.comp.modes import TokenMode, UnitMode, token_modes, unit_modes
from mfcompile.comp.options import CompOptions
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.token_sites import TokenSites
from mfcompile.passes.unit_scores import scorer_weighting
from mfcompile.structure import find_units, regions_of_units
from mfcompile.tokens import find_token_sites, with_program_for, with_token_program


@dataclass(frozen=True)
class Candidates:
    """What a search may choose of.

    Attributes:
        dense: the graph, with the program that all is cut in.
        modes: what may go.
        skipped: units and sites that are in no mode, and why.
    """

    dense: CapturedGraph
    modes: tuple[UnitMode | TokenMode, ...]
    skipped: tuple[Diagnostic, ...]


def candidates_of(captured: CapturedGraph, options: CompOptions, modalities: Mapping[str, str] | None = None) -> Candidates:
    """What joint pruning of a model may choose of.

    Args:
        captured: the model.
        options: which modes, caps and places are asked for.
        modalities: as in ``prune_jointly``.

    Raises:
        InputError: a mode is unknown, or there is none.
        ExportError: the model has no exported program.
    """
    sites = find_token_sites(fixed := with_token_program(captured, modalities=modalities), modalities=modalities)
    dense = _with_program(captured, fixed, sites, options, modalities)
    modes, skipped = _modes(dense, sites, options, modalities)
    return Candidates(dense, tuple(modes), skipped)


def _with_program(
    captured: CapturedGraph,
    fixed: CapturedGraph,
    sites: TokenSites,
    options: CompOptions,
    modalities: Mapping[str, str] | None,
) -> CapturedGraph:
    """The graph with the program that all is cut in: lengths of inputs whose tokens are in no mode stay free."""
    wanted = _chosen(token_modes(sites.sites, options.caps, options.at), options)
    keep: dict[str, int | float] = {site.name: 1.0 for mode in wanted if isinstance(mode, TokenMode) for site in mode.sites}
    return with_program_for(captured, keep, modalities=modalities) if keep else fixed


def _chosen(modes: Sequence[UnitMode | TokenMode], options: CompOptions) -> list[UnitMode | TokenMode]:
    """The modes that are asked for: all but tokens of text, where none are named."""
    if options.modes is None:
        return [mode for mode in modes if not (isinstance(mode, TokenMode) and mode.is_text)]
    return [mode for mode in modes if mode.name in options.modes]


def _modes(
    dense: CapturedGraph, sites: TokenSites, options: CompOptions, modalities: Mapping[str, str] | None
) -> tuple[list[UnitMode | TokenMode], tuple[Diagnostic, ...]]:
    """The modes that are searched over, and what is in none of them."""
    units = find_units(dense, modalities=modalities)
    skipped = [Diagnostic(item.name, f"{item.kind} stay: {item.node}: {item.reason}") for item in units.refused]
    skipped += sites.refused
    scored, unscored = _scorable(dense, units.units, options.scorer, modalities)
    skipped += unscored
    every: list[UnitMode | TokenMode] = [*unit_modes(scored, options.caps), *token_modes(sites.sites, options.caps, options.at)]
    known = [mode.name for mode in every]
    for name in (*(options.modes or ()), *options.caps):
        if name not in known:
            why = f" ({skipped[0]})" if skipped else ""
            raise InputError(f"there is no mode {name!r}; this model's modes are {', '.join(known) or 'none'}{why}")
    chosen = _chosen(every, options)
    if not chosen:
        reasons = "; ".join(str(item) for item in skipped[:3]) or "it has neither"
        raise InputError(f"no units and no tokens of this model can go: {reasons}")
    return chosen, tuple(skipped)


def _scorable(
    dense: CapturedGraph, units: Sequence[StructuralUnit], scorer: str, modalities: Mapping[str, str] | None
) -> tuple[list[StructuralUnit], list[Diagnostic]]:
    """Units that can be scored: those whose output weight calibration observes, where the scorer needs that."""
    if scorer_weighting(scorer) is None:
        return list(units), []
    sites = {site.fqn for site in regions_of_units(dense, units, modalities).pruned_sites}
    missing = [unit for unit in units if unit.output_weight not in sites]
    reason = "the inputs of {} are not observed by calibration, so that its units have no score"
    skipped = [Diagnostic(unit.name, reason.format(unit.output_weight)) for unit in missing]
    return [unit for unit in units if unit.output_weight in sites], skipped
