"""Calibration of an ONNX file: onnxruntime computes the sums itself, as further outputs of the graph.

::

    x --> MatMul(x, w)       ==>      x --> MatMul(x, w)
                                       \\-> Mul(x, x) -> [Where(token, ., 0)] -> Cast(double) -> ReduceSum -> (in_features,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from mfcompile.errors import CalibrationError, MfcompileError
from mfcompile.graph import CapturedGraph, Diagnostic, TensorValue
from mfcompile.inputs import ExampleInputs
from mfcompile.onnx_file import OnnxFile
from mfcompile.onnx_inputs import describe_inputs
from mfcompile.passes.observers import StatisticsCollector
from mfcompile.passes.onnx_padding import PREFIX, NodeWriter, PaddingMarks
from mfcompile.passes.padding import PaddingPlan
from mfcompile.passes.reduction import Reduction, read, reduce_activation
from mfcompile.passes.routing import reduce_routed
from mfcompile.region import RegionMap, WeightUse
from mfcompile.session import make_feeds, run_session

_OUTPUTS = "mfcompile.observed/"


@dataclass(frozen=True)
class _Observation:
    """One activation, and what is asked of it.

    Attributes:
        uses: the uses that read it in the same way.
        value: output with the activation itself, where that is asked for.
        is_swapped: its last two dimensions trade places before it is used.
        sums: output with the sums of squares, None where the activation itself is an output.
        tokens: output with the number of rows that are no padding, None where all are.
        marks: output with the marks of the activation itself.
        routing: output that says which rows meet which expert.
        shape: output with its sizes.
    """

    uses: tuple[WeightUse, ...]
    value: str
    is_swapped: bool
    sums: str | None
    tokens: str | None
    marks: str | None
    routing: str | None
    shape: str


class OnnxRunner:
    """Runs one batch after another through the observed graph.

    Args:
        captured: a captured ONNX file.
        regions: its regions.
        collector: where the sums go.
        plan: where padding is.

    Attributes:
        observed_by: {"onnxruntime"}.
        diagnostics: where padding could not be followed.
    """

    def __init__(self, captured: CapturedGraph, regions: RegionMap, collector: StatisticsCollector, plan: PaddingPlan) -> None:
        assert isinstance(captured.module, OnnxFile)  # the front end is onnx
        self.observed_by = {"onnxruntime"}
        self._file, self._captured, self._collector = captured.module, captured, collector
        self._nodes = {node.name: node for node in captured.graph.nodes}
        self._masks = plan.masks
        model = onnx.ModelProto()
        model.CopyFrom(self._file.proto)
        marks = self._mark_padding(model, plan)
        self.diagnostics: tuple[Diagnostic, ...] = marks.diagnostics()
        self._observations = self._observe(model, regions, marks)
        self._session = self._file.open(model) if self._observations else None

    def run(self, inputs: ExampleInputs, index: int) -> None:
        """One forward pass.

        Raises:
            CalibrationError: onnxruntime failed on the batch.
        """
        tensors = inputs.tensors()
        if self._session is None:  # no weight wants statistics
            self._collector.begin_batch(tensors)
            self._collector.end_batch()
            return
        extra = {PREFIX + item.tokens: item.padding(tensors[item.mask]).float() for item in self._masks}
        fed = ExampleInputs((), {**tensors, **extra}, (*tensors, *extra))
        try:
            feeds, _ = make_feeds(self._session, fed)
            found = run_session(self._session, feeds)
        except MfcompileError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"onnxruntime failed on calibration batch {index} ({describe_inputs(inputs)}): {error}"
            ) from error
        self._collector.begin_batch(tensors)
        for item in self._observations:
            self._add(item, found)
        self._collector.end_batch()

    def _mark_padding(self, model: onnx.ModelProto, plan: PaddingPlan) -> PaddingMarks:
        values = {
            node.meta["onnx_value"]: node.meta["val"]
            for node in self._captured.graph.nodes
            if "onnx_value" in node.meta and isinstance(node.meta.get("val"), TensorValue)
        }
        marks = PaddingMarks(model, values)
        for item in plan.masks:
            rank = len(values[item.mask].shape)
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(PREFIX + item.tokens, onnx.TensorProto.FLOAT, [None] * rank)
            )
            marks.begin(item.tokens, PREFIX + item.tokens, rank)
        marks.follow()
        return marks

    def _observe(self, model: onnx.ModelProto, regions: RegionMap, marks: PaddingMarks) -> list[_Observation]:
        groups: dict[Any, list[WeightUse]] = {}
        for fqn in self._collector.by_fqn:
            for use in regions.evidence.get(fqn, ()):
                is_raw = fqn in self._collector.repeated or not _is_plain(use)
                route = (use.routed_by, use.experts) if is_raw else None
                groups.setdefault((use.activation, use.reading, is_raw, route), []).append(use)
        del model.graph.output[:]
        writer = NodeWriter(model, _OUTPUTS)
        observations = []
        present: set[str] = set()
        for (activation, reading, is_raw, _), uses in groups.items():
            value, is_swapped = self._value_of(activation)
            copy = value
            mark = marks.mark(value)
            shape = writer.add("Shape", [value])
            sums = tokens = raw_marks = routing = None
            if is_raw:
                copy = writer.add("Identity", [value])
                present.add(copy)
                raw_marks = marks.full(value, mark) if mark is not None else None
                routing = writer.add("Identity", [self._value_of(uses[0].routed_by)[0]]) if uses[0].routed_by else None
            else:
                dim = reading.features[0] if not is_swapped else -3 - reading.features[0]
                sums, tokens = self._sum(writer, marks, value, mark, dim)
            present |= {name for name in (shape, sums, tokens, raw_marks, routing) if name is not None}
            observations.append(_Observation(tuple(uses), copy, is_swapped, sums, tokens, raw_marks, routing, shape))
        for name in sorted(present):
            model.graph.output.add(name=name)
        return observations

    def _sum(self, writer: NodeWriter, marks: PaddingMarks, value: str, mark: str | None, dim: int) -> tuple[str, str | None]:
        """Outputs with the sums of squares along a dimension, and with the number of rows that count."""
        rank = len(marks.shape(value))
        others = [axis for axis in range(rank) if axis != dim % rank]
        wide = writer.add("Cast", [value], to=onnx.TensorProto.FLOAT)
        squares = writer.add("Mul", [wide, wide])
        tokens = None
        if mark is not None:
            rows = marks.all_over(marks.full(value, mark), [dim % rank])
            keep = writer.add("Less", [rows, writer.constant(np.array(0.5, np.float32))])
            squares = writer.add("Where", [keep, squares, writer.constant(np.zeros((), np.float32))])
            counted = writer.add("Cast", [keep], to=onnx.TensorProto.DOUBLE)
            tokens = writer.over("ReduceSum", counted, range(rank), keepdims=0)
        doubled = writer.add("Cast", [squares], to=onnx.TensorProto.DOUBLE)
        return (writer.over("ReduceSum", doubled, others, keepdims=0) if others else doubled), tokens

    def _value_of(self, name: str | None) -> tuple[str, bool]:
        """Name in the file of what a node computes, and whether the node turned it."""
        node = self._nodes[str(name)]
        if "onnx_value" in node.meta:
            return str(node.meta["onnx_value"]), False
        return str(node.all_input_nodes[0].meta["onnx_value"]), True

    def _add(self, item: _Observation, found: dict[str, Tensor]) -> None:
        sizes = [int(size) for size in found[item.shape]]
        use = item.uses[0]
        reduction: Any
        if item.sums is not None:
            dim = use.reading.features[0]
            leading = sizes[:-1] if dim == -1 or item.is_swapped else [*sizes[:-2], sizes[-1]]
            rows = int(np.prod(leading)) if leading else 1
            samples = leading[0] if len(leading) > 1 else 1
            batch = self._collector.batch_size
            if len(leading) == 1 and batch and leading[0] % batch == 0:
                samples = batch
            counted = rows if item.tokens is None else round(float(found[item.tokens]))
            reduction = Reduction(found[item.sums], counted, rows - counted, samples)
        else:
            reduction = self._reduce(item, found)
        for each in item.uses:
            self._collector.add(each.fqn, each.rows, each.experts, reduction)

    def _reduce(self, item: _Observation, found: dict[str, Tensor]) -> Any:
        """Reduce an activation that is an output itself."""
        use = item.uses[0]
        activation = found[item.value].mT if item.is_swapped else found[item.value]
        keep = None
        if item.marks is not None and use.reading.patches is None:
            marked = found[item.marks].mT if item.is_swapped else found[item.marks]
            for dim in sorted((dim % marked.ndim for dim in use.reading.features), reverse=True):
                marked = marked.amin(dim)
            keep = marked < 0.5 if bool((marked > 0.5).any()) else None
        activation = read(activation, use.reading)
        parameter = self._captured.parameter(use.fqn)
        if use.layout.experts:
            routing = None if item.routing is None else found[item.routing]
            return reduce_routed(activation, use.reading, use.layout.sizes(parameter.shape)[0], routing, keep)
        by_sample = use.fqn in self._collector.repeated
        return reduce_activation(
            activation, use.reading.features, keep, batch_size=self._collector.batch_size, by_sample=by_sample
        )


def _is_plain(use: WeightUse) -> bool:
    """One dimension of features, one matrix, rows as they are."""
    reading = use.reading
    return (
        len(reading.features) == 1
        and reading.features[0] in (-1, -2)
        and not (reading.experts or reading.routing or reading.patches or use.layout.experts)
    )
