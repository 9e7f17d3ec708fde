"""Everything that is checked of one row: capture, regions, pruning, the module's outputs, ONNX, parity."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import mfcompile
from benchmarks.zoo.build import build
from benchmarks.zoo.row import STAGES, Row
from mfcompile.compile import assemble
from mfcompile.errors import MfcompileError
from mfcompile.inputs import output_tensors

SPARSITY = 0.5

T = TypeVar("T")


class CheckError(Exception):
    """A stage ran, and its result is wrong."""


def check(row: Row, until: str = STAGES[-1], passed: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Run every stage of a row; the first that fails ends it.

    Args:
        row: of the table.
        until: the last stage to run.
        passed: called with a copy of the record after every stage that passes.

    Returns:
        A JSON record: "key", "kind", "family"; "failed" (a stage, or None), "reason", "limit" (whose limit the failure is);
        and what the stages that ran gave.
    """
    record: dict[str, Any] = {"key": row.key, "kind": row.kind, "family": None, "failed": None, "reason": None, "limit": None}
    record["passed"] = []
    started = time.perf_counter()
    try:
        for stage, found in _stages(row):
            record["passed"].append(stage)
            record.update(found)
            if passed is not None:
                passed({**record, "passed": list(record["passed"])})
            if stage == until:
                break
    except Exception as error:  # transformers' code raises anything; every kind is a row of the table
        record["failed"] = STAGES[len(record["passed"])]
        record["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"
        record["limit"] = _whose(record["failed"], error)
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record


def _stages(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """(stage, what it found) for each stage that passes."""

    def done(stage: str, **found: Any) -> tuple[str, dict[str, Any]]:
        return stage, found

    module, inputs = build(row)
    yield done("build", family=_family(module), parameters=sum(item.numel() for item in module.parameters()))
    with torch.no_grad():
        module(**inputs)
    yield done("run")
    before = {name: item.detach().clone() for name, item in module.named_parameters(remove_duplicate=False)}
    captured, seconds = _timed(lambda: mfcompile.capture(module, inputs))
    yield done("capture", capture_seconds=seconds, nodes=len(captured.graph.nodes))
    regions, seconds = _timed(lambda: mfcompile.infer_regions(captured, modalities=dict(row.modalities) or None))
    yield done(
        "regions",
        region_seconds=seconds,
        regions={
            name: {"sites": len(sites), "weights": sum(site.weight_count for site in sites)}
            for name, sites in regions.by_region().items()
        },
        modalities={item.name: item.modality for item in regions.modalities},
        dense=[f"{site.name}: {site.skipped}" for site in regions.skipped_sites],
    )
    statistics = mfcompile.calibrate(captured, regions=regions)
    masks = mfcompile.select_masks(captured, regions, statistics, sparsity=SPARSITY)
    compiled = assemble(captured, regions, statistics, masks)
    _check_sparsity(masks)
    yield done("prune", sparsity=_achieved(masks))
    _check_masks(module, before, compiled.strip(), masks)
    yield done("masks")
    _check_module(module, compiled.module, masks, inputs)
    yield done("module")
    with tempfile.TemporaryDirectory() as folder:
        artifact, seconds = _timed(lambda: compiled.export_onnx(Path(folder) / "model.onnx"))
        yield done(
            "onnx", onnx_seconds=seconds, route=artifact.route, notes=list(artifact.notes), size_bytes=artifact.size_bytes
        )
        report = compiled.verify(artifact)
        if not report.passed:
            wrong = [f"{item.name} is off by {item.max_abs_diff:.1e}" for item in report.outputs if not item.within]
            raise CheckError(f"{'; '.join(wrong)}. {' '.join(report.notes)}")
        yield done("parity", difference=report.max_abs_diff, batch_sizes=list(report.batch_sizes))


def _family(module: nn.Module) -> str:
    config: Any = module.config
    return str(config.model_type)


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return action(), round(time.perf_counter() - started, 2)


def _achieved(masks: Mapping[str, Tensor]) -> float:
    kept = sum(int(masks[fqn].sum()) for fqn in masks)
    total = sum(masks[fqn].numel() for fqn in masks)
    return round(1 - kept / total, 4)


def _check_sparsity(masks: Mapping[str, Tensor]) -> None:
    """The masks remove the share that was asked for, to one weight of each group.

    Raises:
        CheckError: says what they remove.
    """
    total = sum(masks[fqn].numel() for fqn in masks)
    removed = total - sum(int(masks[fqn].sum()) for fqn in masks)
    if not total or abs(removed - SPARSITY * total) > len(masks):
        raise CheckError(f"{removed} of {total} weights are removed, not the share {SPARSITY} that was asked for")


def _check_masks(dense: nn.Module, before: Mapping[str, Tensor], stripped: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Every weight is the dense one where its mask keeps it, and zero elsewhere; other parameters are untouched.

    Args:
        dense: the row's model; it tells which names are one weight.
        before: values of its parameters before the capture; what is left unpruned is shared with the stripped model.
        stripped: what is looked at.
        masks: FQN -> mask.

    Raises:
        CheckError: names the parameter.
    """
    own = dict(dense.named_parameters(remove_duplicate=False))
    masked = {id(own[fqn]): masks[fqn] for fqn in masks}  # by the tensor: a tied weight has more names than its mask
    found = dict(stripped.named_parameters(remove_duplicate=False))
    if found.keys() != own.keys():
        raise CheckError(f"parameters came or went: {', '.join(sorted(found.keys() ^ own.keys()))}")
    for name, parameter in found.items():
        mask = masked.get(id(own[name]))
        if not _same(parameter, before[name] if mask is None else before[name] * mask):
            raise CheckError(f"{name} is not its dense value" + ("" if mask is None else " times its mask"))


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit; NaN equals NaN, for weights that a model leaves as they lie in memory."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _check_module(dense: nn.Module, pruned: nn.Module, masks: Mapping[str, Tensor], inputs: dict[str, Any]) -> None:
    """The pruned module computes what a copy of the dense one with zeroed weights computes, and it computes something.

    Raises:
        CheckError: names the output.
    """
    zeroed = copy.deepcopy(dense)
    parameters = dict(zeroed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for fqn in masks:
            parameters[fqn].mul_(masks[fqn])
        torch.manual_seed(0)
        expected = output_tensors(zeroed(**inputs))
        torch.manual_seed(0)
        found = output_tensors(pruned(**inputs))
    if found.keys() != expected.keys():
        raise CheckError(f"outputs came or went: {', '.join(sorted(found.keys() ^ expected.keys()))}")
    if not any(tensor.isfinite().any() for tensor in expected.values()):
        raise CheckError("no output holds a number: the row's inputs or configuration make the model give NaN")
    for name, tensor in expected.items():
        if not _equal(tensor, found[name]):
            raise CheckError(f"{name} of the pruned module is not that of the model with zeroed weights")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _whose(stage: str, error: Exception) -> str:
    """Whose limit a failure is."""
    if stage in {"build", "run"}:
        return "transformers"
    if isinstance(error, CheckError):
        return "onnxruntime" if stage == "parity" else "mfcompile"
    if stage == "onnx" and isinstance(error, MfcompileError):
        return "torch.onnx" if "operator" in str(error) else "torch.export"
    return "mfcompile"
