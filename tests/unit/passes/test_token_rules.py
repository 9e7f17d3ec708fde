"""The rules of operators, held to the operators: cutting what a group ties gives the cut result, and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mfcompile.passes.operators import SOFTMAXES, operator_name
from mfcompile.passes.token_places import node_sizes
from mfcompile.passes.token_rules import rule_of
from mfcompile.passes.token_ties import Tie

N, D = 4, 4
"""Tokens and width, of one size on purpose."""

CASES: dict[str, Callable[..., Any]] = {
    "linear": lambda x: F.linear(x, torch.ones(3, D), torch.arange(3.0)),
    "add": lambda x, y: x + y[:, :1],
    "broadcast": lambda x: x * torch.arange(float(D)),
    "gelu": lambda x: F.gelu(x),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.0),
    "softmax": lambda x: x.softmax(-1),
    "cast": lambda x: x.to(torch.float64),
    "matmul": lambda x, y: x @ y.transpose(1, 2),
    "bmm": lambda x, y: torch.bmm(x, y),
    "baddbmm": lambda x, y: torch.baddbmm(x[:, :1], x, y),
    "addmm": lambda x: torch.addmm(torch.arange(4.0), x[0], torch.ones(4, 4)),
    "einsum": lambda x, y: torch.einsum("bnd,bmd->bmn", x, y),
    "layer_norm": lambda x: F.layer_norm(x, (D,), torch.arange(4.0), torch.ones(4)),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(N), torch.ones(N)),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(0, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "select": lambda x: x.select(1, 2),
    "slice": lambda x: x[:, :, 1:],
    "cat": lambda x, y: torch.cat([x, y], 2),
    "stack": lambda x, y: torch.stack([x, y], 1),
    "split": lambda x: x.split(2, -1),
    "chunk": lambda x: x.chunk(2, 1),
    "unbind": lambda x: x.unbind(0),
    "mean": lambda x: x.mean(1),
    "mean_kept": lambda x: x.mean(-1, keepdim=True),
    "amax": lambda x: x.amax((0, 2)),
    "all_sum": lambda x: x.sum(),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(1),
    "argmax": lambda x: x.argmax(2),
    "topk": lambda x: x.topk(2, 1),
    "embedding": lambda x: F.embedding((x > 0).long(), torch.arange(6.0).view(2, 3)),
    "index": lambda x: x[torch.tensor([0, 1]), torch.tensor([1, 2])],
    "gather": lambda x: x.gather(1, torch.zeros(2, 2, D, dtype=torch.long)),
    "masked_scatter": lambda x, y: x.masked_scatter(y > 0, y),
    "conv_1x1": lambda x: F.conv1d(x, torch.ones(3, N, 1)),
    "conv_3": lambda x: F.conv1d(x, torch.ones(3, N, 3)),
    "pad": lambda x: F.pad(x, (0, 0, 1, 0)),
    "repeat": lambda x: x.repeat(1, 1, 2),
    "rms_norm": lambda x: F.rms_norm(x, (D,), torch.arange(4.0)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "glu": lambda x: F.glu(x, -1),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[:, None], y[:, None], x[:, None] * 2),
    "masked_attention": lambda x, y: F.scaled_dot_product_attention(x, y, x * 2, y > 0),
    "zeros_like": lambda x: torch.zeros_like(x),
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 0])),
}  # fmt: skip


def traced(case: Callable[..., Any]) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
    """The last operator of a case, and what its operands hold."""
    generator = torch.Generator().manual_seed(0)
    count = case.__code__.co_argcount
    inputs = [torch.randn(2, N, D, generator=generator) for _ in range(count)]
    module = make_fx(case, tracing_mode="real", pre_dispatch=True)(*inputs)
    values: dict[fx.Node, Any] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            n.meta["val"] = values[n]
            return values[n]

    Keeping(module).run(*inputs)
    calls = [node for node in module.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    return calls[-1], values


def outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@pytest.mark.parametrize("name", CASES)
def test_a_tie_is_what_the_operator_does(name: str) -> None:
    node, values = traced(CASES[name])
    rule = rule_of(node)
    assert rule is not None
    kept = torch.tensor([0, 2])
    listed = {member for group in rule.groups for member in group.members}
    operands = [item for item in node.all_input_nodes if isinstance(values[item], Tensor)]
    assert {(item, axis) for item in operands for axis in range(values[item].ndim)} <= listed
    checked = 0
    for group in rule.groups:
        sizes = {node_sizes(item)[axis] for item, axis in group.members} - {1}
        if group.tie is not Tie.KEEP or sizes != {4}:
            continue
        if operator_name(node) in SOFTMAXES and group.out == 2:
            continue  # attention over fewer keys is made anew from these
        assert group.out is not None
        cut = {
            item: values[item].index_select(axis, kept) if values[item].shape[axis] == 4 else values[item]
            for item, axis in group.members
        }
        call: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), {**values, **cut}.__getitem__)
        for found, whole in zip(outputs(call(*args, **kwargs)), outputs(values[node]), strict=True):
            torch.testing.assert_close(found, whole.index_select(group.out, kept))
        checked += 1
    assert checked or any(group.tie is not Tie.KEEP for group in rule.groups)


def ties(name: str) -> list[tuple[str, int | None]]:
    """Tie and place in the result of every axis of the first operand."""
    node, _ = traced(CASES[name])
    rule = rule_of(node)
    assert rule is not None
    first = node.all_input_nodes[0]
    found = {axis: (group.tie.name, group.out) for group in rule.groups for item, axis in group.members if item is first}
    return [found[axis] for axis in sorted(found)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [("KEEP", 0), ("KEEP", 1), ("STOP", None)]),
        ("select", [("KEEP", 0), ("READ", None), ("KEEP", 1)]),
        ("slice", [("KEEP", 0), ("KEEP", 1), ("READ", None)]),
        ("cumsum", [("KEEP", 0), ("STOP", None), ("KEEP", 2)]),
        ("argmax", [("KEEP", 0), ("KEEP", 1), ("STOP", None)]),
        ("mean", [("KEEP", 0), ("REDUCE", None), ("KEEP", 1)]),
        ("layer_norm", [("KEEP", 0), ("KEEP", 1), ("STOP", 2)]),
        ("group_norm", [("KEEP", 0), ("STOP", None), ("STOP", None)]),
        ("conv_1x1", [("KEEP", 0), ("STOP", None), ("KEEP", 2)]),
        ("conv_3", [("KEEP", 0), ("STOP", None), ("STOP", None)]),
        ("pad", [("KEEP", 0), ("READ", None), ("KEEP", 2)]),
        ("index", [("READ", None), ("READ", None), ("KEEP", 1)]),
        ("masked_scatter", [("STOP", None)] * 3),
        ("bmm", [("KEEP", 0), ("KEEP", 1), ("SUM", None)]),
    ],
)
def test_what_happens_along_each_axis(name: str, expected: list[tuple[str, int | None]]) -> None:
    assert ties(name) == expected


@pytest.mark.parametrize("case", [lambda x: x.roll(1, 1), lambda x: x.flip(1), lambda x: torch.fft.fft(x, dim=1)])
def test_an_operator_without_a_rule_has_none(case: Callable[..., Any]) -> None:
    assert rule_of(traced(case)[0]) is None
