"""The report: what a compilation decided, what it cost and what it gained, as JSON.

``build_report`` writes down the pruning. What is known only later (the source, the files, parity, latency,
evaluation) is added by the ``with_*`` functions; each returns a new report and leaves the one it was given alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mfcompile._version import __version__
from mfcompile.artifact import ExportedArtifact, ParityReport
from mfcompile.files import write_atomically
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.masks import MaskSet
from mfcompile.region import PruneSite, RegionMap
from mfcompile.statistics import CalibrationStatistics, SiteStatistics
from mfcompile.token_request import token_rows

FORMAT_VERSION = 1

Report = dict[str, Any]
"""A JSON object; its keys are those that ``build_report`` returns, the later ones None until they are known."""


def build_report(
    *,
    captured: CapturedGraph,
    regions: RegionMap,
    statistics: CalibrationStatistics | None,
    masks: MaskSet,
    sparsity: float | Mapping[str, float],
    options: Mapping[str, Any],
) -> Report:
    """Write down what was pruned, where, and on what evidence.

    Args:
        captured: the captured model.
        regions: its regions and sites.
        statistics: what calibration saw; None where the criterion needed none.
        masks: the masks that were selected.
        sparsity: requested sparsity, the fraction removed: one, or region -> its own.
        options: how weights were chosen, as JSON knows it.
    """
    kept = site_kept_counts(regions.pruned_sites, masks)
    sites = [_site_row(site, statistics, kept[site.name]) for site in regions.pruned_sites]
    return {
        "format": "mfcompile.report",
        "format_version": FORMAT_VERSION,
        "versions": {"mfcompile": __version__, **captured.versions},
        "source": None,
        "model": {
            "class": type(captured.module).__name__,
            "parameters": _parameter_count(captured),
            "fingerprint": masks.fingerprint,
        },
        "options": {"sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else sparsity, **options},
        **describe_plan(captured, regions),
        "diagnostics": _diagnostics((*captured.diagnostics, *regions.diagnostics, *masks.diagnostics)),
        "calibration": _calibration(statistics),
        "totals": _totals(captured, sites, sparsity),
        "regions": _region_rows(sites, None if isinstance(options.get("allocation"), Mapping) else sparsity),
        "sites": sites,
        "digest": masks.mask_digest(),
        "export": None,
        "parity": None,
        "latency": None,
        "evaluation": None,
        "files": None,
    }


def describe_plan(captured: CapturedGraph, regions: RegionMap) -> Report:
    """The part of the report that is known before calibration: inputs, capture, skipped sites, diagnostics."""
    return {
        "inputs": input_rows(captured, regions),
        "capture": _capture(captured),
        "skipped": [
            {
                "name": site.name,
                "region": site.region,
                "shape": [site.out_features, site.in_features],
                "weights": site.weight_count,
                "reason": site.skipped,
            }
            for site in regions.skipped_sites
        ],
        "overrides": dict(regions.overrides),
        "tokens": token_rows(captured),
        "diagnostics": _diagnostics((*captured.diagnostics, *regions.diagnostics)),
    }


def _diagnostics(items: Iterable[Diagnostic]) -> list[dict[str, str]]:
    return [{"subject": item.subject, "reason": item.reason} for item in items]


def input_rows(captured: CapturedGraph, regions: RegionMap) -> list[dict[str, Any]]:
    """One row per input: shape, dtype, the modality that it was taken for, and why."""
    decided = {item.name: item for item in regions.modalities}
    rows = []
    for spec in captured.inputs:
        item = decided.get(spec.name)
        rows.append(
            {
                "name": spec.name,
                "shape": list(spec.shape),
                "dtype": str(spec.dtype).removeprefix("torch."),
                "modality": item.modality if item else None,
                "reason": item.reason if item else "no rule looked at this input",
            }
        )
    return rows


def _capture(captured: CapturedGraph) -> dict[str, Any]:
    exported = captured.exported
    return {
        "frontend": captured.frontend,
        "node_count": len(captured.graph.nodes),
        "attempts": [
            {
                "frontend": attempt.frontend,
                "succeeded": attempt.succeeded,
                "detail": attempt.detail,
                "seconds": round(attempt.seconds, 3),
            }
            for attempt in captured.attempts
        ],
        "specialised": list(captured.specialised),
        "baked_scalars": [
            {"node": item.node, "value": item.value, "module": item.module, "from_input": item.from_input}
            for item in captured.baked_scalars
        ],
        "export_route": exported.route if exported else None,
        "export_notes": list(exported.notes) if exported else [],
    }


def _calibration(statistics: CalibrationStatistics | None) -> dict[str, Any] | None:
    if statistics is None:
        return None
    return {
        "source": statistics.source,
        "batches": statistics.batch_count,
        "observed_by": statistics.observed_by,
        "padding_masks": list(statistics.padding_masks),
        "weighting": statistics.weighting,
    }


def _parameter_count(captured: CapturedGraph) -> int:
    """Elements of all parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in captured.module.parameters())


