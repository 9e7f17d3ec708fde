"""CapturedGraph: what every front end produces and every pass reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from mfcompile.inputs import ExampleInputs
    from mfcompile.masks import MaskSet


@dataclass(frozen=True)
class ModuleCall:
    """One call of one submodule while the model ran.

    Attributes:
        path: name of the submodule in the user's model; "" is the model itself.
        call: how many times this submodule had been called before, 0 for the first call.
    """

    path: str
    call: int


@dataclass(frozen=True)
class TensorValue:
    """What is known of the tensor that a node computes (kept in ``node.meta["val"]`` of a recorded graph)."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class InputSpec:
    """One tensor among the example inputs.

    Attributes:
        name: the forward parameter, followed by keys and positions for nested inputs ("batch.image").
        node: name of its placeholder in the graph.
        shape: sizes in the example.
        dtype: dtype in the example.
    """

    name: str
    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class CaptureAttempt:
    """One front end that was tried, and what came of it."""

    frontend: str
    succeeded: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class BakedScalar:
    """A Python number that the model read from a tensor while it was recorded, now a constant of the graph."""

    node: str
    value: int | float | bool
    module: str
    from_input: bool


@dataclass(frozen=True)
class Diagnostic:
    """Something a pass left alone or decided by a weaker rule, and why."""

    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}"


@dataclass(frozen=True)
class ExportedModel:
    """A re-executable program of the model, from torch.export; what ONNX files are made from.

    Attributes:
        program: the ExportedProgram; its state dict shares storage with the user's module, names are FQNs.
        route: which way of exporting succeeded ("torch.export", "torch.export without cache", ...).
        input_names: names of the tensor inputs, in the program's order.
        output_names: names of the tensor outputs, in the program's order.
        dynamic_axes: input name -> dimension -> axis name ("batch", "sequence"); only dimensions that stayed symbolic.
        example_inputs: the inputs that the program was exported with (a batch of one is repeated to two, where the program
            then takes any number).
        notes: dimensions that were asked to be dynamic and are fixed, and why.
        metadata: key -> text that a file made from the program carries.
    """

    program: torch.export.ExportedProgram
    route: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    example_inputs: ExampleInputs
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CapturedGraph:
    """A model as an fx graph, together with the module and the inputs that it came from.

    Attributes:
        graph_module: one aten operator per node, in execution order. ``node.meta["val"]`` is a
            TensorValue (or a nested structure of them), ``node.meta["module_stack"]`` the tuple of
            ModuleCall that was running, outermost first.
        module: the user's own module; its parameters are shared with the graph, never copied.
        example_inputs: the inputs that the graph was captured with.
        inputs: one InputSpec per placeholder, in order.
        output_names: one name per tensor output, in order.
        parameter_nodes: name of a ``get_attr`` node -> FQN of the parameter or buffer that it reads.
        aliases: FQN -> every name under which the same parameter is registered (the FQN first).
        frontend: which front end made ``graph_module``.
        specialised: what of the example the graph is fixed to, in words.
        baked_scalars: numbers that the model read from tensors while it was recorded.
        attempts: every front end that was tried, in order.
        exported: the model as a torch.export program, once it has been asked for and succeeded.
        remembered: inputs that the graph reads, and the module may not: it remembers what an earlier call made of them.
        masks: the masks that the graph applies, once a pass has rewritten it.
        versions: versions of the packages that took part.
        diagnostics: what transforms of the graph could not do as asked, or what means something else since.
    """

    graph_module: fx.GraphModule
    module: nn.Module
    example_inputs: ExampleInputs
    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    parameter_nodes: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]
    frontend: str
    specialised: tuple[str, ...] = ()
    baked_scalars: tuple[BakedScalar, ...] = ()
    attempts: tuple[CaptureAttempt, ...] = ()
    exported: ExportedModel | None = None
    remembered: tuple[str, ...] = ()
    masks: MaskSet | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``graph_module``."""
        return self.graph_module.graph

    def node(self, name: str) -> fx.Node:
        """The node of that name.

        Raises:
            KeyError: the graph has no such node.
        """
        for candidate in self.graph.nodes:
            if candidate.name == name:
                found: fx.Node = candidate
                return found
        raise KeyError(name)

    def parameter(self, fqn: str) -> Tensor:
        """The parameter or buffer of that FQN, shared with the user's module."""
        owner, _, leaf = fqn.rpartition(".")
        value = getattr(self.module.get_submodule(owner), leaf)
        if not isinstance(value, Tensor):
            raise KeyError(fqn)
        return value

    def __str__(self) -> str:
        lines = [f"CapturedGraph({type(self.module).__name__}, frontend={self.frontend}, {len(self.graph.nodes)} nodes)"]
        lines += [f"  input {spec.name}: {tuple(spec.shape)} {spec.dtype}" for spec in self.inputs]
        lines += [f"  output {name}" for name in self.output_names]
        lines += [f"  specialised: {text}" for text in self.specialised]
        lines += [f"  note: {item}" for item in self.diagnostics]
        return "\n".join(lines)


def module_stack(node: fx.Node) -> tuple[ModuleCall, ...]:
    """The submodule calls that were running when the node was captured, outermost first."""
    stack: Any = node.meta.get("module_stack", ())
    return tuple(stack)


def tensor_values(node: fx.Node) -> list[TensorValue]:
    """Every TensorValue in ``node.meta["val"]``, flattened; empty for nodes that give no tensor."""
    found: list[TensorValue] = []

    def visit(value: Any) -> None:
        if isinstance(value, TensorValue):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(node.meta.get("val"))
    return found
