"""What transforms of exported programs start from: a program without writes, and inputs that it runs on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mfcompile.graph import CapturedGraph, ExportedModel
from mfcompile.inputs import ExampleInputs


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without operators that write into tensors: what a node gives must not change behind its back."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes if node.op == "call_function"]
    if not any(schema is not None and schema.is_mutable for schema in schemas):
        return program
    program = program.run_decompositions({})
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            # Written where strides allowed a view; whoever writes attention out later gives its result others.
            node.target = torch.ops.aten.reshape.default
    program.graph_module.recompile()
    return program


def example_of(captured: CapturedGraph, exported: ExportedModel) -> ExampleInputs:
    """Inputs that the program runs on: the user's, or their repetition where the program has a fixed batch of two."""
    is_free = all(0 in exported.dynamic_axes.get(name, {}) for name in exported.input_names)
    return captured.example_inputs if is_free else exported.example_inputs


def over_state(program: ExportedProgram, state: Mapping[str, Tensor]) -> ExportedProgram:
    """The same program over other weights; the given one keeps its own.

    Args:
        program: any.
        state: name in its state dict -> tensor of the same sizes, over whose memory a parameter is put in where one was;
            the others are shared.
    """

    def stored(name: str, tensor: Tensor) -> Tensor:
        new = state.get(name, tensor)
        if new is tensor or not isinstance(tensor, nn.Parameter):
            return new
        return nn.Parameter(new.detach(), (new if isinstance(new, nn.Parameter) else tensor).requires_grad)

    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict={name: stored(name, tensor) for name, tensor in program.state_dict.items()},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
