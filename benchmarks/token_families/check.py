"""What token pruning promises, tried on one model; the record says which promise held, and how closely."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mfcompile
from benchmarks.token_families import models, reference
from mfcompile.errors import MfcompileError
from mfcompile.frontends.program_module import program_module
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import output_tensors
from mfcompile.passes.token_pruning import KEPT_KEY, token_requests

KEEP = 0.6
CLOSE = 1e-4
"""Largest difference, in multiples of the largest value (at least one), that counts as equal."""

Sites = Sequence[Any]


def check(key: str, steps: list[str] | None = None) -> dict[str, Any]:
    """Try one model.

    Args:
        key: of ``models.keys()``.
        steps: the names of what was passed are appended here.

    Returns:
        A JSON record: "key", "sites" (modality -> count), "refused" (reason -> count), "failed" (a step, or None), "reason",
        and the results of the steps: "identical" (to the exported program, which may differ from eager code in last bits),
        "finite", "samples", "padding", "reference", "merge", "parity".
    """
    steps = [] if steps is None else steps
    record: dict[str, Any] = {"key": key, "sites": {}, "refused": {}, "failed": None, "reason": None}
    started = time.perf_counter()
    try:
        _steps(key, record, steps)
    except Exception as error:  # the libraries raise anything; every kind is a row
        record["failed"] = STEPS[len(steps)] if len(steps) < len(STEPS) else STEPS[-1]
        record["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        record["is_refusal"] = isinstance(error, MfcompileError)
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record


STEPS = ("run", "sites", "identical", "fewer", "reference", "merge", "onnx")


def _steps(key: str, record: dict[str, Any], steps: list[str]) -> None:
    module, inputs, modalities = models.make(key)
    dense = _run(module, inputs)
    captured = mfcompile.capture(module, inputs)
    steps.append("run")
    captured = mfcompile.with_token_program(captured, modalities=modalities)
    found = mfcompile.find_token_sites(captured, modalities=modalities)
    record["sites"] = _counted(site.modality or site.region for site in found.sites)
    record["refused"] = _counted(item.reason for item in found.refused)
    steps.append("sites")
    if not found.sites:
        return
    options: dict[str, Any] = {"modalities": modalities}
    whole = mfcompile.prune_tokens(captured, {site.name: site.tokens for site in found.sites}, **options)
    assert captured.exported is not None  # ``with_token_program`` made it
    record["identical"] = _identical(_run(program_module(captured.exported.program), inputs), _run(whole.module, inputs))
    steps.append("identical")
    keep, fewer = _all_sites(captured, found.sites, options)
    record["cut"] = len(keep)
    results = _run(fewer.module, inputs)
    record["finite"] = all(bool(value.isfinite().all()) for name, value in results.items() if dense[name].isfinite().all())
    record["samples"] = _samples(fewer.module, inputs, results)
    record["padding"] = _padding(module, fewer.module, inputs)
    steps.append("fewer")
    record["reference"] = [_reference(captured, module, inputs, site, options) for site in _chosen(found.sites)]
    steps.append("reference")
    record["merge"] = _merged(captured, keep, inputs, options)
    steps.append("merge")
    with tempfile.TemporaryDirectory() as folder:
        artifact = mfcompile.export_onnx(fewer, Path(folder) / "fewer.onnx")
        report = mfcompile.verify(artifact, fewer)
    record["parity"] = {"passed": report.passed, "difference": report.max_abs_diff}
    steps.append("onnx")


def _run(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        torch.manual_seed(0)
        return output_tensors(module(**inputs))


def _counted(items: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in items:
        found[item] = found.get(item, 0) + 1
    return found


def _identical(dense: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> bool:
    same = [torch.equal(value.nan_to_num(), whole[name].nan_to_num()) for name, value in dense.items() if name in whole]
    return bool(same) and all(same) and set(whole) <= set(dense)


def _all_sites(captured: CapturedGraph, sites: Sites, options: Mapping[str, Any]) -> tuple[dict[str, float], CapturedGraph]:
    """Every site cut, or the first of each modality where protected tokens between others allow one only."""
    keep = {site.name: KEEP for site in sites}
    try:
        return keep, mfcompile.prune_tokens(captured, keep, **options)
    except mfcompile.InputError:
        first = {site.modality: site.name for site in reversed(sites)}
        keep = dict.fromkeys(first.values(), KEEP)
        return keep, mfcompile.prune_tokens(captured, keep, **options)


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    one, other = one.double(), other.double()
    finite = one.isfinite()
    if not bool((finite == other.isfinite()).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((one - other)[finite].abs().max() / one[finite].abs().max().clamp(min=1.0))


def _samples(module: nn.Module, inputs: Mapping[str, Any], together: Mapping[str, Tensor]) -> float | None:
    """The first sample beside itself against the first beside another; None where samples share an axis with more."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    sizes = {value.shape[0] for value in tensors.values() if value.ndim}
    if sizes != {2} or any(value.ndim == 0 or value.shape[:1] != (2,) for value in together.values()):
        return None
    twice = {name: value[[0, 0]] if name in tensors else value for name, value in inputs.items()}
    try:
        alone = _run(module, twice)
    except Exception:  # grids and placeholders of the two samples are tied to each other
        return None
    same = {name: value for name, value in together.items() if value.shape != (2, 2)}  # similarities of samples
    return max((_difference(value[0], alone[name][0]) for name, value in same.items()), default=0.0)


