"""Calibration: run batches, observe the activations that feed prune sites."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from mfcompile.control_flow import eager_code
from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import ExampleInputs, normalize_inputs
from mfcompile.module_copy import share_weights_copy
from mfcompile.passes.base import run_transform
from mfcompile.passes.observers import InsertObservers, ModuleObserver, StatisticsCollector
from mfcompile.passes.padding import PaddingPlan, find_padding_masks
from mfcompile.region import RegionMap
from mfcompile.statistics import CalibrationStatistics

Progress = Callable[[int, int | None], None]


def plan_padding(captured: CapturedGraph, regions: RegionMap, padding_mask: str | None = None) -> PaddingPlan:
    """Find the padding masks and the tokens that they speak of.

    Which activations they cover is not planned: padding is followed through every forward pass (``padding_flow``).

    Args:
        captured: the captured model.
        regions: its regions.
        padding_mask: name of the mask input; None to find it.

    Raises:
        InputError: ``padding_mask`` names no (batch, length) input.
    """
    return PaddingPlan(find_padding_masks(captured, regions.modalities, padding_mask))


def repeated_weights(regions: RegionMap) -> frozenset[str]:
    """FQNs of the weights whose rows meet several activations in one forward."""
    return frozenset(
        fqn for fqn, uses in regions.evidence.items() if any(one.overlaps(other) for one, other in combinations(uses, 2))
    )


def calibrate(
    captured: CapturedGraph,
    regions: RegionMap,
    batches: Iterable[Any] | None,
    *,
    padding_mask: str | None = None,
    num_samples: int | None = None,
    observe: str = "auto",
    progress: Progress | None = None,
) -> CalibrationStatistics:
    """Run calibration batches and collect the statistics of every pruned site.

    Args:
        captured: the captured model.
        regions: its regions and sites.
        batches: any iterable of batches (dicts, tuples, tensors; a DataLoader); None uses the example inputs.
        padding_mask: name of the mask input of the text; None to find it.
        num_samples: stop after the batch that reaches this many samples; None uses all.
        observe: "auto" runs the graph with inserted observers where a batch fits it, else the module; "graph" and
            "module" insist on one.
        progress: called with (batches done, batches in all or None) after every batch.

    Returns:
        Statistics of every pruned site.

    Raises:
        InputError: ``batches`` is one batch or no iterable, or another argument is not valid.
        CalibrationError: no batch, a region without a single token, NaN or infinity in an activation, or a batch that
            the model refuses.
    """
    check_arguments(batches, num_samples, observe)
    plan = plan_padding(captured, regions, padding_mask)
    collector = StatisticsCollector(regions.pruned_sites, plan, repeated_weights(regions))
    runner = run_batches(
        captured, regions, collector, batches, plan, num_samples=num_samples, observe=observe, progress=progress
    )
    statistics = CalibrationStatistics(
        collector.statistics(), collector.batch_count, source_of(captured, batches), "+".join(sorted(runner.observed_by)),
        tuple(dict.fromkeys(item.mask for item in plan.masks)), runner.diagnostics,
    )  # fmt: skip
    statistics.check()
    check_regions(regions, statistics)
    return replace(statistics, diagnostics=(*statistics.diagnostics, *_unseen(regions, statistics)))


def run_batches(
    captured: CapturedGraph,
    regions: RegionMap,
    collector: StatisticsCollector,
    batches: Iterable[Any] | None,
    plan: PaddingPlan,
    *,
    num_samples: int | None = None,
    observe: str = "auto",
    progress: Progress | None = None,
) -> Runner:
    """Run batches and hand the activations that feed the collector's sites to it; the arguments are those of ``calibrate``.

    Raises:
        CalibrationError: there is no batch, or one that the model refuses.
    """
    runner, total, samples = _runner(captured, regions, collector, observe, plan), _length(batches), 0
    for index, batch in enumerate([captured.example_inputs] if batches is None else batches):
        inputs = normalize_batch(captured, batch, index)
        runner.run(inputs, index)
        samples += sample_count(inputs)
        if progress is not None:
            progress(index + 1, total)
        if num_samples is not None and samples >= num_samples:
            break
    if collector.batch_count == 0:
        raise CalibrationError(
            "the calibration set is empty: no batch was given. Pass at least one batch, or None to use the example inputs"
        )
    return runner


def source_of(captured: CapturedGraph, batches: Iterable[Any] | None) -> str:
    """Where calibration data come from, in words; without batches, what stands in for them."""
    if batches is not None:
        return "calibration batches"
    is_random = any(text.startswith("random inputs") for text in captured.specialised)
    return "random inputs" if is_random else "example inputs"


def check_arguments(batches: Iterable[Any] | None, num_samples: int | None, observe: str) -> None:
    """Refuse arguments of ``calibrate`` that are not valid, before any work.

    Raises:
        InputError: see calibrate.
    """
    if observe not in {"auto", "graph", "module"}:
        raise InputError(f"observe={observe!r} is unknown; choose auto, graph or module")
    if num_samples is not None and (isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 1):
        raise InputError(f"num_samples must be a positive integer or None, got {num_samples!r}")
    if isinstance(batches, (Mapping, Tensor, str)) or not (batches is None or isinstance(batches, Iterable)):
        raise InputError(
            f"calibration is a {type(batches).__name__}: give an iterable of batches, a list with this one batch in it say"
        )


def sample_count(inputs: ExampleInputs) -> int:
    """Samples in a batch, as ``num_samples`` counts them: the size of the first tensor that has one."""
    return next((int(tensor.shape[0]) for tensor in inputs.tensors().values() if tensor.ndim), 1)


def normalize_batch(captured: CapturedGraph, batch: Any, index: int) -> ExampleInputs:
    """A calibration batch as the model receives it.

    Raises:
        CalibrationError: it does not fit the model.
    """
    try:
        if captured.frontend == "onnx":
            from mfcompile.onnx_file import OnnxFile
            from mfcompile.onnx_inputs import name_inputs

            assert isinstance(captured.module, OnnxFile)  # the front end is onnx
            return name_inputs(captured.module, batch, what=f"calibration batch {index}")
        return normalize_inputs(captured.module, batch, what=f"calibration batch {index}")
    except InputError as error:
        raise CalibrationError(str(error)) from error


def _length(batches: Iterable[Any] | None) -> int | None:
    """Number of batches, None where it is not known (a loader over an endless data set has a length that raises)."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None


