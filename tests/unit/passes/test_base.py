"""The contract of a transform, and the driver that holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx

import mfcompile
from mfcompile.errors import CalibrationError, PassError, PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.base import PassResult, run_transform
from tests.models import TwoLayers


@pytest.fixture
def captured() -> CapturedGraph:
    return mfcompile.capture(TwoLayers(), torch.randn(2, 3, 4))


def copied(graph: CapturedGraph) -> CapturedGraph:
    new_graph = fx.Graph()
    new_graph.output(new_graph.graph_copy(graph.graph, {}))
    return replace(graph, graph_module=fx.GraphModule(graph.graph_module, new_graph))


def insert_relu(graph: CapturedGraph) -> None:
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    with graph.graph.inserting_after(node):
        graph.graph.call_function(torch.ops.aten.relu.default, (node,))
    graph.graph_module.recompile()


def nothing(*_: object) -> None:
    pass


@dataclass
class Scripted:
    """A transform made of functions."""

    change: Callable[[CapturedGraph], PassResult]
    precondition: Callable[[CapturedGraph], None] = nothing
    postcondition: Callable[[CapturedGraph, PassResult], None] = nothing

    def requires(self, graph: CapturedGraph) -> None:
        self.precondition(graph)

    def apply(self, graph: CapturedGraph) -> PassResult:
        return self.change(graph)

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        self.postcondition(before, result)


def honest(graph: CapturedGraph) -> PassResult:
    new = copied(graph)
    insert_relu(new)
    return PassResult(new, True, (Diagnostic("here", "a reason"),))


def mutating(graph: CapturedGraph) -> PassResult:
    before = copied(graph)
    insert_relu(graph)
    return PassResult(before, False)


def lying(graph: CapturedGraph) -> PassResult:
    return PassResult(copied(graph), True)


def hiding(graph: CapturedGraph) -> PassResult:
    return replace(honest(graph), modified=False)


def dangling(graph: CapturedGraph) -> PassResult:
    new, other = copied(graph), copied(graph)
    node = next(node for node in new.graph.nodes if node.op == "call_function")
    node.args = (next(iter(other.graph.nodes)), *node.args[1:])
    return PassResult(new, True)


def failing(graph: CapturedGraph) -> PassResult:
    raise ZeroDivisionError("no such thing")


def raising(error: Exception) -> Callable[..., None]:
    def act(*_: object) -> None:
        raise error

    return act


def test_an_honest_transform_passes_and_keeps_its_diagnostics(captured: CapturedGraph) -> None:
    before = str(captured.graph)
    result = run_transform(Scripted(honest), captured)
    assert result.modified
    assert result.diagnostics == (Diagnostic("here", "a reason"),)
    assert str(captured.graph) == before != str(result.graph.graph)


def test_doing_nothing_is_honest_when_it_is_said(captured: CapturedGraph) -> None:
    assert not run_transform(Scripted(lambda graph: PassResult(graph, False)), captured).modified
    assert not run_transform(Scripted(lambda graph: PassResult(copied(graph), False)), captured).modified


def test_a_transform_that_changes_its_input_is_caught(captured: CapturedGraph) -> None:
    with pytest.raises(PostconditionError, match="Scripted changed the graph it was given; a transform must work on a copy"):
        run_transform(Scripted(mutating), captured)


@pytest.mark.parametrize(("change", "claim"), [(lying, True), (hiding, False)])
def test_a_wrong_claim_is_caught(captured: CapturedGraph, change: Callable[[CapturedGraph], PassResult], claim: bool) -> None:
    with pytest.raises(PostconditionError, match=f"Scripted declares modified={claim}, but the graphs say otherwise"):
        run_transform(Scripted(change), captured)


@pytest.mark.parametrize("change", [failing, dangling])
def test_a_foreign_error_is_wrapped_with_its_cause(
    captured: CapturedGraph, change: Callable[[CapturedGraph], PassResult]
) -> None:
    with pytest.raises(PassError, match="Scripted failed on the graph of TwoLayers: ") as caught:
        run_transform(Scripted(change), captured)
    assert caught.value.__cause__ is not None
    assert type(caught.value) is PassError


def test_our_own_errors_pass_as_they_are(captured: CapturedGraph) -> None:
    for error in (CalibrationError("one"), PreconditionError("two"), PostconditionError("three")):
        with pytest.raises(type(error), match=str(error)):
            run_transform(Scripted(honest, precondition=raising(error)), captured)


def test_requires_comes_before_apply_and_ensures_sees_the_result(captured: CapturedGraph) -> None:
    seen: list[object] = []

    def change(graph: CapturedGraph) -> PassResult:
        seen.append("apply")
        return honest(graph)

    transform = Scripted(change, lambda graph: seen.append(graph), lambda before, result: seen.extend([before, result]))
    result = run_transform(transform, captured)
    assert seen == [captured, "apply", captured, result]
