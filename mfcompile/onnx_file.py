"""An ONNX file as a module: its float initializers are parameters, and onnxruntime is its forward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import inliner
from torch import Tensor, nn

from mfcompile.errors import CaptureError, InputError
from mfcompile.inputs import ExampleInputs
from mfcompile.onnx_heads import skeleton
from mfcompile.onnx_wire import TensorRecord, read_file
from mfcompile.session import TORCH_DTYPES, make_feeds, ort_value, run_session
from mfcompile.session_options import session_options

INJECTED_LEAST_BYTES = 1024
"""Vectors and scalars of fewer bytes stay in the graph, where shape inference reads them."""

RANDOM_INPUTS = "random inputs, made from the types of the file's inputs, stand in for examples"
"""What ``CapturedGraph.specialised`` says when no example was given."""

ELEMENT_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}
"""ONNX element types that torch has; tensors of others stay in the graph and are no weights."""


class OnnxFile(nn.Module):
    """An ONNX file that runs, and whose float tensors are parameters under their own names.

    Values are mapped from the file where it stores them aligned (external data is), and copied once where it does not.
    ``forward`` runs the graph with the parameters as they are now, so that masks put on them are in force; it cannot be
    trained. A name that torch refuses (two dots in a row, the name of a method) is changed; ``stored_names`` has both.

    Args:
        path: the .onnx file.

    Attributes:
        path: that file.
        record: where its tensors lie.
        proto: the model without the values of its larger tensors; local functions are inlined, Constant nodes are
            initializers.
        stored_names: FQN -> the name in the file.
        input_names, output_names: inputs without initializers, and outputs, in order.

    Raises:
        InputError: the file is missing, damaged, incomplete, or not valid ONNX.
    """

    parity_reference = "the original file, its pruned weights put to zero"

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.path = Path(path)
        self.record = read_file(self.path)
        stripped = frozenset(name for name, item in self.record.tensors.items() if is_injected(item))
        self.proto = _parse(self.path, skeleton(self.record, stripped))
        self.stored_names: dict[str, str] = {}
        self._fqns: dict[str, str] = {}
        self._register_tensors(stripped)
        stored = {item.name for item in self.proto.graph.initializer}
        self.input_names = tuple(item.name for item in self.proto.graph.input if item.name not in stored)
        self.output_names = tuple(item.name for item in self.proto.graph.output)
        self._session: tuple[object, onnxruntime.InferenceSession] | None = None

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that every input is fixed to, None where it is free or they differ."""
        sizes = {
            item.type.tensor_type.shape.dim[0].dim_value
            for item in self.proto.graph.input
            if item.name in self.input_names and item.type.tensor_type.shape.dim
        }
        return (sizes.pop() or None) if len(sizes) == 1 else None

    def fqn(self, name: str) -> str | None:
        """FQN of the parameter or buffer that holds a stored tensor; None for one that is held nowhere."""
        return self._fqns.get(name)

    def value(self, fqn: str) -> Tensor:
        """What a parameter or buffer holds now, masks in force included."""
        owner, _, leaf = fqn.rpartition(".")
        value: Tensor = getattr(self.get_submodule(owner), leaf)
        return value.detach()

    def add_path(self, path: str, kind: type[nn.Module] = nn.Module) -> None:
        """A submodule without content at a dotted path, for what the graph says of the model that it was made from."""
        owner: nn.Module = self
        parts = path.split(".")
        for part, following in zip(parts, [*parts[1:], ""], strict=True):
            if part not in owner._modules:
                owner.add_module(part, _container(following))
            owner = owner._modules[part]  # type: ignore[assignment]
        if type(owner) is nn.Module:
            owner.__class__ = kind  # what stands for a submodule has no state of its own

    def add_alias(self, path: str, leaf: str, fqn: str) -> str | None:
        """Register a parameter once more, in the submodule that uses it; its name there, None where that is taken."""
        owner = self.get_submodule(path)
        if hasattr(owner, leaf):
            return None
        owner.register_parameter(leaf, self.get_parameter(fqn))
        return f"{path}.{leaf}"

    def open(self, proto: onnx.ModelProto | None = None, *, optimize: bool = True) -> onnxruntime.InferenceSession:
        """A session of the graph, or of a changed copy of it, with the parameters as they are now.

        Raises:
            InputError: onnxruntime refuses the graph.
        """
        model = self.proto if proto is None else proto
        options = session_options()
        options.log_severity_level = 4  # errors are raised, and said once
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        given: dict[str, Any] = {}
        read = _read_names(model.graph)  # onnxruntime drops what nobody reads, and then refuses values for it
        for item in model.graph.initializer:
            if item.data_location == onnx.TensorProto.EXTERNAL and item.name in read:
                given[item.name] = ort_value(self.value(self._fqns[item.name]).cpu())
        if given:
            options.add_external_initializers(list(given), list(given.values()))
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(
                f"onnxruntime {onnxruntime.__version__} cannot load {self.path}: {_first_line(error)}. It must run there: "
                f"masks need its activations"
            ) from error
        session._mfcompile_initializers = given  # onnxruntime reads their memory and does not own it
        return session

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the graph in onnxruntime: input name -> tensor gives output name -> tensor."""
        state = tuple((item.data_ptr(), item._version, name) for name, item in self.named_parameters())
        if self._session is None or self._session[0] != state:
            self._session = (state, self.open())
        session = self._session[1]
        feeds, _ = make_feeds(session, ExampleInputs((), dict(inputs), tuple(inputs)))
        try:
            return run_session(session, feeds)
        except Exception as error:
            raise self.refusal(inputs, error) from error

    def refusal(self, inputs: Mapping[str, Tensor], error: Exception) -> CaptureError:
        """What to say when onnxruntime did not run the graph on these inputs."""
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        return CaptureError(f"onnxruntime cannot run {self.path} on {shapes}: {_first_line(error)}")

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens a session of its own."""
        return {**self.__dict__, "_session": None}

    def _register_tensors(self, stripped: frozenset[str]) -> None:
        for initializer in self.proto.graph.initializer:
            if initializer.data_type not in ELEMENT_TYPES:
                continue
            name = initializer.name
            tensor = read_tensor(self.record.tensors[name], self.path) if name in stripped else _parsed(initializer)
            is_float = tensor.is_floating_point()
            if is_float and name not in stripped and tensor.ndim >= 2 and tensor.numel():
                _empty(initializer)
            fqn = self._place(name, nn.Parameter(tensor, requires_grad=False) if is_float else tensor)
            self.stored_names[fqn], self._fqns[name] = name, fqn

    def _place(self, name: str, tensor: Tensor) -> str:
        """Register under a name, or under the nearest that torch takes."""
        for candidate in (name, *(f"{name.replace('.', '_') or 'unnamed'}{'_' * count}" for count in range(1, 99))):
            *path, leaf = candidate.split(".")
            owner: nn.Module | None = self
            for part, following in zip(path, [*path[1:], leaf], strict=False):
                known = owner._modules.get(part) if owner is not None else None
                if known is None and owner is not None and part and not hasattr(owner, part):
                    known = _container(following)
                    owner.add_module(part, known)
                owner = known
            if owner is not None and leaf and not hasattr(owner, leaf):
                if isinstance(tensor, nn.Parameter):
                    owner.register_parameter(leaf, tensor)
                else:
                    owner.register_buffer(leaf, tensor)
                return candidate
        raise InputError(f"the initializer {name!r} of {self.path} cannot be registered under any name")


