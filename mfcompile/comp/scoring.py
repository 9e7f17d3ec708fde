"""Scores of the units of a graph, on batches that run through it as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mfcompile.graph import CapturedGraph
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.unit_scores import resolve_unit_scorer, scorer_weighting
from mfcompile.steps import calibrate
from mfcompile.structure import output_weights, regions_of_units, unit_norms


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
