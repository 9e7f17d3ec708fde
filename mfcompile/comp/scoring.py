"""Scores of the units of a graph, on batches that run through it as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mfcompile.graph import CapturedGraph
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.unit_scores import resolve_unit_scorer, scorer_weighting
from mfcompile.region import RegionMap
from mfcompile.steps import calibrate, infer_regions
from mfcompile.structure import output_weights, unit_norms


@dataclass(frozen=True)
class CalibratedScores:
    """Scores the units of a graph, on calibration batches that run through it as it is.

    Attributes:
        scorer: see ``mfcompile.passes.unit_scores``.
        batches: what runs.
        modalities, padding_mask: as in ``mfcompile.calibrate``.
    """

    scorer: str
    batches: Sequence[ExampleInputs]
    modalities: Mapping[str, str] | None
    padding_mask: str | None

    def __call__(self, captured: CapturedGraph, units: Sequence[StructuralUnit]) -> dict[str, Tensor]:
        """Unit -> (count,) scores."""
        weighting = scorer_weighting(self.scorer)
        regions = regions_of_units(captured, units, self.modalities)
        norms: dict[str, Tensor] = {}
        if weighting is not None:
            how: dict[str, Any] = {} if weighting == "none" else {"weighting": weighting}
            statistics = calibrate(captured, list(self.batches), regions=regions, padding_mask=self.padding_mask, **how)
            norms = unit_norms(units, statistics)
        return resolve_unit_scorer(self.scorer)(units, output_weights(captured, units, regions), norms)


def regions_of_units(
    captured: CapturedGraph, units: Iterable[StructuralUnit], modalities: Mapping[str, str] | None
) -> RegionMap:
    """Regions with the output weights of units as sites, and no others."""
    known = infer_regions(captured, modalities=modalities)
    linear = {site.fqn for site in known.sites}
    targets = [fqn for fqn in dict.fromkeys(unit.output_weight for unit in units) if fqn in linear]
    return infer_regions(captured, modalities=modalities, targets=targets) if targets else replace(known, sites=())
