"""What nodes of an exported program hold on its example inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from mfcompile.errors import PreconditionError


def node_values(program: ExportedProgram, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of some nodes when the program runs on the example that it was exported with.

    Args:
        program: holds example inputs, as programs do that torch.export made.
        names: of nodes.

    Raises:
        PreconditionError: it holds none.
    """
    if not names:
        return {}
    if program.example_inputs is None:
        raise PreconditionError("the program holds no example inputs, on which image tokens are counted: export it again")
    graph = copy.deepcopy(program.graph)
    for original, node in zip(program.graph.nodes, graph.nodes, strict=True):
        node.name = original.name
    nodes = {node.name: node for node in graph.nodes}
    nodes["output"].args = (tuple(nodes[name] for name in names),)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    with torch.no_grad():
        results = fx.Interpreter(fx.GraphModule(program.graph_module, graph)).run(*_flat_inputs(program))
    return dict(zip(names, results, strict=True))


def _flat_inputs(program: ExportedProgram) -> list[Any]:
    assert program.example_inputs is not None  # the caller looked
    args, kwargs = program.example_inputs
    users = iter(pytree.tree_leaves((args, kwargs)))
    stored = {**program.constants, **program.state_dict}
    values = []
    for spec in program.graph_signature.input_specs:
        values.append(next(users) if spec.kind is InputKind.USER_INPUT else stored[str(spec.target)])
    return values
