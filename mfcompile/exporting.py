"""export_onnx and verify: an ONNX file of a captured graph, and whether it computes what the graph computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mfcompile.artifact import ExportedArtifact, ParityReport
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.onnx_entry import export_file, is_onnx
from mfcompile.onnx_ladder import (
    FLOAT32_KEY,
    FLOAT32_VALUE,
    export_accepted,
    find_library,
    float32_inputs,
    float32_module,
)
from mfcompile.parameter_checks import require_values
from mfcompile.passes.masking import mask_module
from mfcompile.region import RegionMap
from mfcompile.split import split_request
from mfcompile.steps import infer_regions


def export_onnx(
    pruned: CapturedGraph,
    path: Path | str,
    *,
    format: str = "packed",
    values: str = "fp32",
    split: str | None = None,
    regions: RegionMap | None = None,
    inline: bool = False,
    load_budget: float | None = None,
    external_data: bool | None = None,
) -> ExportedArtifact:
    """Write a (masked) captured graph as an ONNX file that stock onnxruntime loads.

    The file is compared with the masked module in onnxruntime before it gets its name; a program that does not hold
    gives way to the next way of exporting. Models in bfloat16 are computed in float32.

    Args:
        pruned: what ``apply_masks`` gave (or a dense CapturedGraph).
        path: the .onnx file to write. With ``split``, the directory.
        format: "packed" stores only what is left of pruned weights, "dense" stores zeros as well. Linear layers of a packed
            file run on the kernels of ``mfcompile.runtime`` where its library is registered (``ExportedArtifact.encodings``
            says which); any onnxruntime computes them without.
        values: "fp32"; "fp16" for the stored values of pruned weights; "int8" computes all linear layers in int8, with
            activations quantized as they come, and is held to PyTorch within 10 % of each output's range.
        split: "regions" writes one file per modality and one for their fusion, with a manifest (see ``load_parts``);
            None writes one file.
        regions: what ``infer_regions`` gave, for ``split``; None infers them with defaults.
        inline: a packed file of plain nodes only, for runtimes that refuse model-local functions (OpenVINO); the kernels of
            ``mfcompile.runtime`` have nothing to do in it.
        load_budget: memory that stock onnxruntime may take to create a session of a packed file, in multiples of the bytes of
            the dense tensors; for less than the default (8), weights are stored in ways that are decoded with less memory and
            take more bytes. ``mfcompile.load_session`` needs none of it.
        external_data: weights in ``<path>.data`` beside the file, or in the file itself; None puts them beside it where sparse
            layers store more than 64 MB, because memory that is mapped from there is given back once the kernels have packed
            it, and wherever one file could not hold them. An .onnx file that was pruned keeps the layout that it has.

    Raises:
        InputError: format, values or split is unknown.
        ExportError: no way of exporting gives a file that computes what the model computes; names every way that was
            tried, with the operator or the line of the model that stopped it.
    """
    require_values(pruned.module)
    request = split_request(split, infer_regions(pruned) if regions is None and split is not None else regions)
    if is_onnx(pruned.module):
        if request is not None:
            raise InputError("an .onnx file is pruned as it is, in one file; split is for PyTorch models. Export without it")
        if values == "int8":
            raise InputError(
                "values='int8' is for models that are captured from PyTorch. Write this file with fp32 values and format "
                "'dense', and quantize it by onnxruntime.quantization.quantize_dynamic, which keeps zeros"
            )
        if external_data is not None:
            raise InputError("an .onnx file keeps its weights where it has them. Export without external_data")
        return export_file(pruned, path, format=format, values=values, inline=inline, load_budget=load_budget)
    options: dict[str, Any] = {"split": request, "inline": inline, "load_budget": load_budget, "external_data": external_data}
    return export_accepted(pruned, path, format=format, values=values, **options)[0]


def verify(
    artifact: ExportedArtifact | Path | str,
    pruned: CapturedGraph,
    example_inputs: Any | None = None,
    *,
    values: str | None = None,
    seed: int = 0,
) -> ParityReport:
    """Compare an ONNX file in onnxruntime with the masked PyTorch module, on held-out inputs at two batch sizes.

    A file with sparse layers is compared twice: in stock onnxruntime and, where ``mfcompile.runtime`` is available, with its
    library registered.

    Args:
        artifact: what ``export_onnx`` gave, or the path of an .onnx file or of a split model.
        pruned: the masked graph that the file was made from.
        example_inputs: inputs to draw the comparison from; None uses those of the capture.
        values: "fp32", "fp16" or "int8", how the file stores values; None takes it from the artefact.
        seed: seed of the held-out inputs.

    Returns:
        The report; ``passed`` says whether every output is within the tolerance, in both.

    Raises:
        InputError: the file or the graph is something else.
    """
    from mfcompile.exporters import parity
    from mfcompile.inputs import normalize_inputs

    if not isinstance(artifact, (ExportedArtifact, Path, str)) or not isinstance(pruned, CapturedGraph):
        given = f"{type(artifact).__name__} and {type(pruned).__name__}"
        raise InputError(f"verify(artifact, pruned) compares a file with the graph that it is of, in that order; got {given}")
    stored = values or (artifact.values if isinstance(artifact, ExportedArtifact) else "fp32")
    is_cast = parity.read_metadata(artifact).get(FLOAT32_KEY) == FLOAT32_VALUE
    if not is_cast and any(parameter.dtype == torch.float16 for parameter in pruned.module.parameters()):
        stored = "fp16"  # both sides compute in half precision, whatever the file stores
    inputs = pruned.example_inputs if example_inputs is None else normalize_inputs(pruned.module, example_inputs)
    module = pruned.module if pruned.masks is None else mask_module(pruned.module, pruned.masks)
    if is_cast:
        module, inputs = float32_module(module), float32_inputs(inputs)
    rtol, atol = parity.default_tolerance(stored)
    cases = parity.runnable_cases(artifact, module, inputs, seed=seed)
    library, missing = find_library()
    of_range = parity.is_of_range(stored)
    return parity.verify(artifact, module, cases, rtol=rtol, atol=atol, of_range=of_range, library=library, missing=missing)