def check_regions(regions: RegionMap, statistics: CalibrationStatistics) -> None:
    """Refuse statistics that leave a region without a token.

    Raises:
        CalibrationError: names the region and its first site.
    """
    for region, sites in regions.by_region().items():
        if not sum(statistics.sites[site.name].token_count for site in sites):
            raise CalibrationError(
                f"the region {region!r} received no calibration token at any of its {len(sites)} sites (first: "
                f"{sites[0].name}), so its weights cannot be ranked. Give calibration batches that run this part of the "
                f"model, or keep it dense with ignore=['region:{region}']"
            )


def _unseen(regions: RegionMap, statistics: CalibrationStatistics) -> Iterator[Diagnostic]:
    """Sites that received no token; the experts of one weight in one line."""
    experts: dict[str, dict[int, bool]] = {}
    for site in regions.pruned_sites:
        is_seen = bool(statistics.sites[site.name].token_count)
        if site.expert is not None:
            found = experts.setdefault(site.fqn, {})
            found[site.expert] = found.get(site.expert, True) and is_seen
        elif not is_seen:
            yield Diagnostic(site.name, "it received no calibration token: magnitude ranks its weights")
    for fqn, seen in experts.items():
        unseen = [str(expert) for expert, is_seen in seen.items() if not is_seen]
        if unseen:
            listed = ", ".join(unseen[:8]) + (f" and {len(unseen) - 8} more" if len(unseen) > 8 else "")
            yield Diagnostic(
                fqn,
                f"{len(unseen)} of its {len(seen)} experts received no calibration token ({listed}): magnitude ranks theirs",
            )


class Runner(Protocol):
    """Runs calibration batches, whatever the model came from."""

    observed_by: set[str]

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Where padding could not be followed."""

    def run(self, inputs: ExampleInputs, index: int) -> None:
        """One forward pass."""


def _runner(
    captured: CapturedGraph, regions: RegionMap, collector: StatisticsCollector, observe: str, plan: PaddingPlan
) -> Runner:
    if captured.frontend != "onnx":
        return _Runner(captured, regions, collector, observe)
    from mfcompile.passes.onnx_calibration import OnnxRunner

    if observe != "auto":
        raise InputError(f"observe={observe!r}: an ONNX file is observed by onnxruntime. Leave observe as it is")
    return OnnxRunner(captured, regions, collector, plan)


class _Runner:
    """Runs one batch after another, on the graph where it fits, else on the module."""

    def __init__(self, captured: CapturedGraph, regions: RegionMap, collector: StatisticsCollector, observe: str) -> None:
        self.observed_by: set[str] = set()
        self._captured, self._collector, self._observe = captured, collector, observe
        self._insert = InsertObservers(regions, collector)
        self._fits_any_values = fits_any_values(captured)
        self._may_fit = observe != "module" and (self._fits_any_values or bool(captured.remembered))
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
        return _runnable(self._captured)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Where padding could not be followed."""
        return self._collector.tracker.diagnostics()

    def run(self, inputs: ExampleInputs, index: int) -> None:
        """One forward pass.

        Raises:
            CalibrationError: the model raised, or the batch does not fit a graph that was insisted on.
        """
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
            raise CalibrationError(
                f"the model raised {type(error).__name__} on calibration batch {index} ({shapes}): {error}"
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
            with _inference(self._module), self._observer:
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
