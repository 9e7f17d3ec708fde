"""A packed ONNX file as the dense one that it stands for: every packed weight is decoded here, one at a time.

::

    <fqn>.gaps, <fqn>.values -> decode nodes -> <fqn> -> ...             =>  <fqn> -> ...
    X, <fqn>.gaps, <fqn>.values, bias -> SparseLinear -> Y               =>  X, <fqn> -> Transpose -> MatMul -> Add -> Y

Which weights are packed is what the file says of itself (``mfcompile.exporters.stored_weights``), and the graph is held to
that: decode nodes read nothing but stored tensors and give a value named by the parameter; a SparseLinear node has its
function, in which the value ``weight`` is W as (N, K). What follows ``weight`` in it takes the place of the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from mfcompile.errors import ExportError, InputError
from mfcompile.exporters.messages import first_line
from mfcompile.exporters.onnx_files import data_path, needs_external_data, plan_files, publish_files
from mfcompile.exporters.packing import ENCODINGS, Array, EncodedWeight, decode
from mfcompile.exporters.stored_weights import DOMAIN, INT8_KEY, WEIGHTS_KEY, StoredWeight, describe_weights, read_weights

FORMAT_KEY = "mfcompile.format"
DECODE_OPERATORS = frozenset(
    {"Add", "Cast", "Constant", "ConstantOfShape", "CumSum", "Gather", "Max", "Reshape", "ScatterElements"}
)
"""Operators of the nodes that decode a weight."""

WEIGHT = "weight"
"""The value of a function's body that is W as (N, K)."""


@dataclass(frozen=True)
class PackedFile:
    """An ONNX file with packed weights, read.

    Attributes:
        path: the .onnx file.
        model: the whole model; external tensors are mapped from their file.
        weights: FQN -> how it is stored.
    """

    path: Path
    model: ir.Model
    weights: Mapping[str, StoredWeight]

    def refuse(self, fqn: str, reason: str) -> InputError:
        """What to raise when the graph does not hold a weight as the file says."""
        return InputError(
            f"{self.path} says that it stores {fqn} as {self.weights[fqn].encoding}, but {reason}. The file was changed after "
            f"its export (optimizers and converters do that); export it again, and pack last"
        )


def read_packed(path: Path) -> PackedFile:
    """Read an ONNX file and what it says of its packed weights.

    Raises:
        InputError: it is missing, or no ONNX file.
    """
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}")
    try:
        model = ir.load(path)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as an ONNX file ({first_line(error)}): it is damaged or something else. Export it again"
        ) from error
    return PackedFile(path, model, read_weights(model.metadata_props, path))


def make_dense(file: PackedFile, fqns: Iterable[str] | None = None, *, is_folded: bool = False) -> None:
    """Put lazy dense initializers, decoded when they are written, in place of packed weights; changes ``file.model``.

    Args:
        file: what ``read_packed`` gave.
        fqns: the weights to unpack; None for all.
        is_folded: store the weights of SparseLinear nodes as (K, N), so that no Transpose is left in front of their products,
            rather than in the shape of the parameter.

    Raises:
        InputError: the graph is not what the file says (names the weight and what does not fit).
    """
    names = list(file.weights if fqns is None else fqns)
    values = {str(output.name): output for node in file.model.graph for output in node.outputs}
    for fqn in names:
        tensors = _stored_tensors(file, fqn)
        if file.weights[fqn].is_sparse:
            _replace_sparse_nodes(file, fqn, tensors, is_folded=is_folded)
        else:
            _replace_decode_nodes(file, fqn, tensors, values.get(fqn))
    _tidy(file, set(names))


def _stored_tensors(file: PackedFile, fqn: str) -> tuple[ir.Value, ...]:
    """The initializers that hold a weight."""
    stored, initializers = file.weights[fqn], file.model.graph.initializers
    missing = [name for name in stored.tensors if name not in initializers]
    if missing:
        raise file.refuse(fqn, f"it has no initializer {' and '.join(missing)}")
    if stored.encoding not in ENCODINGS or len(stored.tensors) != 2:
        raise InputError(
            f"{file.path} stores {fqn} as {stored.encoding} in {len(stored.tensors)} tensors, which this mfcompile cannot "
            f"decode: it was written by a newer one. Update mfcompile"
        )
    return tuple(initializers[name] for name in stored.tensors)


