"""What pruning does to a model's outputs: the relative error of every output tensor against the dense model's.

A float output is compared by ||pruned - dense|| / ||dense||, L2 over all batches, in float64. An integer or bool output is
compared by the fraction of its elements that differ. Left out are elements of padding tokens (followed through the model,
as in calibration), elements that the dense model fills with NaN, infinity or the largest number of its type (masked
logits), and outputs that are zero everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt

import torch
from torch import Tensor, nn

from mfcompile.errors import CalibrationError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import ExampleInputs, output_tensors
from mfcompile.module_copy import share_weights_copy
from mfcompile.passes.calibration import plan_padding
from mfcompile.passes.padding_flow import PaddingTracker
from mfcompile.passes.random_numbers import seeded
from mfcompile.region import RegionMap
from mfcompile.undisturbed import undisturbed

MOST_KEPT_BYTES = 512 * 2**20
"""Dense outputs beyond these are computed again for every pruned model."""

_PIECE = 2**22
"""Elements that are compared at a time."""


@dataclass(frozen=True)
class ComparedOutput:
    """An output tensor of the dense model.

    Attributes:
        name: its name.
        kind: "float", or "integer" (bool too).
        elements: elements that are compared, over all batches.
        left_out: elements that are not: of padding, or fillers.
    """

    name: str
    kind: str
    elements: int
    left_out: int


@dataclass(frozen=True)
class OutputErrors:
    """Errors of one pruned model.

    Attributes:
        by_output: output -> its error; infinite where the pruned model gives NaN or infinity, or other sizes.
        overall: mean over the float outputs, or over the integer ones where there are no float ones.
    """

    by_output: Mapping[str, float]
    overall: float


@dataclass
class _Sums:
    """What was seen of one output."""

    is_float: bool
    difference: float = 0.0
    reference: float = 0.0
    elements: int = 0
    left_out: int = 0

    @property
    def error(self) -> float:
        if not self.is_float:
            return self.difference / self.elements
        return sqrt(self.difference / self.reference)


@dataclass
class _Outputs:
    """Outputs of one batch, and of the dense model which of their elements count (None: all)."""

    values: dict[str, Tensor]
    counted: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        tensors = (*self.values.values(), *(item for item in self.counted.values() if item is not None))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class DenseOutputs:
    """The outputs of a dense model on some batches, to compare pruned models with.

    Both models run in eval mode, and draw the same random numbers where they draw any. The given module is left as it was.

    Args:
        captured: the dense model.
        regions: its regions, for its padding masks.
        batches: inputs to compare on.
        padding_mask: name of the mask input of the text; None finds it by convention and shape.
        seed: of random numbers that a model draws.
        most_kept_bytes: keep at most this much of the dense outputs; the rest is computed again for every pruned model.

    Attributes:
        outputs: what is compared.
        ignored: outputs that are not, and why; operators that padding was not followed through.

    Raises:
        CalibrationError: the model fails on a batch, or gives no tensor.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        regions: RegionMap,
        batches: Sequence[ExampleInputs],
        *,
        padding_mask: str | None = None,
        seed: int = 0,
        most_kept_bytes: int = MOST_KEPT_BYTES,
    ) -> None:
        self._module = _copy(captured.module)
        self._batches, self._seed = list(batches), seed
        self._masks = plan_padding(captured, regions, padding_mask).masks
        self._kept: dict[int, _Outputs] = {}
        lost: dict[str, Diagnostic] = {}
        sums: dict[str, _Sums] = {}
        room = most_kept_bytes
        for index in range(len(self._batches)):
            dense = self._dense(index, lost)
            _add(sums, dense, dense.values)
            room -= dense.size_bytes
            if room >= 0:
                self._kept[index] = dense
        compared = {name: item for name, item in sums.items() if item.elements and (item.reference or not item.is_float)}
        self.outputs = tuple(
            ComparedOutput(name, "float" if item.is_float else "integer", item.elements, item.left_out)
            for name, item in compared.items()
        )
        reason = "it is zero everywhere, or padding, or filled in, in the dense model: there is nothing to compare"
        unused = [Diagnostic(name, reason) for name in sums if name not in compared]
        self.ignored = (*unused, *lost.values())
        if not self.outputs:
            raise CalibrationError(
                f"{type(captured.module).__name__} gives no output that pruned models could be compared by; let its forward "
                f"return tensors"
            )

    def errors(self, module: nn.Module) -> OutputErrors:
        """The errors of a pruned model: a module of the same class, with masks in force.

        Raises:
            CalibrationError: it fails on a batch.
        """
        sums: dict[str, _Sums] = {}
        for index, inputs in enumerate(self._batches):
            dense = self._kept.get(index) or self._dense(index, {})
            _add(sums, dense, _run(module, inputs, self._seed + index, "pruned").values)
        found = {item.name: sums[item.name].error for item in self.outputs}
        kinds = {item.kind for item in self.outputs}
        summed = [found[item.name] for item in self.outputs if item.kind == ("float" if "float" in kinds else "integer")]
        return OutputErrors(found, sum(summed) / len(summed))

    def _dense(self, index: int, lost: dict[str, Diagnostic]) -> _Outputs:
        tracker = PaddingTracker(self._masks)
        found = _run(self._module, self._batches[index], self._seed + index, "dense", tracker)
        lost.update({item.subject: item for item in tracker.diagnostics()})
        return found


