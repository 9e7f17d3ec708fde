"""Calibration with token weights: batches run on recorded graphs with weighted observers, recorded anew where none fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.base import run_transform
from mfcompile.passes.live_heads import live_heads, masked_value
from mfcompile.passes.masking import ApplyMasks
from mfcompile.passes.observers import StatisticsCollector
from mfcompile.passes.runner import default_dtype, fits_shapes, widened
from mfcompile.passes.token_cover import Cover, TokenCovers
from mfcompile.passes.token_weighting import BatchDoesNotFitError, Checks, InsertWeightedObservers, uncovered
from mfcompile.passes.weights import find_weight_uses
from mfcompile.region import RegionMap, WeightUse

Recapture = Callable[[nn.Module, ExampleInputs], CapturedGraph]
"""Records a module on other inputs."""

_FORMS = 8
"""Recorded graphs that are kept for later batches."""


@dataclass(frozen=True)
class _Form:
    """A recorded graph with observers.

    Attributes:
        recorded: the graph without.
        observed: the graph with observers.
        checks: whether numbers that the model reads are compared.
    """

    recorded: CapturedGraph
    observed: fx.GraphModule
    checks: Checks


class WeightedRunner:
    """Runs one batch after another on a recorded graph that fits it.

    A graph fits a batch of its shapes in which the numbers that the model reads (how many tokens are images, whether there
    is padding) are those of the recording, which is looked at while it runs. Other batches are recorded first.

    Args:
        captured: the captured model.
        regions: its regions and sites.
        collector: gets the reductions; learns here which weights come with token scores.
        observe: "auto", or "graph" to refuse batches that do not fit the captured graph.
        precision: "model" or "float64".
        recapture: records a module; None refuses what does not fit the captured graph.

    Raises:
        InputError: the model is an ONNX file, or its module is to be watched.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        regions: RegionMap,
        collector: StatisticsCollector,
        observe: str,
        precision: str,
        recapture: Recapture | None,
    ) -> None:
        if captured.frontend == "onnx":
            raise InputError(
                "weighting='cip': token scores are computed in the graph of a PyTorch model, and this one is an ONNX file. "
                "Calibrate the model that it was made from, or leave weighting out"
            )
        if observe == "module":
            raise InputError("weighting='cip' observes graphs, not modules: leave observe='module' out")
        self.observed_by: set[str] = set()
        self._captured, self._regions, self._collector = captured, regions, collector
        self._observe, self._is_wide, self._recapture = observe, precision == "float64", recapture
        self._forms: list[_Form] = []
        self._reasons: dict[str, str] = {}
        self._decide()

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Weights that keep plain norms, and where padding could not be followed."""
        return (*self._collector.tracker.diagnostics(), *uncovered(self._reasons))

    def run(self, inputs: ExampleInputs, index: int) -> None:
        """One forward pass, or two where no graph fits.

        Raises:
            CalibrationError: the model raised, or the batch does not fit a graph that was insisted on.
        """
        if self._is_wide:
            inputs = inputs.map_tensors(lambda _, tensor: tensor.double() if tensor.is_floating_point() else tensor)
        try:
            with default_dtype(self._is_wide):
                self._run_where_it_fits(inputs, index)
        except CalibrationError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.tensors().items())
            raise CalibrationError(
                f"the model raised {type(error).__name__} on calibration batch {index} ({shapes}): {error}"
            ) from error
        self._collector.end_batch()
        self.observed_by.add("graph")

    def _run_where_it_fits(self, inputs: ExampleInputs, index: int) -> None:
        if not any(self._fits(form, inputs) for form in reversed(self._forms)):
            self._run(self._record(inputs, index), inputs)

    def _fits(self, form: _Form, inputs: ExampleInputs) -> bool:
        """Run a graph that may fit."""
        if not fits_shapes(form.recorded, inputs):
            return False
        own = form.recorded.example_inputs.tensors()
        form.checks.are_made = not all(torch.equal(tensor, own[name]) for name, tensor in inputs.tensors().items())
        try:
            self._run(form, inputs)
        except BatchDoesNotFitError:
            return False
        return True

    def _run(self, form: _Form, inputs: ExampleInputs) -> None:
        tensors = inputs.tensors()
        self._collector.begin_batch(tensors)
        with torch.inference_mode(), self._collector.tracker.following():
            form.observed(*tensors.values())

    def _record(self, inputs: ExampleInputs, index: int) -> _Form:
        """A graph of this batch."""
        if self._observe == "graph" or self._recapture is None:
            raise CalibrationError(
                f"calibration batch {index} does not fit the graph, which is fixed to the shapes of the example inputs and "
                f"to numbers that the model read from them. Use observe='auto'"
            )
        recorded = self._recapture(self._module, inputs)
        uses = _uses(recorded)
        if self._captured.masks is not None:
            recorded = run_transform(ApplyMasks(self._captured.masks), recorded).graph
        covers, reasons = self._covers(recorded, uses)
        lost = next((fqn for fqn in self._collector.weighted if fqn in reasons), None)
        if lost is not None:
            raise CalibrationError(
                f"calibration batch {index} takes a way through the model on which no token scores reach {lost}: "
                f"{reasons[lost]}. Leave such batches out, or leave {lost} dense with ignore"
            )
        self._add(recorded, uses, covers)
        self._forms[-1].checks.are_made = False
        return self._forms[-1]

    @cached_property
    def _module(self) -> nn.Module:
        return widened(self._captured.module) if self._is_wide else self._captured.module

    def _decide(self) -> None:
        """Weights that come with token scores in all of their uses, by the captured graph."""
        uses = {fqn: self._regions.evidence.get(fqn, ()) for fqn in self._collector.by_fqn}
        covers, self._reasons = self._covers(self._captured, uses)
        self._collector.weighted = frozenset(uses) - set(self._reasons)
        if not self._is_wide:
            self._add(self._captured, uses, covers)

    def _covers(
        self, recorded: CapturedGraph, uses: Mapping[str, tuple[WeightUse, ...]]
    ) -> tuple[dict[WeightUse, Cover], dict[str, str]]:
        """Covers of uses, and FQN -> why one of its uses has none."""
        listed = [use for fqn in self._collector.by_fqn for use in uses.get(fqn, ())]
        finder = TokenCovers(recorded, self._regions.modalities, listed)
        found: dict[WeightUse, Cover] = {}
        reasons: dict[str, str] = {}
        for fqn in self._collector.by_fqn:
            for use in uses.get(fqn, ()):
                cover = finder.of(use)
                if isinstance(cover, str):
                    reasons.setdefault(fqn, cover)
                else:
                    found[use] = cover
        return found, reasons

    def _add(
        self, recorded: CapturedGraph, uses: Mapping[str, tuple[WeightUse, ...]], covers: Mapping[WeightUse, Cover]
    ) -> None:
        checks = Checks()
        listed = [use for fqn in self._collector.by_fqn for use in uses.get(fqn, ())]
        known = {use: cover for use, cover in covers.items() if use.fqn in self._collector.weighted}
        insert = InsertWeightedObservers(listed, known, self._collector, checks, _live(recorded, known.values()))
        observed = run_transform(insert, recorded).graph.graph_module
        self._forms = [*self._forms[-(_FORMS - 1) :], _Form(recorded, observed, checks)]


def _live(recorded: CapturedGraph, covers: Iterable[Cover]) -> dict[str, Tensor]:
    """Attention node -> which heads masks have left, where some are gone."""

    def value_of(node: fx.Node) -> Tensor | None:
        fqn = recorded.parameter_nodes.get(node.name) if node.op == "get_attr" else None
        return None if fqn is None else masked_value(recorded.parameter(fqn), fqn, recorded.masks)

    found = {}
    for attention, samples in {cover.attention.node: (cover.attention, cover.rows.samples) for cover in covers}.values():
        live = live_heads(attention, samples, value_of)
        if live is not None:
            found[attention.node.name] = live
    return found


def _uses(recorded: CapturedGraph) -> dict[str, tuple[WeightUse, ...]]:
    found: dict[str, tuple[WeightUse, ...]] = {}
    for use in find_weight_uses(recorded).uses:
        found[use.fqn] = (*found.get(use.fqn, ()), use)
    return found