def site_kept_counts(sites: Iterable[PruneSite], masks: MaskSet) -> dict[str, int]:
    """Site name -> how many of its weights are kept; a site that no mask covers keeps all."""
    by_fqn: dict[str, list[PruneSite]] = {}
    for site in sites:
        by_fqn.setdefault(site.fqn, []).append(site)
    found: dict[str, int] = {}
    for fqn, group in by_fqn.items():
        packed = masks.packed.get(fqn)
        if packed is None or packed.weight_count == group[0].weight_count:
            found.update({site.name: site.weight_count if packed is None else packed.kept_count for site in group})
            continue
        matrices = group[0].layout.matrices(packed.unpack())
        found.update({site.name: int(site.matrix(matrices).sum()) for site in group})
    return found


def _site_row(site: PruneSite, statistics: CalibrationStatistics | None, kept: int) -> dict[str, Any]:
    seen: SiteStatistics | None = statistics.sites.get(site.name) if statistics else None
    return {
        "name": site.name,
        "region": site.region,
        "shape": [site.out_features, site.in_features],
        "weights": site.weight_count,
        "kept": kept,
        "sparsity": removed_fraction(site.weight_count, kept),
        "tokens": seen.token_count if seen else None,
        "padding_tokens": seen.padding_count if seen else None,
        "samples": seen.sample_count if seen else None,
        "tied_with": list(site.tied_with),
        "is_shared": site.is_shared,
    }


def _requested(sites: Sequence[Mapping[str, Any]], sparsity: float | Mapping[str, float]) -> float:
    """The fraction that was asked of some sites."""
    if not isinstance(sparsity, Mapping):
        return sparsity
    weights = sum(site["weights"] for site in sites)
    return sum(sparsity[site["region"]] * site["weights"] for site in sites) / weights if weights else 0.0


