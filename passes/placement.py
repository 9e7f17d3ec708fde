"""Where in its parameter an operand lies: which rows of which matrices, judged by offset and strides alone.

A parameter reaches the operator that multiplies it through transposes, slices, splits and reshapes. Shapes cannot tell
which way round a square weight is stored, names are not asked; where the elements lie in memory does tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mfcompile.passes.operands import Pairing
from mfcompile.region import Reading, WeightLayout


@dataclass(frozen=True)
class Placement:
    """The part of a parameter that an operand is.

    Attributes:
        layout: what the dimensions of the parameter count.
        rows: output rows, [start, stop), of every expert.
        experts: experts, [start, stop); (0, 1) for a single matrix.
        order: positions of the contracted dimensions that were asked about, in the order of the weight's inputs.
        batch: positions of the batch dimensions that really run over experts (not over copies of one matrix).
    """

    layout: WeightLayout
    rows: tuple[int, int]
    experts: tuple[int, int]
    order: tuple[int, ...]
    batch: tuple[int, ...]


def locate_operand(
    operand: Tensor, contracted: Sequence[int], parameter: Tensor, batch: Sequence[int] = ()
) -> Placement | None:
    """Which output rows of which matrices of a parameter an operand is.

    Args:
        operand: the tensor that is multiplied. Dimensions that are neither contracted nor batch are outputs (heads and
            their width, say), or copies for each sample.
        contracted: dimensions of the operand that are summed over, counted from the end.
        parameter: the stored weight, dense in memory; shares its storage with the operand.
        batch: dimensions of the operand along which the activation changes as well, counted from the end.

    Returns:
        None when the operand is no block of whole rows, or does not sum over whole inputs.
    """
    asked = {dim % operand.ndim for dim in (*contracted, *batch) if -dim <= operand.ndim}
    if operand.ndim < 2 or len(asked) < len(contracted) + len(batch):
        return None
    frame = _Frame.of(parameter, int(operand.storage_offset()) - int(parameter.storage_offset()))
    if frame is None:
        return None
    summed, along = ([dim % operand.ndim for dim in dims] for dims in (contracted, batch))
    rest = [dim for dim in range(operand.ndim) if dim not in asked]
    found = [_cover(frame, _merged(operand, dims)) for dims in (summed, rest, along)]
    if found[0] is None or found[1] is None or found[2] is None:
        return None
    inputs, outputs, experts = found[0], found[1], found[2]
    if any(not part.is_whole for part in inputs.values()):
        return None
    covered = {*inputs, *outputs, *experts}
    left = [dim for dim in range(parameter.ndim) if parameter.shape[dim] > 1 and dim not in covered]
    if not outputs and left:
        outputs = {left[-1]: frame.single(left.pop())}
    experts.update({dim: frame.single(dim) for dim in left})
    layout = _layout(parameter.shape, inputs, outputs, experts)
    if layout is None:
        return None
    rows, matrices = _range(parameter.shape, layout.outputs, outputs), _range(parameter.shape, layout.experts, experts)
    if rows is None or matrices is None:
        return None
    order = sorted(range(len(summed)), key=lambda index: -operand.stride(summed[index]))
    runs = tuple(index for index, dim in enumerate(along) if operand.stride(dim) > 0 and operand.shape[dim] > 1)
    return Placement(layout, rows, matrices, tuple(order), runs)


@dataclass(frozen=True)
class _Part:
    """What is used of one dimension of a parameter."""

    start: int
    stop: int
    is_whole: bool


@dataclass(frozen=True)
class _Frame:
    """A parameter's dimensions of more than one element, innermost in memory first, and where an operand starts in them.

    Attributes:
        dims: (dimension, size, step), by step.
        starts: dimension -> index at which the operand starts.
    """

    dims: tuple[tuple[int, int, int], ...]
    starts: dict[int, int]

    @classmethod
    def of(cls, parameter: Tensor, offset: int) -> _Frame | None:
        """The frame; None where the parameter is not dense or the operand starts outside."""
        sizes = enumerate(zip(parameter.shape, parameter.stride(), strict=True))
        dims = sorted(((dim, size, step) for dim, (size, step) in sizes if size > 1), key=lambda item: item[2])
        expected, starts = 1, {}
        for dim, size, step in dims:
            if step != expected:
                return None
            starts[dim] = offset // step % size
            expected = size * step
        return cls(tuple(dims), starts) if 0 <= offset < expected else None

    def single(self, dim: int) -> _Part:
        """The one index of a dimension that was selected away."""
        return _Part(self.starts[dim], self.starts[dim] + 1, is_whole=False)


def _merged(operand: Tensor, dims: Iterable[int]) -> list[tuple[int, int]]:
    """(size, step) of the given dimensions by step, neighbours in memory as one; copies (step 0) do not count."""
    listed = sorted((operand.stride(dim), operand.shape[dim]) for dim in dims if operand.shape[dim] > 1 and operand.stride(dim))
    merged: list[tuple[int, int]] = []
    for step, size in listed:
        if merged and step == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((step, size))
    return [(size, step) for step, size in merged]


def _cover(frame: _Frame, segments: Iterable[tuple[int, int]]) -> dict[int, _Part] | None:
    """Dimension -> what the segments use of it; None where they use something else than ranges."""
    found: dict[int, _Part] = {}
    for size, step in segments:
        left = size
        for dim, length, dim_step in frame.dims:
            if left == 1 or dim_step < step:
                continue
            if dim in found or (left == size and dim_step != step):
                return None
            start = frame.starts[dim]
            if left < length:
                if start + left > length:
                    return None
                found[dim] = _Part(start, start + left, is_whole=False)
                left = 1
            elif left % length or start:
                return None
            else:
                found[dim] = _Part(0, length, is_whole=True)
                left //= length
        if left != 1:
            return None
    return found


def _layout(shape: Sequence[int], inputs: Iterable[int], outputs: Iterable[int], experts: Iterable[int]) -> WeightLayout | None:
    """What every dimension counts; one of size one counts with its neighbours. None without inputs or outputs."""
    kinds: dict[int, str] = {dim: kind for kind, dims in zip("ioe", (inputs, outputs, experts), strict=True) for dim in dims}
    single = [dim for dim in range(len(shape)) if dim not in kinds]
    for kind, pick in (("i", -1), ("o", 0)):
        if kind not in kinds.values():
            if not single:
                return None
            kinds[single.pop(pick)] = kind
    for dim in single:
        kinds[dim] = kinds.get(dim - 1) or next(kinds[other] for other in range(dim + 1, len(shape)) if other in kinds)
    ordered = {kind: tuple(dim for dim in sorted(kinds) if kinds[dim] == kind) for kind in "ioe"}
    return WeightLayout(ordered["o"], ordered["i"], ordered["e"])


def _range(shape: Sequence[int], dims: Sequence[int], parts: dict[int, _Part]) -> tuple[int, int] | None:
    """The used parts of several dimensions as one range; None where they leave holes."""
    start, stop = 0, 1
    for dim in dims:
        part = parts.get(dim, _Part(0, shape[dim], is_whole=True))
        if stop - start > 1 and not part.is_whole:
            return None
        start, stop = start * shape[dim] + part.start, (stop - 1) * shape[dim] + part.stop
    return start, stop


@dataclass(frozen=True)
class Match:
    """A contraction read as a weight that meets an activation; see WeightUse for the fields that they share.

    Attributes:
        routed_by: node or tensor that says which rows meet which expert, or None.
    """

    layout: WeightLayout
    rows: tuple[int, int]
    experts: tuple[int, int]
    reading: Reading
    routed_by: Any = None


def match(pairing: Pairing, operand: Tensor, parameter: Tensor, gathered_by: Any = None) -> Match | None:
    """How a contraction uses a stored weight.

    Args:
        pairing: what it multiplies by what.
        operand: where the operand that may be the weight lies in the parameter.
        parameter: the stored weight.
        gathered_by: the indices that picked matrices along dimension 0 of the parameter; the operand then has step 0
            along their dimensions.

    Returns:
        None when the operand is no block of whole rows, or rows and experts meet in another way than is known here.
    """
    found = locate_operand(operand, pairing.contracted, parameter, pairing.batch)
    if found is None:
        return None
    asked = pairing.reading
    features = tuple(asked.features[index] for index in found.order)
    count = found.layout.sizes(parameter.shape)[0]
    if asked.routing:
        whole = gathered_by is None and found.experts == (0, count)
        return (
            Match(found.layout, found.rows, found.experts, replace(asked, features=features), pairing.ends) if whole else None
        )
    if gathered_by is not None:
        copied = [dim - operand.ndim for dim in range(operand.ndim) if not operand.stride(dim) and operand.shape[dim] > 1]
        if found.batch or found.layout.experts not in ((0,), ()) or not set(copied) <= set(pairing.batch):
            return None
        experts = tuple(place for place, dim in zip(asked.experts, pairing.batch, strict=True) if not operand.stride(dim))
        return Match(found.layout, found.rows, (0, count), Reading(features, experts, "index"), gathered_by)
    if len(found.batch) > 1:
        return None
    experts = tuple(asked.experts[index] for index in found.batch)
    return Match(found.layout, found.rows, found.experts, Reading(features, experts, patches=asked.patches))
