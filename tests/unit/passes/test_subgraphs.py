"""Operators of functions in a graph from elsewhere: labels go through them, weights inside are listed and left dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import mfcompile
from mfcompile.graph import CapturedGraph
from tests.zoo.parts import WIDTH, FeedForward, Patches, Words


class Model(nn.Module):
    """The image passes a linear layer in the place where the operator will be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.words, self.inner = Patches(), Words(), nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        states: Tensor = self.inner(self.patches(image)) + self.words(ids).mean(1, keepdim=True)
        for layer in self.layers:
            states = states + layer(states)
        return states


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(3, 3, 8, 8, generator=generator),
        "ids": torch.randint(2, 50, (3, 6), generator=generator),
    }


def body(step: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(step)


def linear(states: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.aten.linear.default(states, weight)  # type: ignore[no-any-return]


def through_views(states: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.aten.matmul.default(states, torch.ops.aten.t.default(weight))  # type: ignore[no-any-return]


def around(operator: str) -> CapturedGraph:
    """The captured model, with its first linear node inside an operator of functions."""
    captured = mfcompile.capture(Model().eval(), inputs())
    root, graph = captured.graph_module, fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copies))
    module = fx.GraphModule(root, graph)
    (node,) = [
        copy
        for old, copy in copies.items()
        if old.target is torch.ops.aten.linear.default and captured.parameter_nodes[str(old.args[1])] == "inner.weight"
    ]
    states, weight = node.args
    module.add_module("one", body(linear))
    module.add_module("other", body(through_views))
    higher = torch.ops.higher_order
    with graph.inserting_before(node):
        one, other = graph.get_attr("one"), graph.get_attr("other")
        if operator == "cond":
            condition = graph.call_function(torch.ops.aten.any.default, (states,))
            called = graph.call_function(higher.cond, (condition, one, other, (states, weight)))
        elif operator == "while_loop":
            called = graph.call_function(higher.while_loop, (one, other, (states,), (weight,)))
        elif operator == "wrap":
            called = graph.call_function(higher.wrap, (other, states, weight))
        else:
            called = graph.call_function(higher.tag_activation_checkpoint, (one, states, weight), {"use_reentrant": False})
    node.replace_all_uses_with(called)
    graph.erase_node(node)
    return replace(captured, graph_module=fx.GraphModule(module, graph))


@pytest.mark.parametrize("operator", ["cond", "while_loop", "wrap", "checkpoint"])
def test_labels_go_through_and_the_weight_inside_is_listed(operator: str) -> None:
    regions = mfcompile.infer_regions(around(operator))
    assert {frozenset(use.label) for use in regions.evidence["layers.0.1.weight"]} == {frozenset({"vision", "text"})}
    (site,) = [site for site in regions.sites if site.fqn == "inner.weight"]
    name = "tag_activation_checkpoint" if operator == "checkpoint" else operator
    assert (site.region, site.skipped) == (
        "vision", f"it is used inside the sub-graph of {name} ({name}), which is not rewritten"
    )  # fmt: skip
    assert {site.fqn for site in regions.pruned_sites} == {f"layers.{i}.{j}.weight" for i in (0, 1) for j in (1, 3)}


def test_a_function_that_holds_its_weight_is_looked_into_as_well() -> None:
    captured = around("wrap")

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = captured.module.inner.weight  # type: ignore[union-attr]

        def forward(self, states: Tensor, unused: Tensor) -> Tensor:
            return linear(states, self.weight)  # type: ignore[arg-type]

    captured.graph_module.add_module("other", fx.symbolic_trace(Holding()))
    reasons = {site.fqn: site.skipped or "" for site in mfcompile.infer_regions(captured).sites}
    assert reasons["inner.weight"].startswith("it is used inside the sub-graph of wrap")


def test_functions_inside_of_functions_are_looked_into() -> None:
    captured = around("wrap")
    outer = fx.Graph()
    states, weight = outer.placeholder("states"), outer.placeholder("weight")
    inner = outer.get_attr("inner")
    outer.output(outer.call_function(torch.ops.higher_order.wrap, (inner, states, weight)))
    captured.graph_module.add_module("other", fx.GraphModule({"inner": body(through_views)}, outer))
    reasons = {site.fqn: site.skipped or "" for site in mfcompile.infer_regions(captured).sites}
    assert reasons["inner.weight"].startswith("it is used inside the sub-graph of wrap")


def test_a_control_flow_model_is_pruned_where_it_is_not_in_control() -> None:
    """The recorder runs the branch that the example takes."""

    class Branching(Model):
        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            states: Tensor = self.patches(image) + self.words(ids).mean(1, keepdim=True)
            states = torch.cond(states.sum() > -1e9, lambda x: self.inner(x), lambda x: x * 2, (states,))
            for layer in self.layers:
                states = states + layer(states)
            return states

    regions = mfcompile.infer_regions(mfcompile.capture(Branching().eval(), inputs()))
    assert regions.weights["inner.weight"] == "fusion"
    assert len(regions.pruned_sites) == 4
