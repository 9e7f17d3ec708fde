"""What a comparison of pruners found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mfcompile.files import publish_document
from mfcompile.graph import Diagnostic
from mfcompile.passes.allocation import Sparsity
from mfcompile.passes.mask_agreement import Agreement
from mfcompile.passes.output_error import ComparedOutput, OutputErrors

FORMAT_VERSION = 1


@dataclass(frozen=True)
class MetricChoice:
    """The user's metric that ranks the pruners.

    Attributes:
        name: of those that ``evaluate`` returns.
        is_higher_better: which way is better.
        reason: how that was decided.
    """

    name: str
    is_higher_better: bool
    reason: str


@dataclass(frozen=True)
class ComparedModel:
    """One pruned model.

    Attributes:
        pruner: label of what pruned it.
        sparsity: what was asked for: a fraction, or region -> fraction.
        weights: prunable weights.
        kept: how many of them are kept.
        regions: region -> fraction removed.
        layers: site -> fraction removed.
        errors: errors of the outputs against the dense model.
        metrics: the user's own; empty without ``evaluate``.
        digest: sha256 of the masks.
        seconds: how long the masks took to choose, calibration not counted; gradients that several pruners share are counted
            where they were taken. The one figure that differs from run to run.
        is_best: no other pruner is better at this sparsity.
        diagnostics: what was decided by a weaker rule while the masks were chosen.
    """

    pruner: str
    sparsity: Sparsity
    weights: int
    kept: int
    regions: Mapping[str, float]
    layers: Mapping[str, float]
    errors: OutputErrors
    metrics: Mapping[str, float]
    digest: str
    seconds: float
    is_best: bool = False
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def achieved(self) -> float:
        """The fraction removed."""
        return 1 - self.kept / self.weights

    @property
    def least_pruned(self) -> tuple[str, float]:
        """The site that loses the smallest fraction, and that."""
        return min(self.layers.items(), key=lambda item: item[1])

    @property
    def most_pruned(self) -> tuple[str, float]:
        """The site that loses the largest fraction, and that; a fraction of 1 empties a layer."""
        return max(self.layers.items(), key=lambda item: item[1])

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON knows it; what is not finite is null."""
        return {
            "pruner": self.pruner,
            "sparsity": dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity,
            "achieved": self.achieved,
            "weights": self.weights,
            "kept": self.kept,
            "is_best": self.is_best,
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "output_error": _finite(self.errors.overall),
            "outputs": {name: _finite(value) for name, value in self.errors.by_output.items()},
            "regions": dict(self.regions),
            "least_pruned": {"layer": self.least_pruned[0], "sparsity": self.least_pruned[1]},
            "most_pruned": {"layer": self.most_pruned[0], "sparsity": self.most_pruned[1]},
            "emptied_layers": [name for name, removed in self.layers.items() if removed == 1],
            "layers": dict(self.layers),
            "digest": self.digest,
            "seconds": round(self.seconds, 3),
            "diagnostics": _told(self.diagnostics),
        }


