"""An exported program made ready for conversion to ONNX: no assertions, tensor outputs only."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from mfcompile.exporters.program_rewrites import rewrite

# Operators that check and compute nothing; the converter knows some of them, but not what feeds them.
CHECKS = (
    "aten._assert_",
    "aten._linalg_check_errors",
    "aten.sym_constrain_range",
    "aten._functional_assert_",
    "aten._functional_sym_constrain",
)
_NO_TENSOR = (ConstantArgument, SymIntArgument, SymFloatArgument, SymBoolArgument)


def prepare_program(program: ExportedProgram) -> ExportedProgram:
    """A program with the same tensor outputs that the ONNX converter accepts more often.

    Assertions go, together with what only they use; a few operators are rewritten (``program_rewrites``); outputs that
    are None, numbers or updated buffers go. Parameters and buffers are shared with the given program, which is not changed.

    Args:
        program: as torch.export gives it.

    Returns:
        A program over a copy of the graph.
    """
    graph = copy.deepcopy(program.graph)
    for original, node in zip(program.graph.nodes, graph.nodes, strict=True):
        node.name = original.name  # copying renames nodes called like a Python builtin ("input"); the signature does not
    for node in reversed(list(graph.nodes)):
        if _is_check(node):
            _erase_with_inputs(node)
    rewrite(graph)
    signature = program.graph_signature
    kept = [index for index, spec in enumerate(signature.output_specs) if _is_user_tensor(spec.kind, spec.arg)]
    (output,) = (node for node in graph.nodes if node.op == "output")
    values = tuple(output.args[0])
    output.args = (tuple(values[index] for index in kept),)
    graph.lint()
    output_specs = [
        replace(signature.output_specs[index], arg=TensorArgument(name=values[index].name))  # a rewrite may give another node
        for index in kept
    ]
    return ExportedProgram(
        root=fx.GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(input_specs=list(signature.input_specs), output_specs=output_specs),
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=_with_outputs(program.module_call_graph, output_specs),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def tensor_input_nodes(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the placeholders of tensor inputs, in order."""
    return tuple(
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    )


def tensor_aliases(program: ExportedProgram) -> dict[str, tuple[str, ...]]:
    """Name -> every name of the state dict (and constants) under which the very same tensor is registered."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in _named_tensors(program):
        groups.setdefault(_place(tensor, name), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def _named_tensors(program: ExportedProgram) -> Iterator[tuple[str, torch.Tensor]]:
    yield from program.state_dict.items()
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and name not in program.state_dict:
            yield name, value


def _place(tensor: torch.Tensor, name: str) -> tuple[object, ...]:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return (name,)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _is_check(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and str(node.target).startswith(CHECKS)
        and not node.users
    )


def _is_user_tensor(kind: OutputKind, argument: object) -> bool:
    return kind is OutputKind.USER_OUTPUT and not isinstance(argument, _NO_TENSOR)


def _with_outputs(calls: list[ModuleCallEntry], output_specs: list[OutputSpec]) -> list[ModuleCallEntry]:
    """The root module's call returns a flat tuple of these outputs."""
    root, *others = calls
    signature = root.signature
    assert signature is not None  # the root of a program always has one
    flat = pytree.tree_structure(tuple(range(len(output_specs))))
    return [replace(root, signature=replace(signature, outputs=[spec.arg for spec in output_specs], out_spec=flat)), *others]


def _erase_with_inputs(node: fx.Node) -> None:
    """Erase a node, and then whatever fed only it; placeholders stay."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for feeding in inputs:
        if not feeding.users and feeding.op in ("call_function", "get_attr"):
            _erase_with_inputs(feeding)