def _decoded(file: PackedFile, fqn: str, tensors: tuple[ir.Value, ...], dtype: ir.DataType, *, swap: bool) -> ir.Value:
    """An initializer that is decoded when it is written: the parameter, or its transpose with ``swap``."""
    stored = file.weights[fqn]
    encoded_shape = stored.shape[::-1] if stored.is_transposed else stored.shape
    is_swapped = stored.is_transposed != swap
    shape = encoded_shape[::-1] if is_swapped else encoded_shape
    sources = [value.const_value for value in tensors]

    def load() -> ir.TensorProtocol:
        gaps, values = (_array(source) for source in sources)
        array = decode(EncodedWeight(fqn, stored.encoding, encoded_shape, dtype.numpy(), gaps.view(np.uint8), values))
        return ir.tensor(np.ascontiguousarray(array.T) if is_swapped else array, name=fqn)

    return ir.val(fqn, dtype, shape, const_value=ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=fqn))


def _array(tensor: ir.TensorProtocol | None) -> Array:
    """Its values; a mapped file is let go again."""
    assert tensor is not None  # initializers have values
    array: Array = tensor.numpy()
    return array


def _replace_decode_nodes(file: PackedFile, fqn: str, tensors: tuple[ir.Value, ...], value: ir.Value | None) -> None:
    if value is None:
        raise file.refuse(fqn, "no node gives a value of that name")
    nodes = _upstream(file, fqn, value)
    read = {item for node in nodes for item in node.inputs}
    if not set(tensors) <= read:
        raise file.refuse(fqn, f"the nodes in front of it do not read {' and '.join(file.weights[fqn].tensors)}")
    if value.dtype is None and not _is_typed(value, nodes, tensors):
        raise file.refuse(fqn, "its type cannot be told")
    assert value.dtype is not None  # told, or refused
    made = _decoded(file, fqn, tensors, value.dtype, swap=False)
    value.replace_all_uses_with(made, replace_graph_outputs=True)
    value.name = None
    file.model.graph.initializers.add(made)
    _remove_unread(file.model.graph, nodes)


def _is_typed(value: ir.Value, nodes: list[ir.Node], tensors: tuple[ir.Value, ...]) -> bool:
    """Take the type of a decoded weight from its stored values, or from the Cast that they go through."""
    cast = next((node for node in nodes if node.op_type == "Cast" and node.inputs[0] is tensors[1]), None)
    dtype = tensors[1].dtype if cast is None else ir.DataType(cast.attributes["to"].as_int())
    if dtype is not None:
        value.dtype = dtype
    return dtype is not None


def _upstream(file: PackedFile, fqn: str, value: ir.Value) -> list[ir.Node]:
    """The nodes that a value is computed by, the last first; they are refused where they are no decode nodes."""
    found: dict[ir.Node, None] = {}
    queue = [value]
    while queue:
        item = queue.pop()
        node = item.producer()
        if node is None:
            if not item.is_initializer():
                raise file.refuse(fqn, f"{item.name}, which is no stored tensor, is read by the nodes in front of it")
            continue
        if node in found:
            continue
        if node.op_type not in DECODE_OPERATORS or node.domain not in ("", "ai.onnx"):
            raise file.refuse(fqn, f"a node {node.op_type} stands among those that decode it")
        found[node] = None
        queue += [source for source in node.inputs if source is not None]
    return list(found)


