"""Writing a captured model and its masks as an ONNX file that stock onnxruntime loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from mfcompile._version import __version__
from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters import sparse_initializers
from mfcompile.exporters.conversion import RefusedProgramError, convert_program
from mfcompile.exporters.int8_placement import describe_int8, place_int8
from mfcompile.exporters.load_cost import predict_load, refuse_unloadable
from mfcompile.exporters.messages import first_line
from mfcompile.exporters.onnx_files import FileLayout, needs_external_data, plan_files, publish_files, saves_memory
from mfcompile.exporters.onnx_names import Interface, describe_interface, name_interface
from mfcompile.exporters.packing import VALUES
from mfcompile.exporters.program import tensor_aliases, tensor_input_nodes
from mfcompile.exporters.split_build import ModelPart, complete_request, dimension_sizes, split_model
from mfcompile.exporters.split_files import check_directory, write_split
from mfcompile.exporters.stored_weights import WEIGHTS_KEY, StoredWeight, describe_weights
from mfcompile.exporters.weight_placement import MaskedWeight, PlacementOptions, checked_budget, place_weights
from mfcompile.graph import CapturedGraph, ExportedModel
from mfcompile.masks import MaskSet
from mfcompile.split import SplitRequest

FORMATS = ("packed", "dense", "onnx-sparse")
INT8 = "int8"


@dataclass(frozen=True)
class Storage:
    """How a model is written.

    Attributes:
        options: format and precision of the masked weights.
        external_data: tensors in a file of their own; None: where they must be, and where that saves memory.
        masks: the masks in force.
        metadata: what the program says of itself.
    """

    options: PlacementOptions
    external_data: bool | None
    masks: MaskSet | None
    metadata: Mapping[str, str]

    def describe(self, model: ir.Model, stored: Mapping[str, StoredWeight]) -> None:
        """Write it into the model."""
        _describe(model, self.options.format, self.options.values, self.masks)
        model.metadata_props.update(self.metadata)
        if stored:
            model.metadata_props[WEIGHTS_KEY] = describe_weights(stored)


def export_onnx(
    captured: CapturedGraph,
    path: Path | str,
    *,
    format: str = "packed",
    values: str = "fp32",
    external_data: bool | None = None,
    accept: Callable[[Path], None] | None = None,
    split: SplitRequest | None = None,
    inline: bool = False,
    load_budget: float | None = None,
) -> ExportedArtifact:
    """Write the masked model as ONNX, complete or not at all.

    Weights without a mask are written byte for byte. Masked weights hold +0.0 at pruned places ("dense"), or are
    stored without them ("packed"). Linear layers of packed weights are SparseLinear nodes, which compute without decoding
    where the library of ``mfcompile.runtime`` is registered; elsewhere, and for all other packed weights, standard operators
    decode, which onnxruntime folds when it creates the session. Beside the model one weight at a time is in memory, and
    then onnx.checker reads the .onnx file (twice its size; external tensors are not read). A
    "packed" file must not be passed through an optimizer: that would write the decoded weights back.

    Args:
        captured: with ``exported``; ``masks`` of None is a model that is not pruned.
        path: the .onnx file, or the directory of a split model; an existing model is replaced.
        format: "packed", "dense", or "onnx-sparse" (see ``sparse_initializers``).
        values: "fp32" keeps the precision of the parameters; "fp16" stores masked weights as float16 and computes in
            the parameters' own dtype; "int8" computes every linear layer in int8, with activations quantized as they come.
        external_data: write tensors to ``<path>.data``; None: when they exceed 1.5 GB, or those of sparse layers 64 MB.
        accept: called with the path of the written file before it gets its name; what it raises, nothing is kept of.
        split: write one file per modality and one for their fusion, with a manifest; None writes one file.
        inline: plain nodes only, for runtimes that refuse model-local functions (OpenVINO).
        load_budget: memory that stock onnxruntime may take to create a session, in multiples of the bytes of the dense
            tensors; for less, weights are stored in ways that are decoded with less memory and take more bytes. None sets
            no bound that a weight would feel (``weight_placement.LOAD_BUDGET``).

    Raises:
        RefusedProgramError: the program cannot be converted or gives a file that does not pass onnx.checker; another program
            of the model may (an ExportError).
        InputError: an argument is not usable, or a mask does not fit its parameter.
        ExportError: the model has no exported program, a value does not fit fp16, or this machine could not load the file.
    """
    path = Path(path)
    if split is not None:
        check_directory(path)
    elif path.is_dir():
        raise InputError(f"{path} is a directory; give the name of the .onnx file to write")
    exported = _check(captured, format, values)
    model = convert_program(exported)
    interface = _name(model, exported)
    weights, unread = _find_weights(model, exported, captured)
    sizes = dimension_sizes(model, captured.example_inputs.tensors())
    options = PlacementOptions(format, values, inline, sizes=sizes, load_budget=checked_budget(load_budget))
    storage = Storage(options, external_data, captured.masks, exported.metadata)
    notes = (*exported.notes, *interface.notes, *_describe_unread(unread))
    if split is None:
        artifact = _write_model(model, weights, path, storage, accept)
        return replace(artifact, notes=(*notes, *artifact.notes), route=exported.route)
    names = _all_names(split.regions, exported, captured)
    request = complete_request(split, model, names, exported.example_inputs.tensors())
    artifact = _write_parts(model, weights, path, storage, request, accept)
    return replace(artifact, notes=(*notes, *artifact.notes), route=exported.route)


def _all_names(fqns: Iterable[str], exported: ExportedModel, captured: CapturedGraph) -> dict[str, tuple[str, ...]]:
    """Parameter -> every name that it may have in the program; its own comes last."""
    aliases = tensor_aliases(exported.program)
    return {fqn: (*aliases.get(fqn, ()), *captured.aliases.get(fqn, ()), fqn) for fqn in fqns}


def _write_parts(
    model: ir.Model,
    weights: list[MaskedWeight],
    path: Path,
    storage: Storage,
    split: SplitRequest,
    accept: Callable[[Path], None] | None,
) -> ExportedArtifact:
    """Write a model in parts, each with the masked weights that it reads."""
    dense_size = _dense_size(model, path, storage)
    dynamic_axes = describe_interface(model).dynamic_axes
    divided = split_model(model, split)

    def write_part(part: ModelPart, file: Path) -> ExportedArtifact:
        stored = part.model.graph.initializers
        own = [replace(weight, initializer=stored[weight.fqn]) for weight in weights if weight.fqn in stored]
        return _write_model(part.model, own, file, storage)

    artifact = write_split(divided, path, split.modalities, write_part, accept)
    kept = {name: axes for name, axes in dynamic_axes.items() if name in divided.input_names}
    return replace(artifact, dense_size_bytes=dense_size, dynamic_axes=kept)


def _write_model(
    model: ir.Model,
    weights: list[MaskedWeight],
    path: Path,
    storage: Storage,
    accept: Callable[[Path], None] | None = None,
) -> ExportedArtifact:
    """Write one .onnx file with these masked weights."""
    dense_size = _dense_size(model, path, storage)
    fields = b""
    if storage.options.format == sparse_initializers.ENCODING:
        placed, fields = sparse_initializers.place_sparse(model, weights, storage.options.values)
        stored: dict[str, StoredWeight] = {}
    else:
        place = place_int8 if storage.options.values == INT8 else place_weights
        placed, stored = place(model, weights, storage.options)
    storage.describe(model, stored)
    if storage.options.values == INT8:
        model.metadata_props.update({WEIGHTS_KEY: describe_weights(stored)} | describe_int8(placed))
    has_data_file = _is_external(model, storage.external_data, stored)
    layout = plan_files(model, f"{path.name}.data" if has_data_file else None)
    if fields:
        sparse_initializers.check_graph(layout, weights)
        layout = replace(layout, graph_proto=layout.graph_proto + fields)
        sparse_initializers.check_size(layout, path.name)
    cost = predict_load(layout.model_size_bytes, layout.data_size_bytes, (item.plan for item in placed.values()), dense_size)
    refuse_unloadable(path.name, cost, dense_size)
    files = _write(layout, path, has_data_file=has_data_file, accept=accept, is_full=not fields)
    interface = describe_interface(model)
    return ExportedArtifact(
        path=path,
        format=storage.options.format,
        values=storage.options.values,
        size_bytes=layout.size_bytes,
        dense_size_bytes=dense_size,
        encodings=tuple(item.encoding(fqn) for fqn, item in placed.items()),
        input_names=interface.input_names,
        output_names=interface.output_names,
        dynamic_axes=interface.dynamic_axes,
        files=files,
        opset=model.opset_imports[""],
        load_peak_bytes=cost.peak_bytes,
        load_time_ratio=cost.time_ratio,
    )


def _dense_size(model: ir.Model, path: Path, storage: Storage) -> int:
    """Bytes of the model with its weights as they are now."""
    _describe(model, "dense", "fp32", storage.masks)
    return plan_files(model, f"{path.name}.data" if _is_external(model, storage.external_data) else None).size_bytes


def _check(captured: CapturedGraph, format: str, values: str) -> ExportedModel:
    if format not in FORMATS:
        raise InputError(f"format={format!r} is not known; choose one of {', '.join(FORMATS)}")
    if values not in (*VALUES, INT8):
        raise InputError(f"values={values!r} is not known; choose one of {', '.join((*VALUES, INT8))}")
    if captured.exported is None:
        tried = "; ".join(f"{attempt.frontend}: {attempt.detail}" for attempt in captured.attempts if not attempt.succeeded)
        raise ExportError(
            f"{type(captured.module).__name__} has no exported program, so it cannot be written as ONNX"
            f"{f' ({tried})' if tried else ''}. Capture it with export enabled, or make it exportable by torch.export"
        )
    return captured.exported


def _name(model: ir.Model, exported: ExportedModel) -> Interface:
    nodes = tensor_input_nodes(exported.program)
    if len(nodes) != len(exported.input_names):
        raise ExportError(
            f"the program has {len(nodes)} tensor inputs ({', '.join(nodes)}), but the captured model names "
            f"{len(exported.input_names)} ({', '.join(exported.input_names)}). Capture the model again"
        )
    names = dict(zip(nodes, exported.input_names, strict=True))
    return name_interface(model, names, exported.output_names, exported.dynamic_axes)


def _find_weights(model: ir.Model, exported: ExportedModel, captured: CapturedGraph) -> tuple[list[MaskedWeight], list[str]]:
    """The initializer of every masked parameter, renamed to its FQN; and the parameters that the graph does not read."""
    masks = captured.masks
    if masks is None:
        return [], []
    unread: list[str] = []
    aliases = tensor_aliases(exported.program)
    # A program of a recorded graph lacks the parameters that no output needs.
    owned = {name for name, _ in captured.module.named_parameters(remove_duplicate=False)}
    found: dict[ir.Value, MaskedWeight] = {}
    for fqn, packed in masks.packed.items():
        names = dict.fromkeys((fqn, *aliases.get(fqn, ()), *captured.aliases.get(fqn, ())))
        value = next((model.graph.initializers[name] for name in names if name in model.graph.initializers), None)
        if value is None and not any(name in exported.program.state_dict or name in owned for name in names):
            raise InputError(f"the masks name {fqn}, but the model has no such parameter. Use the masks of this model")
        if value is None:
            unread.append(fqn)
            continue
        tensor = value.const_value
        assert tensor is not None  # initializers of the main graph have values
        if tuple(tensor.shape.numpy()) != packed.shape:
            raise InputError(
                f"the mask of {fqn} has shape {packed.shape}, but the parameter has {tuple(tensor.shape.numpy())}. "
                f"Use the masks of this model"
            )
        if value in found:
            other = found[value].fqn
            if not np.array_equal(masks.packed[other].bits, packed.bits):
                raise InputError(f"{other} and {fqn} are one tied weight, but their masks differ. Give one mask for both")
            continue
        value.name = fqn
        found[value] = MaskedWeight(fqn, value, tensor, masks)
    return list(found.values()), unread


def _describe_unread(names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"masked parameters that the graph does not read are not in the file ({len(names)}): {shown}"]


def _describe(model: ir.Model, format: str, values: str, masks: MaskSet | None) -> None:
    model.producer_name, model.producer_version = "mfcompile", __version__
    model.metadata_props.clear()
    model.metadata_props["mfcompile.format"] = format
    model.metadata_props["mfcompile.values"] = values
    if masks is not None:
        model.metadata_props["mfcompile.masks_sha256"] = masks.digest()


def _is_external(model: ir.Model, external_data: bool | None, stored: Mapping[str, StoredWeight] | None = None) -> bool:
    if external_data is not None:
        return external_data
    tensors = {name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None}
    sparse = sum(tensors[name].nbytes for item in (stored or {}).values() if item.is_sparse for name in item.tensors)
    return needs_external_data(tensors.values()) or saves_memory(sparse)


def _write(
    layout: FileLayout, path: Path, *, has_data_file: bool, accept: Callable[[Path], None] | None, is_full: bool
) -> tuple[Path, ...]:
    """Write and check under a temporary folder beside the path, then rename."""

    def check(staged: Path) -> None:
        _check_file(staged, is_full=is_full)
        if accept is not None:
            accept(staged)

    return publish_files(layout, path, has_data_file=has_data_file, check=check)


def _check_file(path: Path, *, is_full: bool) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=is_full)
    except Exception as error:
        raise RefusedProgramError(
            f"the written file does not pass onnx.checker: {first_line(error)}. Nothing was kept; this is a bug",
            f"the written file does not pass onnx.checker: {first_line(error)}",
        ) from error