def _region_rows(sites: Sequence[Mapping[str, Any]], sparsity: float | Mapping[str, float] | None) -> list[dict[str, Any]]:
    """One row per region, in order of first appearance; tokens as the range over its sites.

    Args:
        sites: rows of the sites.
        sparsity: what was asked of regions; None where it was asked of layers.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for site in sites:
        grouped.setdefault(site["region"], []).append(site)
    rows = []
    for region, members in grouped.items():
        weights = sum(site["weights"] for site in members)
        kept = sum(site["kept"] for site in members)
        tokens = [site["tokens"] for site in members if site["tokens"] is not None]
        padding = [site["padding_tokens"] for site in members if site["padding_tokens"] is not None]
        rows.append(
            {
                "region": region,
                "sites": len(members),
                "weights": weights,
                "kept": kept,
                "sparsity_requested": sparsity[region] if isinstance(sparsity, Mapping) else sparsity,
                "sparsity": removed_fraction(weights, kept),
                "tokens_min": min(tokens, default=None),
                "tokens_max": max(tokens, default=None),
                "padding_tokens_max": max(padding, default=None),
            }
        )
    return rows


def _totals(
    captured: CapturedGraph, sites: Sequence[Mapping[str, Any]], sparsity: float | Mapping[str, float]
) -> dict[str, Any]:
    weights = sum(site["weights"] for site in sites)
    kept = sum(site["kept"] for site in sites)
    parameters = _parameter_count(captured)
    return {
        "prunable": {
            "weights": weights,
            "kept": kept,
            "sparsity_requested": _requested(sites, sparsity),
            "sparsity": removed_fraction(weights, kept),
        },
        "all_parameters": {
            "weights": parameters,
            "kept": parameters - (weights - kept),
            "sparsity": removed_fraction(parameters, parameters - (weights - kept)),
        },
    }


def removed_fraction(weights: int, kept: int) -> float:
    """(weights - kept) / weights; 0 of nothing is 0."""
    return (weights - kept) / weights if weights else 0.0


def with_source(report: Report, *, path: str, kind: str, notes: Sequence[str] = ()) -> Report:
    """The report with where the model came from."""
    return {**report, "source": {"path": path, "kind": kind, "notes": list(notes)}}


def with_capture(report: Report, captured: CapturedGraph) -> Report:
    """The report with a later state of the capture: the export program, and what was tried to get it."""
    return {**report, "capture": _capture(captured)}


def with_export(report: Report, artifact: ExportedArtifact) -> Report:
    """The report with the ONNX file: its size against dense fp32, how each pruned weight is stored, its free axes."""
    encodings: dict[str, int] = {}
    for item in artifact.encodings:
        encodings[item.encoding] = encodings.get(item.encoding, 0) + 1
    return {
        **report,
        "export": {
            "file": artifact.path.name,
            "files": [file.name for file in artifact.files],
            "format": artifact.format,
            "values": artifact.values,
            "opset": artifact.opset,
            "size_bytes": artifact.size_bytes,
            "dense_size_bytes": artifact.dense_size_bytes,
            "size_ratio": _finite(artifact.size_bytes / artifact.dense_size_bytes if artifact.dense_size_bytes else 1.0),
            "pruned_ratio": _finite(artifact.pruned_ratio),
            "pruned_stored_bytes": sum(item.stored_bytes for item in artifact.encodings),
            "pruned_dense_bytes": sum(item.dense_bytes for item in artifact.encodings),
            "encodings": encodings,
            "sparse_layers": [item.fqn for item in artifact.encodings if item.is_sparse],
            "dense_layers": {item.fqn: item.why_dense for item in artifact.encodings if item.why_dense},
            "input_names": list(artifact.input_names),
            "output_names": list(artifact.output_names),
            "dynamic_axes": {
                name: {str(dim): axis for dim, axis in axes.items()} for name, axes in artifact.dynamic_axes.items()
            },
            "load_peak_bytes": artifact.load_peak_bytes,
            "load_time_ratio": _finite(artifact.load_time_ratio),
            "parts": [_part_row(part) for part in artifact.parts],
            "notes": list(artifact.notes),
        },
    }


def _part_row(part: ExportedArtifact) -> dict[str, Any]:
    """One file of a split model: its size, and what it reads and gives."""
    return {
        "name": part.path.stem,
        "file": part.path.name,
        "files": [file.name for file in part.files],
        "size_bytes": part.size_bytes,
        "dense_size_bytes": part.dense_size_bytes,
        "input_names": list(part.input_names),
        "output_names": list(part.output_names),
    }


def with_refused_export(report: Report, reason: str) -> Report:
    """The report of a run whose ONNX file could not be written; everything else of it is complete."""
    return {**report, "export_refused": reason}


def with_parity(report: Report, parity: ParityReport) -> Report:
    """The report with the agreement of the ONNX file and the masked PyTorch module."""
    return {**report, "parity": parity_rows(parity)}


def parity_rows(parity: ParityReport) -> dict[str, Any]:
    """A ParityReport as JSON; a difference that is not finite is null."""
    return {
        "passed": parity.passed,
        "rtol": parity.rtol,
        "atol": parity.atol,
        "max_abs_diff": _finite(parity.max_abs_diff),
        "batch_sizes": list(parity.batch_sizes),
        "cases": list(parity.cases),
        "runtime": parity.runtime,
        "reference": parity.reference,
        "notes": list(parity.notes),
        "outputs": [
            {
                "name": output.name,
                "max_abs_diff": _finite(output.max_abs_diff),
                "max_abs": _finite(output.max_abs),
                "within": output.within,
            }
            for output in parity.outputs
        ],
        "sparse": None if parity.sparse is None else parity_rows(parity.sparse),
    }


def with_latency(report: Report, latency: Mapping[str, Any]) -> Report:
    """The report with measured latencies: ``{"medians_ms": {name: ms}, "ratio": pruned / dense, ...}``; with the library of
    ``mfcompile.runtime`` also "sparse" and ``sparse_ratio``; of a split model also ``{"parts_ms": {part: ms}}``."""
    return {**report, "latency": dict(latency)}


def with_evaluation(report: Report, metrics: Mapping[str, Mapping[str, float]], notes: Sequence[str] = ()) -> Report:
    """The report with the user's own evaluation: which model ("dense", "pruned", ...) -> metric -> value."""
    rows = {which: {name: _finite(value) for name, value in row.items()} for which, row in metrics.items()}
    return {**report, "evaluation": {"metrics": rows, "notes": list(notes)}}


def with_files(report: Report, files: Mapping[str, int]) -> Report:
    """The report with the other files of the output directory: name -> bytes."""
    return {**report, "files": dict(files)}


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: None stands for both."""
    return float(value) if math.isfinite(value) else None


def save_report(report: Report, path: Path | str) -> Path:
    """Write a report as JSON, complete or not at all."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomically(Path(path), (text + "\n").encode())
