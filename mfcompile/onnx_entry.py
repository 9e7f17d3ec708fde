"""The way in for ONNX files: what ``capture``, ``compile_pruned`` and ``export_onnx`` do with one instead of a module."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.criteria.base import Need, Pruner

if TYPE_CHECKING:
    from torch import nn

    from mfcompile.artifact import ExportedArtifact
    from mfcompile.region import RegionMap


def opened(model: nn.Module | Path | str) -> nn.Module:
    """A module as it is; the path of an .onnx file as a module that runs it.

    Raises:
        InputError: the path names something else, or a file that cannot be used.
    """
    if not isinstance(model, (str, Path)):
        return model
    if Path(model).suffix != ".onnx":
        raise InputError(f"{model} is no .onnx file: give an nn.Module, or the path of an .onnx file")
    from mfcompile.onnx_file import OnnxFile

    return OnnxFile(model)


def is_onnx(model: nn.Module) -> bool:
    """The module runs an ONNX file; told without loading onnxruntime."""
    return any(item.__module__ == "mfcompile.onnx_file" for item in type(model).__mro__)


def refuse_untrainable(model: nn.Module, chosen: Pruner, update: str | None) -> None:
    """Refuse an ONNX file that would have to be trained, or run layer by layer.

    Raises:
        InputError: the model runs an ONNX file, and the criterion needs gradients or an update is asked for.
    """
    needs_gradients = Need.GRADIENTS in chosen.needs
    if is_onnx(model) and (needs_gradients or update is not None):
        what = f"the criterion {chosen.name!r} needs gradients" if needs_gradients else f"update={update!r} runs layers anew"
        raise InputError(f"{what}, and an .onnx file cannot be trained: prune the PyTorch model, or take another criterion")


def capture_file(file: nn.Module, example_inputs: Any = None) -> CapturedGraph:
    """Capture an ONNX file, and find its layers in the graph where the file does not name them."""
    from mfcompile.frontends.onnx_capture import capture_onnx
    from mfcompile.onnx_file import OnnxFile
    from mfcompile.passes.layers import with_layers

    assert isinstance(file, OnnxFile)  # see is_onnx
    return with_layers(capture_onnx(file, example_inputs))


def with_weaker_rules(captured: CapturedGraph, regions: RegionMap) -> RegionMap:
    """The regions, with diagnostics for what an ONNX file did not tell and was decided by a weaker rule."""
    found = [
        Diagnostic(subject, text) for subject, text in zip(("example inputs", "layers"), _weaker(captured), strict=True) if text
    ]
    return replace(regions, diagnostics=(*found, *regions.diagnostics)) if found else regions


def _weaker(captured: CapturedGraph) -> tuple[str, str]:
    if captured.frontend != "onnx":
        return "", ""
    from mfcompile.onnx_file import RANDOM_INPUTS
    from mfcompile.passes.layers import LAYERS_FOUND, NO_LAYERS

    def said(prefix: str) -> str:
        return next((text for text in captured.specialised if text.startswith(prefix)), "")

    return said(RANDOM_INPUTS), said(LAYERS_FOUND) or said(NO_LAYERS)


def first_batch(calibration: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """The first calibration batch, to be the example, and the batches with it still in front.

    Raises:
        CalibrationError: there is none.
    """
    if calibration is None:
        return None, None
    batches = iter(calibration)
    try:
        first = next(batches)
    except StopIteration:
        raise CalibrationError("the calibration set is empty: give at least one batch") from None
    return first, calibration if batches is not calibration else itertools.chain([first], batches)


def export_file(
    pruned: CapturedGraph, path: Path | str, *, format: str, values: str, inline: bool = False, load_budget: float | None = None
) -> ExportedArtifact:
    """Write a captured ONNX file with its masks; see ``exporters.onnx_rewriting``."""
    from mfcompile.exporters.onnx_rewriting import rewrite_onnx

    return rewrite_onnx(pruned, path, format=format, values=values, inline=inline, load_budget=load_budget)