def _container(first_child: str) -> nn.Module:
    """A list where its children are numbered, else a plain submodule."""
    return nn.ModuleList() if first_child.isdigit() else nn.Module()


def is_injected(tensor: TensorRecord) -> bool:
    """Values that are given to onnxruntime in memory: float matrices, and what is large."""
    dtype = ELEMENT_TYPES.get(tensor.data_type)
    if dtype is None or not dtype.is_floating_point or tensor.is_constant_node or not math.prod(tensor.dims):
        return False
    if tensor.values is None and tensor.external is None:
        return False
    return len(tensor.dims) >= 2 or math.prod(tensor.dims) * dtype.itemsize >= INJECTED_LEAST_BYTES


def read_tensor(item: TensorRecord, path: Path) -> Tensor:
    """The values of a stored tensor, mapped from its file, or copied where it does not store them aligned.

    Args:
        item: a tensor with plain or external values.
        path: the .onnx file.

    Raises:
        InputError: it does not hold as many bytes as its shape needs.
    """
    dtype = ELEMENT_TYPES[item.data_type]
    count = math.prod(item.dims)
    file, offset, length = _place_of(item, path)
    if length >= 0 and length != count * dtype.itemsize:
        raise InputError(
            f"the tensor {item.name} {item.dims} of {file} has {length} bytes instead of {count * dtype.itemsize}: damaged"
        )
    mapped = np.memmap(file, np.uint8, "r", offset, (count * dtype.itemsize,))
    raw: Any = mapped if mapped.ctypes.data % dtype.itemsize == 0 else np.array(mapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the memory of a file is not writable, and nobody writes to it
        return torch.from_numpy(raw).view(dtype).reshape(item.dims)


def _place_of(item: TensorRecord, path: Path) -> tuple[Path, int, int]:
    if item.external is not None:
        return item.external.path, item.external.offset, item.external.length
    assert item.values is not None  # see is_injected
    return path, item.values[0], item.values[1] - item.values[0]


def _parsed(proto: onnx.TensorProto) -> Tensor:
    array = onnx.numpy_helper.to_array(proto)
    dtype = ELEMENT_TYPES[proto.data_type]
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(dtype)
    return torch.from_numpy(np.array(array)).to(dtype)


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    """The skeleton as a checked model, with functions inlined and constants as initializers."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as an ONNX file ({_first_line(error)}): it is damaged. Export it again"
        ) from error
    newest = onnx.defs.onnx_opset_version()
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx") and item.version > newest:
            raise InputError(
                f"{path} uses opset {item.version}, and the installed onnx {onnx.__version__} knows up to {newest}: "
                f"install a newer onnx, or export with an older opset"
            )
    try:
        onnx.checker.check_model(_without_external(model))
    except Exception as error:
        raise InputError(f"{path} is not valid ONNX: {_first_line(error)}. Export it again") from error
    if model.functions:
        model = inliner.inline_local_functions(model)
    _lift_constants(model.graph)
    return model


def _without_external(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs in place of initializers whose values are elsewhere: what checks and inference can read."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    known = {item.name for item in changed.graph.input}
    kept = [item for item in changed.graph.initializer if item.data_location != onnx.TensorProto.EXTERNAL]
    away = [item for item in changed.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(kept)
    changed.graph.input.extend(
        onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims))
        for item in away
        if item.name not in known
    )
    return changed


def inferred_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Value name -> type, for what onnx can infer."""
    try:
        inferred = onnx.shape_inference.infer_shapes(_without_external(model), data_prop=False)
    except Exception:  # inference is a help, not a check
        inferred = model
    graph = inferred.graph
    return {item.name: item.type for item in (*graph.input, *graph.output, *graph.value_info) if item.type.WhichOneof("value")}


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Initializers in place of Constant nodes, so that there is one kind of constant."""
    nodes = []
    for node in graph.node:
        tensor = _constant_value(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if tensor is None:
            nodes.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(nodes) != len(graph.node):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        copy = onnx.TensorProto()
        copy.CopyFrom(attribute.t)
        return copy
    numbers = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in numbers:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return onnx.numpy_helper.from_array(np.array(value, numbers[attribute.name]))


def _read_names(graph: onnx.GraphProto) -> set[str]:
    """Every name that a node reads, in bodies too, and the outputs."""
    found = {item.name for item in graph.output}
    for node in graph.node:
        found.update(node.input)
        for item in node.attribute:
            for body in (item.g, *item.graphs):
                found |= _read_names(body)
    return found


def _empty(proto: onnx.TensorProto) -> None:
    """Take the values out of an initializer that is given in memory from now on."""
    name, data_type, dims = proto.name, proto.data_type, list(proto.dims)
    proto.Clear()
    proto.name, proto.data_type, proto.data_location = name, data_type, onnx.TensorProto.EXTERNAL
    proto.dims.extend(dims)
    proto.external_data.add(key="location", value="given in memory")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


__all__ = ["ELEMENT_TYPES", "TORCH_DTYPES", "OnnxFile", "inferred_types", "is_injected", "read_tensor"]