def _replace_sparse_nodes(file: PackedFile, fqn: str, tensors: tuple[ir.Value, ...], *, is_folded: bool) -> None:
    graph = file.model.graph
    nodes = [node for node, index in tensors[1].uses() if index == 2]
    if not nodes or len(nodes) != len(tensors[1].uses()) or any(node.domain != DOMAIN for node in nodes):
        raise file.refuse(fqn, "other nodes than SparseLinear read its values")
    if fqn in graph.initializers:
        raise file.refuse(fqn, "an initializer of that name exists as well")
    swap = is_folded or file.weights[fqn].is_transposed
    dtypes = {_Body.of(file, fqn, node).dtype for node in nodes}
    if len(dtypes) != 1:
        raise file.refuse(fqn, "operators read it in different types")
    # A parameter that is stored transposed was (K, N) in the graph: it is the right factor as it is.
    made = _decoded(file, fqn, tensors, dtypes.pop(), swap=is_folded and not file.weights[fqn].is_transposed)
    graph.initializers.add(made)
    shared = made if swap else None
    for node in nodes:
        if shared is None:
            transpose = ir.node("Transpose", [made], {"perm": [1, 0]}, name=f"{fqn}.transposed")
            transpose.outputs[0].name = f"{fqn}.transposed"
            graph.insert_before(node, transpose)
            shared = transpose.outputs[0]
        _Body.of(file, fqn, node).put(graph, node, shared)
    _drop_unread(graph, tensors)


