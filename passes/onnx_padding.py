"""Padding followed through an ONNX graph, by further nodes in the graph: which elements come from padding tokens.

A mark is a float tensor of ones (padding) and zeros with the rank of the value that it speaks of and sizes that broadcast
to it. Every node that reads a marked value gets a node, or a few, that mark its result; onnxruntime computes them with the
sizes of the batch at hand. The rules are those of ``padding_flow``:

* what only moves elements moves their marks in the same way;
* elementwise operators mark what any operand marks;
* reductions, and the summed dimension of a product, mark what is padding throughout; an attention has the rows of its queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from mfcompile.graph import Diagnostic, TensorValue

PREFIX = "mfcompile.padding/"

_AXES_AS_INPUT = {"ReduceSum": 13, "Unsqueeze": 13, "ReduceMin": 18, "ReduceMax": 18}
"""From which opset on an operator takes its axes as an operand."""


class NodeWriter:
    """Appends nodes to a graph, in the forms that its opset knows.

    Args:
        model: the model that is written to.
        prefix: what the names of all new values begin with.
    """

    def __init__(self, model: onnx.ModelProto, prefix: str) -> None:
        self.graph = model.graph
        self.opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 1)
        self._prefix = prefix
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._count = 0

    def add(self, op_type: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """A node of one output; its name."""
        output = self.name()
        node = onnx.helper.make_node(op_type, list(inputs), [output], domain=domain, **attributes)
        self.graph.node.append(node)
        return output

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str]) -> list[str]:
        """The same operator with the same attributes, on other operands."""
        twin = onnx.NodeProto()
        twin.op_type, twin.domain = node.op_type, node.domain
        twin.input.extend(inputs)
        twin.output.extend(self.name() for _ in node.output)
        twin.attribute.extend(node.attribute)
        self.graph.node.append(twin)
        return list(twin.output)

    def over(self, op_type: str, value: str, axes: Sequence[int], **attributes: Any) -> str:
        """An operator with axes, which are an operand or an attribute."""
        if self.opset >= _AXES_AS_INPUT[op_type]:
            return self.add(op_type, [value, self.constant(np.array(axes, np.int64))], **attributes)
        return self.add(op_type, [value], axes=list(axes), **attributes)

    def constant(self, array: NDArray[Any]) -> str:
        """An initializer; equal ones are one."""
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self.name()
            self.graph.initializer.append(onnx.numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def name(self) -> str:
        """A name that is new."""
        self._count += 1
        return f"{self._prefix}{self._count}"


@dataclass(frozen=True)
class _Step:
    """One node that reads marked values."""

    node: onnx.NodeProto
    marks: tuple[str | None, ...]
    result: tuple[int, ...]


class PaddingMarks:
    """Writes the marks of a graph.

    Args:
        model: the model that gets further nodes.
        values: value -> its sizes in the example, and dtype.
    """

    def __init__(self, model: onnx.ModelProto, values: Mapping[str, TensorValue]) -> None:
        self.writer = NodeWriter(model, PREFIX)
        self._values = values
        self._numbers = {item.name: item for item in model.graph.initializer if item.data_type == onnx.TensorProto.INT64}
        self._nodes = list(model.graph.node)
        self._marks: dict[str, str] = {}
        self._lost: Counter[str] = Counter()

    def begin(self, tokens: str, mask_input: str, mask_rank: int) -> None:
        """The padding of one token input is given as a further input of the graph, (batch, length) ones and zeros."""
        missing = len(self._values[tokens].shape) - mask_rank
        mark = mask_input
        if missing > 0:
            mark = self.writer.over("Unsqueeze", mark, range(mask_rank, mask_rank + missing))
        self._marks[tokens] = mark

    def follow(self) -> None:
        """Mark the results of all nodes."""
        for node in self._nodes:
            marks = tuple(self._marks.get(name) for name in node.input)
            if any(marks):
                self._follow(node, marks)

    def mark(self, value: str) -> str | None:
        """Name of the marks of a value; None when no element of it is padding."""
        return self._marks.get(value)

    def full(self, value: str, mark: str | None) -> str:
        """Marks of all sizes of a value."""
        thin = self.writer.constant(np.zeros((), np.float32)) if mark is None else mark
        return self.writer.add("Expand", [thin, self.writer.add("Shape", [value])])

    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Operators behind which padding could not be told from tokens."""
        return tuple(
            Diagnostic(name, f"padding could not be followed through it ({count} times): all rows behind it count as tokens")
            for name, count in self._lost.items()
        )

    def _follow(self, node: onnx.NodeProto, marks: tuple[str | None, ...]) -> None:
        known = [name for name in node.output if name in self._values]
        if node.op_type in _SILENT or not known or self._values[known[0]].dtype == torch.bool:
            return
        result = self._values[known[0]].shape
        rule = _RULES.get(node.op_type, _elementwise)
        found = rule(self, _Step(node, marks, result))
        if found is None:
            self._lost[node.op_type] += 1
            return
        for name, mark in zip(node.output, found, strict=False):
            if name and mark:
                self._marks[name] = mark

    def shape(self, value: str) -> tuple[int, ...]:
        """Sizes in the example."""
        return self._values[value].shape if value in self._values else ()

    def numbers(self, name: str) -> list[int] | None:
        """The numbers of a stored tensor."""
        item = self._numbers.get(name)
        return None if item is None else [int(number) for number in onnx.numpy_helper.to_array(item).reshape(-1)]

    def any_of(self, marks: Sequence[str]) -> str:
        """Marked where one of them is."""
        return marks[0] if len(marks) == 1 else self.writer.add("Max", marks)

    def lifted(self, mark: str, rank: int, wanted: int) -> str:
        """The mark with dimensions of size one in front, up to a rank."""
        return mark if rank >= wanted else self.writer.over("Unsqueeze", mark, range(wanted - rank))

    def all_over(self, mark: str, axes: Sequence[int], keepdims: int = 1) -> str:
        """Marked where all along these dimensions is."""
        return self.writer.over("ReduceMin", mark, list(axes), keepdims=keepdims)


