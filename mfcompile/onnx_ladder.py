"""Programs of a model, one after the other, until one gives an ONNX file that computes what the model computes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfcompile import runtime
from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import CaptureError, ExportError, InputError, ParityError
from mfcompile.frontends.capture import capture
from mfcompile.frontends.exporting import candidates
from mfcompile.graph import CaptureAttempt, CapturedGraph, ExportedModel
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.masking import mask_module
from mfcompile.split import SplitRequest

HALF = (torch.bfloat16, torch.float16)

FLOAT32 = (
    "computed in float32: the model's half precision was cast (exactly), because onnxruntime on CPU lacks kernels for it; "
    "compare the file with model.float()"
)
FLOAT32_KEY, FLOAT32_VALUE = "mfcompile.computes", "float32"

_SEED = 1
"""Of the inputs that files are compared on; ``verify`` draws others."""

LEAST_CASES = 2
"""Different inputs that every file is compared on before it is kept."""


def export_accepted(
    pruned: CapturedGraph,
    path: Path | str,
    *,
    format: str = "packed",
    values: str = "fp32",
    split: SplitRequest | None = None,
    inline: bool = False,
    load_budget: float | None = None,
    external_data: bool | None = None,
    first: str = "",
) -> tuple[ExportedArtifact, CapturedGraph]:
    """Write an ONNX file from the first program of the model that onnxruntime agrees with.

    Programs are made when they are needed: where the first one holds, no other is tried. Each file is compared with
    the masked module on two inputs before it gets its name.

    Args:
        pruned: what ``apply_masks`` gave, or a dense CapturedGraph.
        path: the .onnx file to write.
        format: see ``mfcompile.export_onnx``.
        values: see ``mfcompile.export_onnx``.
        split: how to divide the model into files; None writes one.
        inline, load_budget, external_data: see ``mfcompile.export_onnx``.
        first: route to start with, where another file of the same model came about by it.

    Returns:
        (the artefact, the captured graph with the program that it was made from and everything that was tried).

    Raises:
        InputError: an argument is not usable.
        ExportError: no program gives a file that holds; says what was tried and why each was refused.
    """
    options: dict[str, Any] = {"format": format, "values": values, "split": split, "inline": inline}
    options |= {"load_budget": load_budget, "external_data": external_data}
    if _has_dtype(pruned.module, torch.bfloat16):
        return _export(in_float32(pruned), path, options, first, is_cast=True)
    try:
        return _export(pruned, path, options, first)
    except ExportError:
        if not _has_dtype(pruned.module, torch.float16):
            raise
        return _export(in_float32(pruned), path, options, first, is_cast=True)


def in_float32(captured: CapturedGraph) -> CapturedGraph:
    """The same model computed in float32, with the same masks; the user's module is left as it is.

    Args:
        captured: of a model with parameters in half precision.

    Raises:
        ExportError: the model does not run in float32.
    """
    try:
        wide = capture(float32_module(captured.module), float32_inputs(captured.example_inputs))
    except CaptureError as error:
        raise ExportError(
            f"{type(captured.module).__name__} has half-precision weights, for which onnxruntime on CPU lacks kernels, and it "
            f"does not run with them in float32: {error}. Where forward names a dtype (x.to(torch.bfloat16)), let it take that "
            f"of a parameter. The pruned PyTorch module works all the same: do without ONNX (--no-onnx, or save(onnx=False))"
        ) from error
    return replace(wide, masks=captured.masks)


def float32_module(module: nn.Module) -> nn.Module:
    """A copy of a module with its half-precision parameters and buffers in float32."""
    wide = copy.deepcopy(module)
    for item in wide.modules():
        for name, tensor in (*item.named_parameters(recurse=False), *item.named_buffers(recurse=False)):
            if tensor.dtype in HALF:
                cast = tensor.detach().float()
                if name in item._parameters:
                    item._parameters[name] = nn.Parameter(cast, tensor.requires_grad)
                else:
                    item._buffers[name] = cast
    return wide


def float32_inputs(inputs: ExampleInputs) -> ExampleInputs:
    """The same inputs with half precision in float32."""
    return inputs.map_tensors(lambda _, tensor: tensor.float() if tensor.dtype in HALF else tensor)


def find_library() -> tuple[str | None, str | None]:
    """Path of the library of ``mfcompile.runtime``, or None and why there is none; it is built on first use."""
    missing = runtime.why_unavailable()
    return (runtime.library_path() if missing is None else None), missing


def _has_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    return any(parameter.dtype == dtype for parameter in module.parameters())


def _export(
    pruned: CapturedGraph, path: Path | str, options: Mapping[str, Any], first: str, *, is_cast: bool = False
) -> tuple[ExportedArtifact, CapturedGraph]:
    from mfcompile.exporters.conversion import RefusedProgramError
    from mfcompile.exporters.onnx_model import export_onnx

    module = pruned.module if pruned.masks is None else mask_module(pruned.module, pruned.masks)
    stored = "fp16" if _has_dtype(module, torch.float16) else options["values"]

    def accept(file: Path) -> None:
        problem = _disagreement(file, module, pruned.example_inputs, stored)
        if problem:
            raise RefusedProgramError(problem)

    tried = list(pruned.attempts)
    for attempt, exported in _programs(pruned, first):
        tried += [] if attempt is None else [attempt]
        if exported is None:
            continue
        started = time.perf_counter()
        ready = replace(pruned, exported=_say_cast(exported) if is_cast else exported, attempts=tuple(tried))
        try:
            return export_onnx(ready, path, accept=accept, **options), ready
        except RefusedProgramError as error:
            tried.append(CaptureAttempt(f"ONNX of {exported.route}", False, error.reason, time.perf_counter() - started))
    raise ExportError(_refusal(pruned, tried))


def _programs(captured: CapturedGraph, first: str) -> Iterator[tuple[CaptureAttempt | None, ExportedModel | None]]:
    """The program that the graph has already, then what is left of the ladder, each made when it is asked for."""
    if captured.exported is not None and first in ("", captured.exported.route):
        yield None, captured.exported
        first = ""
    last = captured.attempts[-1].frontend if captured.attempts else ""
    yield from candidates(captured, after=last if captured.exported is None else captured.exported.route, first=first)


def _disagreement(file: Path, module: nn.Module, example: ExampleInputs, values: str) -> str:
    """Why the file is not what the module computes; empty when it is, on every case."""
    from mfcompile.exporters import parity

    rtol, atol = parity.default_tolerance(values)
    try:
        cases = parity.runnable_cases(file, module, example, seed=_SEED, least=LEAST_CASES)
        of_range = parity.is_of_range(values)
        report = parity.verify(file, module, cases, rtol=rtol, atol=atol, of_range=of_range, library=find_library()[0])
        parity.raise_on_failure(report)
    except InputError as error:  # onnxruntime does not load it, or it needs another input
        return str(error)
    except ParityError as error:
        return " ".join(line.strip() for line in str(error).splitlines()[:-1][:4])
    return ""


def _say_cast(exported: ExportedModel) -> ExportedModel:
    return replace(exported, notes=(FLOAT32, *exported.notes), metadata={**exported.metadata, FLOAT32_KEY: FLOAT32_VALUE})


def _refusal(captured: CapturedGraph, tried: Sequence[CaptureAttempt]) -> str:
    """Every way and why it was refused, ways with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for item in tried:
        if not item.succeeded:
            reasons.setdefault(item.detail, []).append(item.frontend)
    listed = "; ".join(f"{' and '.join(ways)}: {detail}" for detail, ways in reasons.items())
    return (
        f"{type(captured.module).__name__} could not be written as an ONNX file that computes what the model computes. Tried "
        f"{listed}. Replace the operator or the line that is named in the model's forward, or export a part of the model. The "
        f"pruned PyTorch module works all the same: do without ONNX (--no-onnx, or save(onnx=False))"
    )
