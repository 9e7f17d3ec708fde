"""capture() of an ONNX file: its graph as a CapturedGraph that passes read as they read a recorded module."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from mfcompile.errors import InputError
from mfcompile.frontends.onnx_operators import emit, free_names
from mfcompile.frontends.onnx_rules import stand_in
from mfcompile.frontends.onnx_scopes import Scopes, find_scopes
from mfcompile.frontends.onnx_synthesis import synthesize
from mfcompile.graph import CaptureAttempt, CapturedGraph, InputSpec, ModuleCall, TensorValue, tensor_values
from mfcompile.inputs import ExampleInputs
from mfcompile.onnx_file import ELEMENT_TYPES, RANDOM_INPUTS, OnnxFile, inferred_types
from mfcompile.onnx_inputs import describe_inputs, name_inputs
from mfcompile.session import make_feeds

_SHAPE_PREFIX = "mfcompile.shape/"

_SIZES = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Unsqueeze": (1,), "Split": (1,), "Tile": (1,),
    "Pad": (1,), "Gather": (1,),
}  # fmt: skip
"""Operands that say how another operand is re-arranged."""

_QUANTISED = (
    "DequantizeLinear", "QLinearMatMul", "MatMulInteger", "MatMulNBits", "QGemm", "QAttention", "DynamicQuantizeMatMul",
    "MatMulBnb4", "QMoE",
)  # fmt: skip


def capture_onnx(file: OnnxFile, example_inputs: Any = None) -> CapturedGraph:
    """Capture an ONNX file: every node becomes the aten operator of the same meaning.

    The file is run once in onnxruntime, which gives the shape of every value. The graph of the result is read by passes and
    cannot be run; its module is the file, which runs in onnxruntime.

    Args:
        file: the opened file.
        example_inputs: arrays or tensors for its inputs: a mapping, a sequence in the order of its inputs, or one tensor; None
            makes random ones from the types of the inputs, and says so in ``specialised``.

    Raises:
        InputError: the inputs do not fit the file, none can be made up, or its weights are quantised.
        CaptureError: onnxruntime does not run the file on the inputs.
    """
    started = time.perf_counter()
    given = example_inputs is not None
    inputs = name_inputs(file, example_inputs, what="example_inputs") if given else synthesize(file)
    scopes = find_scopes(file.proto)
    builder = _GraphBuilder(file, inputs, _probe(file, inputs), scopes)
    builder.build()
    _refuse_quantised(file, builder)
    specialised = ["the shapes of the example inputs"] if given else [f"{RANDOM_INPUTS} ({describe_inputs(inputs)})"]
    detail = f"{len(file.proto.graph.node)} ONNX nodes; {scopes.source}"
    if builder.control_flow:
        detail += f"; {builder.control_flow} nodes with bodies (If, Loop, Scan) are read as one operator each"
    return CapturedGraph(
        graph_module=fx.GraphModule(builder.root, builder.graph),
        module=file,
        example_inputs=inputs,
        inputs=builder.inputs,
        output_names=file.output_names,
        parameter_nodes=builder.parameter_nodes,
        aliases=builder.aliases(),
        frontend="onnx",
        specialised=tuple(specialised),
        attempts=(CaptureAttempt("onnx", True, detail, time.perf_counter() - started),),
        versions={name: metadata.version(name) for name in ("mfcompile", "torch", "onnx", "onnxruntime")},
    )


@dataclass(frozen=True)
class _Probe:
    """What one run shows.

    Attributes:
        shapes: value -> sizes.
        types: value -> dtype.
        numbers: value -> its integers, for what says how others are re-arranged.
    """

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, torch.dtype]
    numbers: Mapping[str, list[int]]


def _probe(file: OnnxFile, inputs: ExampleInputs) -> _Probe:
    """Run the file once, with the shape of every value as an output more."""
    types = inferred_types(file.proto)
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    stored = {item.name: item for item in file.proto.graph.initializer}
    values = [name for node in file.proto.graph.node for name in node.output if name]
    tensors = [name for name in values if name not in types or types[name].HasField("tensor_type")]
    for name in tensors:
        model.graph.node.add(op_type="Shape", input=[name], output=[_SHAPE_PREFIX + name])
    sizes = {
        name
        for node in file.proto.graph.node
        for place in _SIZES.get(node.op_type, ())
        for name in node.input[place : place + 1]
    }
    computed = set(values)
    wanted = [name for name in sizes if name in computed]
    present = set(file.output_names)
    for name in (*(_SHAPE_PREFIX + name for name in tensors), *(name for name in wanted if name not in present)):
        model.graph.output.add(name=name)
    session = file.open(model, optimize=False)
    feeds, _ = make_feeds(session, inputs)
    names = [*(_SHAPE_PREFIX + name for name in tensors), *wanted]
    try:
        found = dict(zip(names, session.run_with_ort_values(names, feeds), strict=True)) if names else {}
    except Exception as error:
        raise file.refusal(inputs.tensors(), error) from error
    shapes = {name: tuple(int(size) for size in found[_SHAPE_PREFIX + name].numpy()) for name in tensors}
    shapes |= {name: tuple(item.dims) for name, item in stored.items()}
    given = inputs.tensors()
    shapes |= {name: tuple(tensor.shape) for name, tensor in given.items()}
    numbers = {name: found[name].numpy().reshape(-1).tolist() for name in wanted}
    numbers |= {
        name: onnx.numpy_helper.to_array(stored[name]).reshape(-1).tolist()
        for name in sizes
        if name in stored and stored[name].data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    }
    numbers |= {
        name: given[name].reshape(-1).tolist() for name in sizes if name in given and not given[name].is_floating_point()
    }
    return _Probe(shapes, _dtypes(file, types, given), numbers)


def _dtypes(file: OnnxFile, types: Mapping[str, onnx.TypeProto], given: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Value -> dtype; a value of an operator that onnx does not know has that of the operator's first operand."""
    found = {
        name: ELEMENT_TYPES[item.tensor_type.elem_type]
        for name, item in types.items()
        if item.HasField("tensor_type") and item.tensor_type.elem_type in ELEMENT_TYPES
    }
    found |= {
        item.name: ELEMENT_TYPES[item.data_type] for item in file.proto.graph.initializer if item.data_type in ELEMENT_TYPES
    }
    found |= {name: tensor.dtype for name, tensor in given.items()}
    for node in file.proto.graph.node:
        operands = [found[name] for name in (*node.input, *free_names(node)) if name in found]
        floats = [dtype for dtype in operands if dtype.is_floating_point]
        for name in node.output:
            if name not in found and operands:
                found[name] = (floats or operands)[0]
    return found