@dataclass
class _Body:
    """What a function computes behind its weight.

    Attributes:
        function: the function of a SparseLinear node.
        transpose: gives W^T from ``weight``.
        dtype: element type of the weight.
        made: value of the body -> value of the graph.
    """

    function: ir.Function
    transpose: ir.Node
    dtype: ir.DataType
    made: dict[ir.Value, ir.Value | None] = field(default_factory=dict)

    @classmethod
    def of(cls, file: PackedFile, fqn: str, node: ir.Node) -> _Body:
        function = file.model.functions.get(node.op_identifier())
        if function is None:
            raise file.refuse(fqn, f"the operator {node.op_type} has no function in the file")
        transposes = [item for item in function if item.op_type == "Transpose" and _name(item.inputs[0]) == WEIGHT]
        scatters = [item for item in function if item.op_type == "ConstantOfShape"]
        if len(transposes) != 1:
            raise file.refuse(fqn, f"the function {node.op_type} does not compute a value {WEIGHT!r} and its transpose")
        zero = scatters[0].attributes["value"].as_tensor() if scatters else None
        return cls(function, transposes[0], ir.DataType.FLOAT if zero is None else zero.dtype)

    def put(self, graph: ir.Graph, node: ir.Node, weight_t: ir.Value) -> None:
        """Put the nodes behind the weight in place of a node of the graph.

        Args:
            graph: the main graph.
            node: a SparseLinear node; removed.
            weight_t: (K, N).
        """
        self.made.update(zip(self.function.inputs, node.inputs, strict=False))
        self.made[self.transpose.outputs[0]] = weight_t
        outputs = dict(zip(self.function.outputs, node.outputs, strict=True))
        for item in self._behind():
            given = [ir.val(f"{node.outputs[0].name}.{output.name}", output.dtype) for output in item.outputs]
            for output, value in zip(item.outputs, given, strict=True):
                if output in outputs:
                    kept = outputs[output]
                    value.shape, value.type = kept.shape, kept.type
                    kept.replace_all_uses_with(value, replace_graph_outputs=True)
                    value.name, kept.name = kept.name, None
                self.made[output] = value
            inputs = [None if source is None else self.made[source] for source in item.inputs]
            name = f"{node.name or node.outputs[0].name}.{item.op_type}"
            made = ir.Node(item.domain, item.op_type, inputs, list(item.attributes.values()), outputs=given, name=name)
            graph.insert_before(node, made)
        graph.remove(node, safe=True)

    def _behind(self) -> list[ir.Node]:
        """The nodes that the outputs need and that do not lead to the weight, in order."""
        needed, queue = set(), [value.producer() for value in self.function.outputs]
        while queue:
            node = queue.pop()
            if node is None or node in needed or node is self.transpose:
                continue
            needed.add(node)
            queue += [source.producer() for source in node.inputs if source is not None]
        return [node for node in self.function if node in needed]


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _remove_unread(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Remove those of the nodes that nobody reads any more, and then the initializers that only they read."""
    waiting = list(nodes)
    sources = {source for node in nodes for source in node.inputs if source is not None}
    while unread := [node for node in waiting if not any(map(_is_read, node.outputs))]:
        graph.remove(unread, safe=True)
        waiting = [node for node in waiting if node not in unread]
    _drop_unread(graph, sources)


def _drop_unread(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    for value in values:
        if value.is_initializer() and not _is_read(value) and not value.is_graph_input():
            graph.initializers.pop(str(value.name), None)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _tidy(file: PackedFile, unpacked: set[str]) -> None:
    """Remove functions and entries of metadata that nothing needs any more."""
    model = file.model
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    for identifier in [key for key in model.functions if key[0] == DOMAIN and key not in used]:
        del model.functions[identifier]
    if not any(identifier[0] == DOMAIN for identifier in used):
        model.graph.opset_imports.pop(DOMAIN, None)
    left = {fqn: stored for fqn, stored in file.weights.items() if fqn not in unpacked}
    if left:
        model.metadata_props[WEIGHTS_KEY] = describe_weights(left)
        return
    model.metadata_props.pop(WEIGHTS_KEY, None)
    model.metadata_props[FORMAT_KEY] = "dense"


def unpack_onnx(path: Path, output: Path, *, overwrite: bool = False, external_data: bool | None = None) -> tuple[Path, ...]:
    """Write the dense file that a packed one stands for, complete or not at all, with one weight in memory at a time.

    Its tensors are those of an export with ``format="dense"``, bit for bit and under the same names.

    Args:
        path: the packed .onnx file.
        output: the .onnx file to write; tensors lie in ``<output>.data`` where they exceed 1.5 GB.
        overwrite: replace a file that is there.
        external_data: True writes ``<output>.data`` in any case, False never.

    Returns:
        The files that were written.

    Raises:
        InputError: there is no packed weight in the file, it was changed, or the output cannot be written.
        ExportError: writing failed, or the result does not pass onnx.checker.
    """
    if output.suffix != ".onnx":
        raise InputError(f"the output {output} does not end in .onnx. Give the file to write, such as {output.name}.onnx")
    if output.exists() and not overwrite:
        raise InputError(
            f"the output {output} exists already. Nothing was written; choose another, or let it be replaced (--overwrite)"
        )
    file = read_packed(path)
    sources = {path.resolve(), *(Path(item.path).resolve() for item in _external(file.model))}
    if sources & {output.resolve(), data_path(output).resolve()}:
        raise InputError(f"{output} is (a part of) the file that is unpacked: write to another one")
    if not file.weights:
        raise _nothing_packed(file)
    make_dense(file)
    _refuse_layers(file)
    tensors = (value.const_value for value in file.model.graph.initializers.values())
    is_external = needs_external_data(item for item in tensors if item is not None) if external_data is None else external_data
    layout = plan_files(file.model, data_path(output).name if is_external else None)
    return publish_files(layout, output, has_data_file=is_external, check=_check)


def _refuse_layers(file: PackedFile) -> None:
    left = sorted({node.op_type for node in file.model.graph.all_nodes() if node.domain == DOMAIN})
    if left:
        raise InputError(
            f"{file.path} has layers of {' and '.join(left)}, which are not unpacked: export the model with --format dense "
            f"instead"
        )


def _nothing_packed(file: PackedFile) -> InputError:
    """What to say of a file that names no packed weight: it is dense, unless something in it decodes or multiplies by one."""
    if INT8_KEY in file.model.metadata_props:
        _refuse_layers(file)
    nodes = list(file.model.graph.all_nodes())
    if any(node.op_type == "ScatterElements" or node.domain == DOMAIN for node in nodes):
        return InputError(
            f"{file.path} names no packed weight, but has operators that read one: it was packed by an older mfcompile, or "
            f"changed after its export. Export it again"
        )
    return InputError(f"{file.path} holds no packed weight: it is dense as it is, and there is nothing to unpack")


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return [item for item in tensors if isinstance(item, ir.ExternalTensor)]


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(
            f"the unpacked file does not pass onnx.checker: {first_line(error)}. Nothing was kept; the packed file was changed "
            f"after its export, or this is a bug"
        ) from error