_Rule = Callable[[PaddingMarks, _Step], "list[str | None] | None"]


def _elementwise(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    """Of the sizes of the result, or broadcast to it; an operator that changes the last dimension keeps rows."""
    rank = len(step.result)
    found = []
    for name, mark in zip(step.node.input, step.marks, strict=True):
        if mark is None:
            continue
        shape = marks.shape(name)
        if _broadcasts(shape, step.result):
            found.append(marks.lifted(mark, len(shape), rank))
        elif shape[:-1] == step.result[:-1]:
            found.append(marks.all_over(mark, [len(shape) - 1]))
        else:
            return None
    return [marks.any_of(found)]


def _broadcasts(shape: Sequence[int], onto: Sequence[int]) -> bool:
    return len(shape) <= len(onto) and all(old in (1, new) for old, new in zip(reversed(shape), reversed(onto), strict=False))


def _reshape(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    if step.marks[0] is None:
        return [None]
    target = marks.writer.add("Shape", [step.node.output[0]])
    return [marks.writer.add("Reshape", [marks.full(step.node.input[0], step.marks[0]), target], **_allow_zero(marks))]


def _allow_zero(marks: PaddingMarks) -> dict[str, Any]:
    return {"allowzero": 1} if marks.writer.opset >= 14 else {}


def _move_first(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    """The first operand holds elements, the others say where they go."""
    if step.marks[0] is None:
        return [None]
    full = marks.full(step.node.input[0], step.marks[0])
    return list(marks.writer.copy(step.node, [full, *step.node.input[1:]]))


def _transpose(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    return [None] if step.marks[0] is None else list(marks.writer.copy(step.node, [step.marks[0]]))


def _expand(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    mark = step.marks[0]
    return [None] if mark is None else [marks.lifted(mark, len(marks.shape(step.node.input[0])), len(step.result))]


def _move_all(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    """All operands hold elements."""
    return list(marks.writer.copy(step.node, [marks.full(*pair) for pair in zip(step.node.input, step.marks, strict=True)]))


def _scatter(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    data, index, updates = step.node.input
    moved = [marks.full(data, step.marks[0]), index, marks.full(updates, step.marks[2])]
    return list(marks.writer.copy(step.node, moved))


def _gather(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    """A look-up of padding tokens gives padding; elements that are taken from marked ones keep their marks."""
    data, index = step.node.input
    if step.marks[0] is not None:
        return list(marks.writer.copy(step.node, [marks.full(data, step.marks[0]), index]))
    mark = step.marks[1]
    assert mark is not None  # one operand is marked
    axis = next((item.i for item in step.node.attribute if item.name == "axis"), 0) % max(len(marks.shape(data)), 1)
    rank = len(marks.shape(index))
    behind = range(axis + rank, len(marks.shape(data)) - 1 + rank)
    axes = [*range(axis), *behind]
    return [marks.writer.over("Unsqueeze", mark, axes) if axes else mark]


def _flip(step: _Step, name: str) -> bool:
    return any(item.name == name and item.i for item in step.node.attribute)


def _product(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    """Rows of the first operand, columns of the second."""
    found = []
    for place, (name, mark) in enumerate(zip(step.node.input[:2], step.marks[:2], strict=True)):
        rank = len(marks.shape(name))
        if mark is None:
            continue
        if rank < 2:
            return None
        if _flip(step, "transA" if place == 0 else "transB"):
            order = [*range(rank - 2), rank - 1, rank - 2]
            mark = marks.writer.add("Transpose", [mark], perm=order)
        summed = rank - 1 if place == 0 else rank - 2
        found.append(marks.lifted(marks.all_over(mark, [summed]), rank, len(step.result)))
    return [marks.any_of(found)] if found else [None]


def _reduce(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    if step.marks[0] is None:
        return [None]
    given = {item.name: onnx.helper.get_attribute_value(item) for item in step.node.attribute}
    axes = given.get("axes")
    if step.node.op_type.startswith("Arg"):
        axes = [given.get("axis", 0)]
    elif len(step.node.input) > 1 and step.node.input[1]:
        axes = marks.numbers(step.node.input[1])
        if axes is None:
            return None
    if not axes:
        return [None]
    rank = len(marks.shape(step.node.input[0]))
    full = marks.full(step.node.input[0], step.marks[0])
    return [marks.all_over(full, [axis % rank for axis in axes], given.get("keepdims", 1))]


def _queries(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    mark = step.marks[0]
    rank = len(marks.shape(step.node.input[0]))
    return [None] if mark is None else [marks.all_over(mark, [rank - 1])] if rank == len(step.result) else None


def _einsum(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    """Letters that are summed must be padding throughout; the others stay where they are."""
    equation = next((item.s.decode() for item in step.node.attribute if item.name == "equation"), "")
    terms, _, result = equation.replace(" ", "").partition("->")
    if "." in terms or not result:
        return None
    found = []
    for letters, mark in zip(terms.split(","), step.marks, strict=True):
        if mark is None:
            continue
        summed = [place for place, letter in enumerate(letters) if letter not in result]
        left = [letter for letter in letters if letter in result]
        if summed:
            mark = marks.all_over(mark, summed, 0)
        if left:
            mark = marks.writer.add(
                "Transpose", [mark], perm=sorted(range(len(left)), key=lambda place: result.index(left[place]))
            )
        missing = [place for place, letter in enumerate(result) if letter not in left]
        found.append(marks.writer.over("Unsqueeze", mark, missing) if missing else mark)
    return [marks.any_of(found)]


def _first_two(marks: PaddingMarks, step: _Step) -> list[str | None] | None:
    """A norm of a sum: its fourth output is the sum."""
    found = [mark for mark in step.marks[:2] if mark is not None]
    return [marks.any_of(found), None, None, marks.any_of(found)] if found else [None]


_SILENT = frozenset(
    {"Shape", "Size", "NonZero", "ConstantOfShape", "Range", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Not",
     "And", "Or", "Xor", "IsNaN", "IsInf", "EyeLike"}
)  # fmt: skip
"""Operators whose result has no elements of their operands."""

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Slice", "Split", "Tile", "Pad", "GatherElements", "GatherND"), _move_first),
    **dict.fromkeys(("MatMul", "FusedMatMul", "Gemm"), _product),
    **dict.fromkeys(("ScatterND", "ScatterElements"), _scatter),
    **dict.fromkeys(
        ("ArgMax", "ArgMin", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd"), _reduce
    ),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention"), _queries),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _first_two),
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _move_all,
    "Gather": _gather,
    "Einsum": _einsum,
}