class _GraphBuilder:
    """Writes the fx graph of one file; see frontends.onnx_operators.Builder."""

    def __init__(self, file: OnnxFile, inputs: ExampleInputs, probe: _Probe, scopes: Scopes) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.inputs: tuple[InputSpec, ...] = ()
        self.parameter_nodes: dict[str, str] = {}
        self.control_flow = 0
        self._file, self._examples, self._probe, self._scopes = file, inputs, probe, scopes
        self._nodes: dict[str, fx.Node] = {}
        self._stored: set[fx.Node] = set()
        self._constant: set[fx.Node] = set()
        self._stack: tuple[ModuleCall, ...] = (ModuleCall("", 0),)
        self._constants = 0
        self._aliases: dict[str, list[str]] = {}
        self._linear: dict[fx.Node, str] = {}

    @property
    def multiplies_stored(self) -> bool:
        """Some activation meets a stored float matrix."""
        return bool(self._linear)

    def build(self) -> None:
        """All nodes, in the order of the file, which is one of execution."""
        specs = []
        for name, tensor in self._examples.tensors().items():
            node = self.graph.placeholder(_identifier(name))
            node.target = node.name
            self._bind(node, name, tuple(tensor.shape))
            specs.append(InputSpec(name, node.name, tuple(tensor.shape), tensor.dtype))
        self.inputs = tuple(specs)
        for name, kind in self._scopes.modules.items():
            self._file.add_path(name, kind)
        for index, node in enumerate(self._file.proto.graph.node):
            path = self._scopes.paths[index]
            self._stack = tuple(ModuleCall(item, 0) for item in ("", *path))
            self.control_flow += node.op_type in ("If", "Loop", "Scan")
            emit(self, node)
        self._stack = (ModuleCall("", 0),)
        self.graph.output(tuple(self.read(name) for name in self._file.output_names))
        self.graph.lint()

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """FQN -> its names; a weight whose own name says nothing is known by the submodule that multiplies by it, too."""
        for node, fqn in self._linear.items():
            path = node.meta["module_stack"][-1].path
            if path and "." not in fqn:
                alias = self._file.add_alias(path, "weight", fqn)
                if alias is not None:
                    self._aliases.setdefault(fqn, [fqn]).append(alias)
        named = [name for name, _ in self._file.named_parameters()]
        return {name: tuple(self._aliases.get(name, (name,))) for name in named}

    def read(self, name: str) -> fx.Node:
        if name not in self._nodes:
            self._read_stored(name)
        return self._nodes[name]

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._probe.shapes.get(name)

    def numbers(self, name: str) -> list[int] | None:
        return self._probe.numbers.get(name)

    def is_stored(self, node: fx.Node) -> bool:
        return node in self._stored

    def is_constant(self, node: fx.Node) -> bool:
        return node in self._constant

    def is_matrix(self, node: fx.Node) -> bool:
        return node in self._stored and len(node.meta["val"].shape) == 2

    def call(self, target: Any, *args: Any, out: str = "", shape: Sequence[int] | None = None) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, {}, name=_identifier(out) if out else None)
        source = next((item for item in node.all_input_nodes), None)
        if source in self._stored and len(node.all_input_nodes) == 1 and _is_view(target):
            self._stored.add(node)
        sources = node.all_input_nodes
        if target is stand_in("full") or (sources and self._constant.issuperset(sources)):
            self._constant.add(node)
        known = self._probe.shapes.get(out) if out else None
        self._bind(node, out, known if known is not None else tuple(shape) if shape is not None else None)
        if target is torch.ops.aten.linear.default:
            weight = args[1]
            while weight.op != "get_attr":
                weight = weight.all_input_nodes[0]
            self._linear[node] = self.parameter_nodes[weight.name]
        return node

    def _bind(self, node: fx.Node, name: str, shape: tuple[int, ...] | None) -> None:
        node.meta["module_stack"] = self._stack
        sources = [item for operand in node.all_input_nodes for item in tensor_values(operand)]
        dtype = self._probe.types.get(name) or (sources[0].dtype if sources else torch.float32)
        if shape is not None:
            node.meta["val"] = TensorValue(shape, dtype)
        if name:
            node.meta["onnx_value"] = name
            self._nodes[name] = node

    def _read_stored(self, name: str) -> None:
        """A parameter, or a constant of a type that torch does not have."""
        fqn = self._file.fqn(name)
        if fqn is None:
            target = f"_constant_{self._constants}"
            self._constants += 1
            self.root.register_buffer(target, torch.zeros(()), persistent=False)
        else:
            target = fqn
            _attach(self.root, fqn, self._file.value(fqn))
        node = self.graph.create_node("get_attr", target, (), {}, name=_identifier(name))
        self._constant.add(node)
        self._bind(node, name, self._probe.shapes.get(name, ()))
        if fqn is not None:
            self.parameter_nodes[node.name] = fqn
            if self._file.value(fqn).is_floating_point():
                self._stored.add(node)


_VIEWS = frozenset({"transpose", "permute", "reshape", "alias", "to", "slice", "select", "getitem", "split_with_sizes"})


def _is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return (schema.name.partition("::")[2] if schema is not None else target.__name__) in _VIEWS


def _attach(root: nn.Module, fqn: str, tensor: Tensor) -> None:
    """Hang a tensor into the root of the graph, which is asked for nothing but its presence."""
    *path, leaf = fqn.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    owner.register_buffer(leaf, tensor, persistent=False)


def _identifier(name: str) -> str:
    """A legal name for a node, as near to the value's as possible."""
    text = "".join(char if char.isalnum() or char == "_" else "_" for char in name) or "value"
    return f"_{text}" if text[0].isdigit() else text


def _refuse_quantised(file: OnnxFile, builder: _GraphBuilder) -> None:
    """A file whose weights are integers holds nothing that can be ranked.

    Raises:
        InputError: names the first such operator.
    """
    if builder.multiplies_stored:
        return
    for node in file.proto.graph.node:
        if node.op_type in _QUANTISED:
            raise InputError(
                f"{file.path} is quantised: its weights are integers ({node.op_type} {node.name or node.output[0]}), and no "
                f"float matrix is left to rank. Prune the float file, then quantise the result"
            )
