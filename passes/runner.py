"""Running calibration batches: on the graph where they fit it, else on the module, as it is or in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from mfcompile.control_flow import eager_code
from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import ExampleInputs
from mfcompile.module_copy import share_weights_copy
from mfcompile.passes.base import run_transform
from mfcompile.passes.observers import InsertObservers, ModuleObserver, StatisticsCollector
from mfcompile.passes.padding import PaddingPlan
from mfcompile.region import RegionMap


class Runner(Protocol):
    """Runs calibration batches, whatever the model came from."""

    observed_by: set[str]

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Where padding could not be followed."""

    def run(self, inputs: ExampleInputs, index: int) -> None:
        """One forward pass."""


def runner_of(
    captured: CapturedGraph,
    regions: RegionMap,
    collector: StatisticsCollector,
    observe: str,
    precision: str,
    plan: PaddingPlan,
) -> Runner:
    """What runs batches of this model.

    Raises:
        InputError: an ONNX file is to be observed in another way than it can be.
    """
    if captured.frontend != "onnx":
        return _Runner(captured, regions, collector, observe, precision)
    from mfcompile.passes.onnx_calibration import OnnxRunner

    if observe != "auto" or precision != "model":
        option = f"observe={observe!r}" if observe != "auto" else f"precision={precision!r}"
        raise InputError(f"{option}: an ONNX file is run and observed by onnxruntime. Leave it as it is")
    return OnnxRunner(captured, regions, collector, plan)


class _Runner:
    """Runs one batch after another, on the graph where it fits, else on the module."""

    def __init__(
        self, captured: CapturedGraph, regions: RegionMap, collector: StatisticsCollector, observe: str, precision: str
    ) -> None:
        self.observed_by: set[str] = set()
        self._is_wide = precision == "float64"
        self._captured, self._collector, self._observe = captured, collector, observe
        self._insert = InsertObservers(regions, collector)
        self._fits_any_values = fits_any_values(captured)
        self._may_fit = observe != "module" and not self._is_wide and (self._fits_any_values or bool(captured.remembered))
        self._insert.requires(captured)

    @cached_property
    def _graph(self) -> fx.GraphModule:
        """The graph with observers, made for the first batch that fits it."""
        return run_transform(self._insert, self._captured).graph.graph_module

    @cached_property
    def _observer(self) -> ModuleObserver:
        """The observer of ``_module``, which is made for the first batch that does not fit the graph."""
        return ModuleObserver(self._module, self._collector)

    @cached_property
    def _module(self) -> nn.Module:
        return widened(self._captured.module) if self._is_wide else _runnable(self._captured)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Where padding could not be followed."""
        return self._collector.tracker.diagnostics()

    def run(self, inputs: ExampleInputs, index: int) -> None:
        """One forward pass.

        Raises:
            CalibrationError: the model raised, or the batch does not fit a graph that was insisted on.
        """
        if self._is_wide:
            inputs = inputs.map_tensors(lambda _, tensor: tensor.double() if tensor.is_floating_point() else tensor)
        tensors = inputs.tensors()
        fits = self._may_fit and fits_shapes(self._captured, inputs) and self._fits_values(tensors)
        graph = self._graph if fits else None
        if graph is None and self._observe == "graph":
            raise CalibrationError(
                f"calibration batch {index} does not fit the graph, which is fixed to the shapes of the example inputs and "
                f"to numbers that the model read from them. Use observe='auto'"
            )
        try:
            if graph is not None:
                self._collector.begin_batch(tensors)
                with torch.inference_mode(), self._collector.tracker.following():
                    graph(*tensors.values())
            else:
                self._run_module(inputs, tensors)
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            wide = (
                ". It ran in float64, which its code may not allow: calibrate with precision='model'" if self._is_wide else ""
            )
            raise CalibrationError(
                f"the model raised {type(error).__name__} on calibration batch {index} ({shapes}): {error}{wide}"
            ) from error
        self._collector.end_batch()
        self.observed_by.add("module" if graph is None else "graph")

    def _fits_values(self, tensors: Mapping[str, Tensor]) -> bool:
        """The graph is right for these values: for any, or for the example, which the module may remember and not read."""
        example = self._captured.example_inputs.tensors()
        return self._fits_any_values or all(torch.equal(tensor, example[name]) for name, tensor in tensors.items())

    def _run_module(self, inputs: ExampleInputs, tensors: Mapping[str, Tensor]) -> None:
        """Watch the module run; what the run writes into parameters, buffers and the batch is put back."""
        self._collector.begin_batch(tensors)
        for tensor in tensors.values():
            self._observer.state.watch(tensor)
        try:
            with _inference(self._module), default_dtype(self._is_wide), self._observer:
                inputs.call(self._module)
        finally:
            self._observer.state.restore()


def fits_any_values(captured: CapturedGraph) -> bool:
    """The graph holds no number that the model read from an input: it is right for other values of the same shapes."""
    return not any(scalar.from_input for scalar in captured.baked_scalars)


def fits_shapes(captured: CapturedGraph, inputs: ExampleInputs) -> bool:
    """The tensors have names, shapes and dtypes of the example inputs, and nothing else differs."""
    tensors = inputs.tensors()
    given: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        (name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    ]
    return given == [(spec.name, spec.shape, spec.dtype) for spec in captured.inputs] and _rest(inputs) == _rest(
        captured.example_inputs
    )


def _rest(inputs: ExampleInputs) -> str:
    """Everything but the tensors, as text."""
    blank = inputs.map_tensors(lambda _, __: torch.empty(0))
    return repr((blank.args, blank.kwargs))


def _runnable(captured: CapturedGraph) -> nn.Module:
    """The user's module in a second object, so that caches it fills while it runs stay out of the user's."""
    try:
        return share_weights_copy(captured.module)
    except Exception:  # an attribute that deepcopy cannot copy: run the module itself
        return captured.module


def widened(module: nn.Module) -> nn.Module:
    """A copy of the module in float64, with weights of its own.

    Raises:
        CalibrationError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module).double()
    except Exception as error:  # whatever an attribute raises
        raise CalibrationError(
            f"{type(module).__name__} cannot be copied in float64 ({type(error).__name__}: {error}). Calibrate with "
            f"precision='model'"
        ) from error


@contextlib.contextmanager
def default_dtype(is_wide: bool) -> Iterator[None]:
    """What the model makes without saying a dtype (zeros, positions) is float64, where all of it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if is_wide else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Eval mode, no autograd, whole operators."""
    training = [item for item in module.modules() if item.training]
    for item in training:
        item.training = False
    try:
        with torch.inference_mode(), eager_code():
            yield
    finally:
        for item in training:
            item.training = True