@dataclass(frozen=True)
class Comparison:
    """Several pruners side by side.

    Attributes:
        rows: one per pruner and sparsity: by rising sparsity, the best first.
        agreements: (sparsity, agreement of the masks) of every sparsity.
        pruners: what every label stands for.
        dense: the user's metrics of the dense model.
        metric: what ranks; None for the output error.
        outputs: the outputs that were compared.
        data: what calibrated, and what the outputs were compared on.
        model: class, number of parameters and of prunable weights, fingerprint.
        versions: of the libraries.
        seed: of everything random.
        diagnostics: what was decided by a weaker rule, and outputs that were not compared.
        source: where the model came from, where that is known.
    """

    rows: tuple[ComparedModel, ...]
    agreements: tuple[tuple[Sparsity, Agreement], ...]
    pruners: tuple[Mapping[str, Any], ...]
    dense: Mapping[str, float]
    metric: MetricChoice | None
    outputs: tuple[ComparedOutput, ...]
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    diagnostics: tuple[Diagnostic, ...] = ()
    source: Mapping[str, Any] | None = None

    def at(self, sparsity: Sparsity) -> tuple[ComparedModel, ...]:
        """The rows of one sparsity, the best first."""
        return tuple(row for row in self.rows if row.sparsity == sparsity)

    @property
    def sparsities(self) -> tuple[Sparsity, ...]:
        """Every sparsity that has rows, in their order."""
        found: list[Sparsity] = []
        for row in self.rows:
            if row.sparsity not in found:
                found.append(row.sparsity)
        return tuple(found)

    @property
    def middle(self) -> int:
        """Index of the agreement that one would look at first: the middle one of those between several pruners."""
        several = [index for index, (_, item) in enumerate(self.agreements) if len(item.labels) > 1]
        return several[len(several) // 2] if several else 0

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it; the same comparison gives the same but for ``seconds``."""
        return {
            "format": "mfcompile.comparison",
            "format_version": FORMAT_VERSION,
            "versions": dict(self.versions),
            "source": None if self.source is None else dict(self.source),
            "model": dict(self.model),
            "seed": self.seed,
            "data": dict(self.data),
            "metric": None
            if self.metric is None
            else {
                "name": self.metric.name,
                "is_higher_better": self.metric.is_higher_better,
                "reason": self.metric.reason,
            },
            "outputs": [
                {"name": item.name, "kind": item.kind, "elements": item.elements, "left_out": item.left_out}
                for item in self.outputs
            ],
            "dense": {"metrics": {name: _finite(value) for name, value in self.dense.items()}},
            "pruners": [dict(item) for item in self.pruners],
            "rows": [row.as_dict() for row in self.rows],
            "agreement": [
                {"sparsity": dict(value) if isinstance(value, Mapping) else value, **item.as_dict()}
                for value, item in self.agreements
            ],
            "middle": self.middle,
            "diagnostics": _told(self.diagnostics),
        }

    def save(self, output_dir: Path | str, *, overwrite: bool = False) -> Path:
        """Write compare.json, compare.png and compare.svg into a new directory, complete or not at all.

        Raises:
            InputError: the directory is not empty (see ``overwrite``) or not writable.
        """
        from mfcompile.comparison_plot import plot_comparison

        return publish_document(self.as_dict(), Path(output_dir), "compare", plot_comparison, overwrite=overwrite)


def ranked(rows: Sequence[ComparedModel], metric: MetricChoice | None) -> Iterable[ComparedModel]:
    """Rows by sparsity in the order of their first, in each the best first and marked; a row on its own is not marked.

    The metric decides, and output error where metrics are equal, or where there is none. Rows that share the best figure
    are all marked.
    """
    while rows:
        together = [row for row in rows if row.sparsity == rows[0].sparsity]
        rows = [row for row in rows if row.sparsity != rows[0].sparsity]
        ordered = sorted(together, key=lambda row: (_cost(row, metric), row.errors.overall))
        best = _cost(ordered[0], metric)
        for row in ordered:
            yield replace(row, is_best=len(ordered) > 1 and math.isfinite(best) and _cost(row, metric) == best)


def _cost(row: ComparedModel, metric: MetricChoice | None) -> float:
    """What is to be small; infinite where it is not a number."""
    value = row.errors.overall if metric is None else row.metrics.get(metric.name, math.nan)
    if math.isnan(value):
        return math.inf
    return -value if metric is not None and metric.is_higher_better else value


def percent(sparsity: Sparsity) -> str:
    """A sparsity as people read it."""
    if isinstance(sparsity, Mapping):
        return ", ".join(f"{region} {100 * value:.4g} %" for region, value in sparsity.items())
    return f"{100 * sparsity:.4g} %"


def _told(items: Iterable[Diagnostic]) -> list[dict[str, str]]:
    return [{"subject": item.subject, "reason": item.reason} for item in items]


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: None stands for both."""
    return float(value) if math.isfinite(value) else None
