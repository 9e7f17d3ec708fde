"""Masks written into the ONNX file that a model came from; everything else stays as it is, byte by byte.

In the dense format the values of masked initializers change in place, and nothing else does: fields, names, metadata and
the layout of external data are those of the original. In the packed format a masked initializer gives way to its packed
tensors: SparseLinear nodes stand where its layers were, or nodes that decode it in front of the first node. What is left of
external data moves together, and entries of metadata are added.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters.decode_nodes import SharedConstants, pack_weight, stored_tensors
from mfcompile.exporters.load_cost import predict_load
from mfcompile.exporters.messages import first_line
from mfcompile.exporters.onnx_layers import PackedParts, StoredGraph
from mfcompile.exporters.onnx_splicing import (
    Chunk,
    DataFile,
    FileChunks,
    Later,
    as_array,
    masked_bytes,
    moved_tensor,
    write_chunks,
)
from mfcompile.exporters.packing import VALUES, EncodedWeight, EncodingPlan, encode
from mfcompile.exporters.staging import staging_folder
from mfcompile.exporters.stored_weights import WEIGHTS_KEY, describe_weights
from mfcompile.exporters.weight_placement import Placement, PlacementOptions, checked_budget
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet
from mfcompile.onnx_file import OnnxFile
from mfcompile.onnx_wire import (
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    MODEL_GRAPH,
    MODEL_METADATA,
    FileRecord,
    MappedFile,
    TensorRecord,
    field_bytes,
    read_fields,
    varint,
)

FORMATS = ("packed", "dense")

LEAST_OPSET, LEAST_IR = 11, 4
"""The decode nodes need CumSum and ScatterElements, and initializers that are no inputs."""

_GRAPH_INPUT, _RAW_DATA = 11, 9
_EXTERNAL_LEAST_BYTES = 1024
_RESHAPE_ALLOWS_ZERO = 14


@dataclass(frozen=True)
class _Masked:
    """One masked tensor of the file."""

    fqn: str
    tensor: TensorRecord
    placement: Placement

    @property
    def plan(self) -> EncodingPlan:
        """How it is encoded."""
        return self.placement.plan

    @property
    def is_replaced(self) -> bool:
        """Nodes take its place; otherwise its values change where they are."""
        return self.plan.encoding != "dense" or self.plan.values_dtype != self.plan.dtype


def rewrite_onnx(
    captured: CapturedGraph, path: Path | str, *, format: str = "packed", values: str = "fp32", inline: bool = False,
    load_budget: float | None = None,
) -> ExportedArtifact:  # fmt: skip
    """Write the file that was captured with masks in its initializers, complete or not at all.

    Args:
        captured: a captured ONNX file; ``masks`` of None writes a copy.
        path: the .onnx file to write; external data lies beside it under the names of the original.
        format, values, inline, load_budget: see ``onnx_model.export_onnx``.

    Raises:
        InputError: an argument is not usable, the place is that of the original, or the file is too old to be packed.
        ExportError: a value does not fit fp16, or the result does not pass onnx.checker.
    """
    path, file = Path(path), captured.module
    assert isinstance(file, OnnxFile)  # the front end is onnx
    _check(file, path, format, values)
    masks = captured.masks if captured.masks is not None else MaskSet({})
    graph = StoredGraph(file, captured.example_inputs)
    tensors = {fqn: _find(file, fqn, masks) for fqn in masks.packed}
    budget = checked_budget(load_budget)
    placed = graph.decide(masks, PlacementOptions(format, values, inline, sizes=graph.sizes, load_budget=budget))
    masked = [_Masked(fqn, tensor, placed[fqn]) for fqn, tensor in tensors.items()]
    replaced = [item for item in masked if item.is_replaced]
    if replaced:
        _check_packable(file, path)
    with MappedFile(file.path) as buffer:
        rewriter = _Rewriter(file, graph, masks, masked, buffer)
        chunks = rewriter.model_chunks(format, values)
        sizes = _write(path, chunks, rewriter.data_files(), checked=bool(replaced))
    files = (path, *(path.parent / item for item in sizes if item != path.name))
    dense = file.record.size + sum(item.stat().st_size for item in file.record.data_files)
    data = sum(size for name, size in sizes.items() if name != path.name)
    cost = predict_load(sizes[path.name], data, (item.plan for item in masked), dense)
    return ExportedArtifact(
        path=path,
        format=format,
        values=values,
        size_bytes=sum(sizes.values()),
        dense_size_bytes=dense,
        encodings=tuple(item.placement.encoding(item.fqn) for item in masked),
        input_names=file.input_names,
        output_names=file.output_names,
        dynamic_axes=_free_axes(file),
        files=files,
        opset=_opset(file),
        load_peak_bytes=cost.peak_bytes,
        load_time_ratio=cost.time_ratio,
    )


def _check(file: OnnxFile, path: Path, format: str, values: str) -> None:
    if format == "onnx-sparse":
        raise InputError("an .onnx file is rewritten packed or dense, not as onnx-sparse: use one of these formats")
    if format not in FORMATS:
        raise InputError(f"format={format!r} is not known; choose one of {', '.join(FORMATS)}")
    if values not in VALUES:
        raise InputError(f"values={values!r} is not known; choose one of {', '.join(VALUES)}")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give the name of the .onnx file to write")
    if not file.path.is_file() or file.path.stat().st_size != file.record.size:
        raise InputError(f"{file.path} has changed since it was read: capture it again")
    sources = {item.resolve() for item in (file.path, *file.record.data_files)}
    targets = [path, *(path.parent / os.path.relpath(item, file.path.parent) for item in file.record.data_files)]
    for target in targets:
        if target.resolve() in sources:
            raise InputError(f"{target} is (a part of) the file that is pruned: write to another folder")


def _check_packable(file: OnnxFile, path: Path) -> None:
    if _opset(file) < LEAST_OPSET or file.proto.ir_version < LEAST_IR:
        raise InputError(
            f"{file.path} is of opset {_opset(file)}, IR version {file.proto.ir_version}; packed storage needs opset "
            f"{LEAST_OPSET} and IR version {LEAST_IR}. Write it dense (--format dense), or convert it with "
            f"onnx.version_converter first"
        )


def _opset(file: OnnxFile) -> int:
    return next((int(item.version) for item in file.proto.opset_import if item.domain in ("", "ai.onnx")), 1)


def _find(file: OnnxFile, fqn: str, masks: MaskSet) -> TensorRecord:
    if fqn not in file.stored_names:
        raise InputError(f"the masks name {fqn}, but {file.path} has no such tensor. Use the masks of this file")
    tensor = file.record.tensors[file.stored_names[fqn]]
    if tensor.dims != masks.packed[fqn].shape:
        raise InputError(f"the mask of {fqn} has shape {masks.packed[fqn].shape}, the tensor has {tensor.dims}")
    return tensor


class _Rewriter:
    """Lays out the bytes of the new files."""

    def __init__(
        self, file: OnnxFile, graph: StoredGraph, masks: MaskSet, masked: Sequence[_Masked], buffer: memoryview
    ) -> None:
        self._file, self._graph, self._masks, self._buffer = file, graph, masks, buffer
        self._record: FileRecord = file.record
        self._by_start = {item.outer.start: item for item in self._record.tensors.values()}
        self._masked = {item.tensor.name: item for item in masked}
        self._replaced = {item.tensor.name for item in masked if item.is_replaced}
        moves = any(self._record.tensors[name].external for name in self._replaced)
        self._data = (
            DataFile.plan(self._record, self._replaced, self._values) if moves else DataFile.same(self._record, self._values)
        )
        if not moves:
            self._refuse_shared_bytes()

    def model_chunks(self, format: str, values: str) -> FileChunks:
        """The .onnx file, in pieces."""
        packed = self._pack() if self._replaced else PackedParts()
        inside: list[Chunk] = []
        place = 0
        for item in self._record.graph_fields:
            if item.number != GRAPH_NODE:
                inside += self._field(item.start, item.end, item.number)
                continue
            if place == 0:
                inside += [field_bytes(GRAPH_NODE, node) for node in packed.nodes]
            if place in packed.changes.added:
                inside.append(field_bytes(GRAPH_NODE, packed.changes.added[place].SerializeToString()))
            elif place not in packed.changes.dropped:
                inside += self._field(item.start, item.end, item.number)
            place += 1
        inside += packed.fields
        before, after = self._around()
        if self._replaced:
            metadata = {
                "mfcompile.format": format,
                "mfcompile.values": values,
                "mfcompile.masks_sha256": self._masks.digest(),
                WEIGHTS_KEY: describe_weights(packed.weights),
            }
            after += [
                field_bytes(MODEL_METADATA, field_bytes(1, key.encode()) + field_bytes(2, value.encode()))
                for key, value in metadata.items()
            ]
            after += [field_bytes(number, data) for number, items in packed.changes.model_fields.items() for data in items]
        return FileChunks(self._buffer, before, MODEL_GRAPH, inside, after)

    def data_files(self) -> DataFile:
        """What is written beside the .onnx file."""
        return self._data

    def _around(self) -> tuple[list[Chunk], list[Chunk]]:
        """The fields of the model before and after its graph; what an earlier packing said of itself goes."""
        parts: tuple[list[Chunk], list[Chunk]] = ([], [])
        for item in read_fields(self._buffer, 0, self._record.size):
            if item.start == self._record.graph.start:
                continue
            is_own = item.number == MODEL_METADATA and b"mfcompile." in bytes(self._buffer[item.payload : item.end])
            if not (is_own and self._replaced):
                parts[item.start > self._record.graph.start].append((item.start, item.end))
        return parts

    def _field(self, start: int, end: int, number: int) -> list[Chunk]:
        """One field of the graph, as it is in the new file."""
        if number == _GRAPH_INPUT and self._replaced:
            name = onnx.ValueInfoProto.FromString(self._body(start, end)).name
            return [] if name in self._replaced else [(start, end)]
        tensor = self._by_start.get(start)
        if tensor is None or self._record.tensors.get(tensor.name) is not tensor:
            return [(start, end)]
        if tensor.name in self._replaced:
            return []
        if tensor.external is not None:
            return [moved_tensor(self._buffer, tensor, self._data)] if self._data.is_moved else [(start, end)]
        if tensor.name not in self._masked:
            return [(start, end)]
        if tensor.values is not None:
            length = tensor.values[1] - tensor.values[0]
            return [(start, tensor.values[0]), Later(length, lambda: self._values(tensor) or b""), (tensor.values[1], end)]
        return [self._other_form(tensor)]

    def _body(self, start: int, end: int) -> bytes:
        (field,) = read_fields(self._buffer, start, end)
        return bytes(self._buffer[field.payload : field.end])

    def _values(self, tensor: TensorRecord) -> bytes | None:
        """The masked values of a tensor, None for one without a mask."""
        item = self._masked.get(tensor.name)
        if item is None:
            return None
        return masked_bytes(self._file.get_parameter(item.fqn), self._masks[item.fqn])

    def _other_form(self, tensor: TensorRecord) -> bytes:
        """A tensor whose values are in one of protobuf's other forms (float16 as int32), with zeros written into that form."""
        proto = onnx.TensorProto.FromString(bytes(self._buffer[slice(*tensor.body)]))
        pruned = np.flatnonzero(~self._masks[self._masked[tensor.name].fqn].numpy().reshape(-1))
        values = next((item for item in (proto.int32_data, proto.float_data, proto.double_data) if len(item)), None)
        if values is None or len(values) != np.prod(tensor.dims) or tensor.is_constant_node:
            raise ExportError(
                f"{tensor.name} of {self._file.path} is stored in a form that cannot be changed in place. Load and save the "
                f"file with onnx first, or keep this weight dense with --ignore"
            )
        for place in pruned.tolist():
            values[place] = 0
        return field_bytes(GRAPH_INITIALIZER, proto.SerializeToString())

    def _pack(self) -> PackedParts:
        """What stands for the replaced weights, under names that are new in this file."""
        scratch = ir.Graph([], [], nodes=[], opset_imports={"": _opset(self._file)}, name="decode")
        shared = SharedConstants(scratch)
        nodes: list[ir.Node] = []
        tensors: dict[str, Sequence[ir.Value]] = {}
        for name in sorted(self._replaced, key=list(self._masked).index):
            item = self._masked[name]
            load = partial(_encode, self._file, item, self._masks)
            if item.placement.layer is not None:
                tensors[name] = stored_tensors(name, item.plan, load)
                continue
            packed = pack_weight(name, item.plan, load, shared)
            nodes += packed.nodes
            tensors[name] = packed.initializers
        nodes = [*shared.nodes, *nodes]
        stored = [*scratch.initializers.values(), *(value for values in tensors.values() for value in values)]
        taken = _names(self._file.proto) - self._replaced
        for value in (*stored, *(output for node in nodes for output in node.outputs)):
            while value.name in taken:
                value.name = f"mfcompile.{value.name}"
        for node in nodes:
            if node.op_type == "Reshape" and _opset(self._file) < _RESHAPE_ALLOWS_ZERO:
                node.attributes.pop("allowzero")
        found = PackedParts([ir.to_proto(node).SerializeToString() for node in nodes])
        found.fields += [chunk for value in stored for chunk in self._store(value)]
        for name, values in tensors.items():
            placement = self._masked[name].placement
            if placement.layer is not None:
                found.changes.add_layer(self._graph, placement, [str(value.name) for value in values])
            if placement.plan.encoding != "dense":
                found.weights[name] = placement.stored(values)
        return found

    def _store(self, value: ir.Value) -> list[Chunk]:
        """The field of a stored tensor, whose values are outside where the file keeps its tensors outside."""
        tensor = value.const_value
        assert tensor is not None  # stored tensors have values
        data = Later(tensor.nbytes, tensor.tobytes)
        proto = onnx.TensorProto(name=value.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
        if self._data.is_moved and data.length >= _EXTERNAL_LEAST_BYTES:
            location, offset = self._data.append(data)
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, text in (("location", location), ("offset", str(offset)), ("length", str(data.length))):
                proto.external_data.add(key=key, value=text)
            return [field_bytes(GRAPH_INITIALIZER, proto.SerializeToString())]
        head = proto.SerializeToString() + varint(_RAW_DATA << 3 | 2) + varint(data.length)
        return [varint(GRAPH_INITIALIZER << 3 | 2) + varint(len(head) + data.length) + head, data]

    def _refuse_shared_bytes(self) -> None:
        """Two tensors may lie in the same bytes of a data file; changing one would change the other.

        Raises:
            ExportError: names both.
        """
        places = [
            (item.external.path, item.external.offset, item.name) for item in self._record.tensors.values() if item.external
        ]
        first: dict[tuple[Path, int], str] = {}
        for path, offset, name in places:
            other = first.setdefault((path, offset), name)
            if other != name and {other, name} & set(self._masked):
                raise ExportError(
                    f"{other} and {name} lie in the same bytes of {path.name}: masking one would mask the other. Write the "
                    f"file packed, or keep both dense with --ignore"
                )


def _encode(file: OnnxFile, item: _Masked, masks: MaskSet) -> EncodedWeight:
    values = "fp16" if item.plan.values_dtype != item.plan.dtype else "fp32"
    weight, mask = as_array(file.get_parameter(item.fqn)), masks[item.fqn].numpy()
    if item.placement.is_transposed:
        weight, mask = weight.T, mask.T
    return encode(weight, mask, values, encoding=item.plan.encoding, name=item.fqn)


def _names(model: onnx.ModelProto) -> set[str]:
    graph = model.graph
    names = {item.name for item in (*graph.input, *graph.output, *graph.initializer)}
    return names | {name for node in graph.node for name in (*node.output, *node.input)}


def _write(path: Path, chunks: FileChunks, data: DataFile, *, checked: bool) -> dict[str, int]:
    """Write all files under a temporary folder beside the path, then rename; file name -> bytes."""
    with staging_folder(path) as staging:
        data.write(staging)
        write_chunks(chunks, staging / path.name)
        if checked:
            _check_file(staging / path.name)
        written = [item for item in sorted(staging.rglob("*")) if item.is_file()]
        sizes = {item.relative_to(staging).as_posix(): item.stat().st_size for item in written}
        for name in sorted(sizes, key=lambda name: name == path.name):  # the .onnx file last
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, path.parent / name)
    return sizes


def _check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        raise ExportError(
            f"the written file does not pass onnx.checker: {first_line(error)}. Nothing was kept; this is a bug"
        ) from error


def _free_axes(file: OnnxFile) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for item in file.proto.graph.input:
        sizes = enumerate(item.type.tensor_type.shape.dim)
        axes = {place: size.dim_param or f"dim_{place}" for place, size in sizes if not size.dim_value}
        if axes and item.name in file.input_names:
            found[item.name] = axes
    return found