def _copy(module: nn.Module) -> nn.Module:
    """A second object over the same weights, so that caches which it fills stay out of the user's."""
    try:
        return share_weights_copy(module)
    except Exception:  # an attribute that deepcopy cannot copy: run the module itself
        return module


def _run(module: nn.Module, inputs: ExampleInputs, seed: int, which: str, tracker: PaddingTracker | None = None) -> _Outputs:
    """One forward pass; ``tracker`` follows the padding through it."""
    with undisturbed(module), seeded(seed, module):
        own = inputs.map_tensors(lambda _, tensor: tensor.clone())
        if tracker is not None:
            tracker.begin(own.tensors())
        try:
            with contextlib.nullcontext() if tracker is None else tracker.following():
                outputs = output_tensors(own.call(module))
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.tensors().items())
            raise CalibrationError(
                f"the {which} model raised {type(error).__name__} on a batch of its calibration data ({shapes}): {error}"
            ) from error
        # Copies, before what the run wrote is put back: an output may be a buffer.
        found = _Outputs({name: _compared_values(tensor) for name, tensor in outputs.items()})
        if tracker is not None:
            for name, tensor in outputs.items():
                found.counted[name] = _counted(found.values[name], tracker.keep(tensor, ()))
            tracker.end()
    return found


def _compared_values(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in real numbers; of a complex one both parts."""
    return torch.view_as_real(tensor).cpu().clone() if tensor.is_complex() else tensor.detach().cpu().clone()


def _counted(values: Tensor, tokens: Tensor | None) -> Tensor | None:
    """Bool of the output's sizes, True where it is compared; None for everywhere."""
    counted = None
    if values.is_floating_point():
        real = values.abs() < torch.finfo(values.dtype).max
        counted = None if bool(real.all()) else real
    if tokens is not None:
        if values.ndim > tokens.ndim:  # the parts of complex numbers
            tokens = tokens[..., None].expand(values.shape)
        counted = tokens.cpu() & (True if counted is None else counted)
    return counted


def _add(sums: dict[str, _Sums], dense: _Outputs, outputs: Mapping[str, Tensor]) -> None:
    """Add the differences of one batch."""
    for name, expected in dense.values.items():
        is_float = expected.is_floating_point()
        total, counted = sums.setdefault(name, _Sums(is_float)), dense.counted[name]
        elements = expected.numel() if counted is None else int(counted.sum())
        total.elements += elements
        total.left_out += expected.numel() - elements
        found = outputs.get(name)
        if found is None or found.shape != expected.shape:
            total.difference, total.reference = inf, total.reference + 1.0
            continue
        for one, other, keep in _pieces(expected, found, counted):
            if not is_float:
                total.difference += float((one != other)[keep].sum())
                continue
            one, other = one[keep].double(), other[keep].double()
            difference = float((other - one).square().sum())
            total.difference += difference if isfinite(difference) else inf
            total.reference += float(one.square().sum())


def _pieces(one: Tensor, other: Tensor, counted: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts of two tensors, flat, with which of their elements count."""
    flat, others = one.reshape(-1), other.reshape(-1)
    counts = torch.ones((), dtype=torch.bool).expand(flat.numel()) if counted is None else counted.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = slice(start, start + _PIECE)
        yield flat[piece], others[piece], counts[piece]
