"""Editing the graph of a torch.export program: functions of tensors put in, sizes computed again, nodes sorted, made whole.

What is put in is written as plain torch code and traced over the values of the graph, so that it is made of the same
operators as the rest, with free sizes where the rest has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mfcompile.errors import PreconditionError

SCORING = "mfcompile_scoring"
"""Mark in the metadata of nodes that only choose which tokens stay: fewer heads may change what they choose."""

_FREE_SIZES = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)

_STACKS = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


class _UnknownTraitsError(Exception):
    """An argument of a kind that is not compared."""


class ProgramEditor:
    """A copy of a program's graph that can be changed; the program is not.

    Attributes:
        graph: the copy.
        nodes: name of a node of the program -> its copy.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph: fx.Graph = copy.deepcopy(program.graph)
        for original, node in zip(program.graph.nodes, self.graph.nodes, strict=True):
            node.name = original.name  # copying renames nodes called like a Python builtin; the signature does not
        self.nodes = {node.name: node for node in self.graph.nodes}
        self._constants: dict[str, Tensor] = {}
        self._stored: dict[str, Tensor] = {}
        values = [node.meta.get("val") for node in self.graph.nodes if node.op == "placeholder"]
        modes = [value.fake_mode for value in values if hasattr(value, "fake_mode")]
        if not modes:
            raise PreconditionError("the program's placeholders hold no fake tensors: export the model again")
        self._mode: Any = modes[0]
        self._results: dict[tuple[Any, ...], Any] = {}
        """What operators gave for operands of the same sizes: blocks repeat, and sizes of free batches are slow to compute."""

    @property
    def output(self) -> fx.Node:
        """The output node."""
        found: fx.Node = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        return found

    def order(self) -> dict[fx.Node, int]:
        """Position of every node."""
        return {node: position for position, node in enumerate(self.graph.nodes)}

    def insert(
        self,
        function: Callable[..., Any],
        operands: Sequence[fx.Node],
        after: fx.Node,
        *,
        marks: Mapping[str, Any] | None = None,
    ) -> list[fx.Node]:
        """Put in what a function of tensors computes.

        Args:
            function: takes one tensor per operand, gives a tensor or a tuple of them; of torch operators alone. Tensors that
                it brings along become constants of the program.
            operands: nodes that it is applied to.
            after: whose submodule the new nodes count as; they stand behind it until the nodes are sorted.
            marks: metadata of the new nodes.

        Returns:
            One node per tensor that it gives.
        """
        values = self._told_apart([node.meta["val"] for node in operands])

        def traced(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self._mode:
                found = function(*tensors)
            return (found,) if isinstance(found, Tensor) else tuple(found)

        lenient, self._mode.allow_non_fake_inputs = self._mode.allow_non_fake_inputs, True
        try:
            module = make_fx(traced, tracing_mode="real", pre_dispatch=True)(*values)
        finally:
            self._mode.allow_non_fake_inputs = lenient
        meta = {key: after.meta[key] for key in _STACKS if key in after.meta} | dict(marks or {})
        return self._inline(module, operands, after, meta)

    def _told_apart(self, values: Sequence[Tensor]) -> list[Tensor]:
        """One tensor object per operand, since nodes of one size may share theirs, and tracing goes by objects."""
        with self._mode:
            return [item.detach() if any(item is other for other in values[:at]) else item for at, item in enumerate(values)]

    def _inline(
        self, module: fx.GraphModule, operands: Sequence[fx.Node], after: fx.Node, meta: Mapping[str, Any]
    ) -> list[fx.Node]:
        copies: dict[fx.Node, fx.Node] = {}
        given = iter(operands)
        module.graph.eliminate_dead_code()
        last = after
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "get_attr":
                copies[node] = self.add_constant(getattr(module, str(node.target)))
            elif node.op == "output":
                return [copies[item] for item in node.args[0]]
            else:
                with self.graph.inserting_after(last):
                    last = copies[node] = self.graph.node_copy(node, copies.__getitem__)
                last.meta = {"val": node.meta["val"], **meta}
        raise AssertionError("a traced graph ends with an output")

    def add_constant(self, tensor: Tensor) -> fx.Node:
        """A placeholder that holds a constant of the program."""
        taken = {*self.program.constants, *self._constants, *(node.name for node in self.graph.nodes)}
        number = next(index for index in range(len(taken) + 1) if f"mfcompile_tokens_{index}" not in taken)
        specs = self.program.graph_signature.input_specs
        users = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
        first_input = next(item for item in self._placeholders() if item.name in users)
        with self.graph.inserting_before(first_input):
            node = self.graph.placeholder(f"mfcompile_tokens_{number}")
        self._mode.allow_non_fake_inputs, before = True, self._mode.allow_non_fake_inputs
        try:
            node.meta["val"] = self._mode.from_tensor(tensor.detach(), static_shapes=True)
        finally:
            self._mode.allow_non_fake_inputs = before
        self._constants[node.name] = tensor.detach()
        return node

    def store(self, node: fx.Node, name: str, tensor: Tensor) -> None:
        """Another tensor in place of a stored one: a parameter, a buffer or a constant, of any sizes.

        Args:
            node: its placeholder.
            name: its FQN in the state dict, or its name among the constants.
            tensor: takes its place; the program keeps the old one.
        """
        lenient, self._mode.allow_non_fake_inputs = self._mode.allow_non_fake_inputs, True
        try:
            node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        finally:
            self._mode.allow_non_fake_inputs = lenient
        node.meta.pop("tensor_meta", None)
        self._stored[name] = tensor

    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def refresh(self, node: fx.Node) -> None:
        """Compute the sizes of a node's result again from those of its operands.

        Raises:
            RuntimeError and others: what the operator raises for sizes that do not fit.
        """
        args, kwargs = pytree.tree_map_only(fx.Node, lambda item: item.meta["val"], (node.args, node.kwargs))
        key = _signature(node.target, args, kwargs)
        result = None if key is None else self._results.get(key)
        if result is None:
            with self._mode, torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        if key is not None:
            self._results[key] = result
        node.meta["val"] = result
        node.meta.pop("tensor_meta", None)

    def sort(self) -> None:
        """Put every node behind what it reads, and otherwise leave the order."""
        done: set[fx.Node] = set()
        last: fx.Node | None = None
        for first in list(self.graph.nodes):
            pending = [first]
            while pending:
                node = pending[-1]
                missing = [item for item in node.all_input_nodes if item not in done]
                if node in done:
                    pending.pop()
                elif missing:
                    pending += missing
                else:
                    pending.pop()
                    done.add(node)
                    if last is not None:
                        last.append(node)
                    last = node

    def finish(self, named: Mapping[str, fx.Node] | None = None) -> ExportedProgram:
        """The changed graph as a program over the same weights.

        Args:
            named: what the program gives to its caller, as a dict, in place of what it gave.

        Returns:
            A program with the same inputs, and, without ``named``, outputs in the same order.
        """
        program = self.program
        specs = program.graph_signature.output_specs
        if named is not None:
            specs = self._give(named)
        self.graph.lint()
        signature = program.graph_signature
        new = [InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name), name) for name in self._constants]
        known = {spec.arg.name: spec for spec in (*signature.input_specs, *new)}
        inputs = [known[node.name] for node in self._placeholders()]
        (values,) = self.output.args
        outputs = [
            replace(spec, arg=TensorArgument(value.name))
            if isinstance(value, fx.Node) and isinstance(spec.arg, TensorArgument)
            else spec
            for spec, value in zip(specs, values, strict=True)  # type: ignore[arg-type]
        ]
        users = [spec.arg for spec in outputs if spec.kind is OutputKind.USER_OUTPUT]
        root, *others = program.module_call_graph
        if root.signature is not None:
            spec = root.signature.out_spec if named is None else pytree.tree_structure(dict.fromkeys(named, 0))
            root = replace(root, signature=replace(root.signature, outputs=users, out_spec=spec))
        return ExportedProgram(
            root=fx.GraphModule(program.graph_module, self.graph),
            graph=self.graph,
            graph_signature=ExportGraphSignature(input_specs=inputs, output_specs=outputs),
            state_dict={name: self._stored.get(name, tensor) for name, tensor in program.state_dict.items()},
            range_constraints=dict(program.range_constraints),
            module_call_graph=[root, *others],
            example_inputs=program.example_inputs,
            constants={
                **{name: self._stored.get(name, value) for name, value in program.constants.items()},
                **self._constants,
            },
            verifiers=program.verifiers,
        )

    def _give(self, named: Mapping[str, fx.Node]) -> list[OutputSpec]:
        """Put other tensors in place of those that the program gives to its caller; what it writes into buffers stays."""
        specs = self.program.graph_signature.output_specs
        (values,) = self.output.args
        assert isinstance(values, (list, tuple))  # by the contract of exported programs
        kept = [(spec, value) for spec, value in zip(specs, values, strict=True) if spec.kind is not OutputKind.USER_OUTPUT]
        given = [(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None), node) for node in named.values()]
        self.output.args = (tuple(value for _, value in (*kept, *given)),)
        return [spec for spec, _ in (*kept, *given)]


def _signature(target: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """What decides the sizes of a result; None where that cannot be told, or where each result has a free size of its own."""
    if not isinstance(target, OpOverload) or not _FREE_SIZES.isdisjoint(target.tags):
        return None
    try:
        return target, _traits(args), _traits(kwargs)
    except _UnknownTraitsError:
        return None


def _traits(value: Any) -> Any:
    """All of a value but what its tensors hold, to be compared."""
    if isinstance(value, Tensor):
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        return value.dtype, value.device, value.layout, value.ndim, tuple(map(_number, numbers)), value.is_conj()
    if isinstance(value, torch.SymInt):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_traits, value))
    if isinstance(value, dict):
        return tuple((name, _traits(item)) for name, item in value.items())
    if value is None or isinstance(value, _PLAIN):
        return type(value), value  # 1, 1.0 and True are equal, and make results of other dtypes
    raise _UnknownTraitsError


def _number(size: Any) -> Any:
    """A size; a free one goes by its object, not by its value: what is traced names free sizes by where they come from."""
    return size.node if isinstance(size, torch.SymInt) else size