def _padding(dense: nn.Module, fewer: nn.Module, inputs: Mapping[str, Any]) -> bool | None:
    """Other words at padded places change nothing that they did not change with all tokens; None without padding."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or ids.shape != mask.shape or bool(mask.bool().all()):
        return None
    other = {**inputs, "input_ids": torch.where(mask.bool(), ids, (ids - 40 + 7) % 50 + 40)}
    before, after = (_run(dense, given) for given in (inputs, other))
    fewer_before, fewer_after = (_run(fewer, given) for given in (inputs, other))
    for name, value in before.items():
        if not value.is_floating_point() or fewer_before[name].shape != value.shape:
            continue
        untouched = (value - after[name]).abs() <= 1e-6
        if bool(((fewer_before[name] - fewer_after[name]).abs()[untouched] > 1e-5).any()):
            return False
    return True


def _chosen(sites: Sites) -> list[Any]:
    """The first site of each modality, the most image-like two."""
    first: dict[tuple[str, str], Any] = {}
    for site in sites:
        first.setdefault((site.region, site.modality), site)
    return sorted(first.values(), key=lambda site: site.modality == "text")[:2]


def _reference(
    captured: CapturedGraph, module: nn.Module, inputs: Mapping[str, Any], site: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """One cut against the eager model that does not look at what was dropped."""
    fewer = mfcompile.prune_tokens(captured, {site.name: KEEP}, outputs="shorter", **options)
    assert fewer.exported is not None  # cut in it
    told, record = token_requests(fewer.exported.metadata)[-1]["cuts"][0], {"site": site.name, "difference": None, "why": None}
    listed = json.loads(fewer.exported.metadata.get(KEPT_KEY, "{}"))
    results = _run(fewer.module, inputs)
    whole = [name for name in listed if results[name].shape[1] == told["kept"]]
    if not whole:
        return {**record, "why": "no output lists all of its tokens"}
    kept = results[whole[0]]
    output, scores = reference.run(module, inputs, site.name, kept, site.tokens)
    if scores is None:
        return {**record, "why": "attention is written out, or called more than once"}
    wanted = output_tensors(output)
    is_read = told["restored"] or any("reduces over" in item.reason for item in fewer.diagnostics)
    names = [name for name in results if name not in listed and not (is_read and name not in listed.values())]
    differences = {}
    for name in names:
        rows = next((results[positions] for positions, of in listed.items() if of == name), None)
        value = wanted[name] if rows is None else _rows(wanted[name], rows)
        differences[name] = _difference(value, results[name])
    return {
        **record,
        "difference": max(differences.values(), default=None),
        "compared": len(names),
        **_ranks(scores, kept, told),
    }


def _rows(value: Tensor, kept: Tensor) -> Tensor:
    return torch.stack([value[sample][kept[sample]] for sample in range(len(kept))])


def _ranks(scores: Tensor, kept: Tensor, told: Mapping[str, Any]) -> dict[str, Any]:
    """Whether no more than the protected ones were kept with a lower score than a dropped token has."""
    if kept.shape[1] == scores.shape[1] or kept.shape[0] != scores.shape[0]:
        return {"ranked": None}
    lower = []
    for row, places in zip(scores, kept, strict=True):
        dropped = torch.ones_like(row, dtype=torch.bool).scatter(0, places, False)
        lower.append(int((row[places] < row[dropped].max() - 1e-5).sum()))
    return {"ranked": max(lower) <= told["protected"]}


def _merged(captured: CapturedGraph, keep: Mapping[str, float], inputs: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """The rest merged into one token, at every site that was cut."""
    try:
        merged = mfcompile.prune_tokens(captured, keep, rest="merge", **options)
        results = _run(merged.module, inputs)
    except mfcompile.InputError as error:
        return {"runs": False, "reason": str(error)[:300]}
    return {"runs": True, "finite": all(bool(value.isfinite().all()) for value in results.values())}
