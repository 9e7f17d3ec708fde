"""A torch.export program as a module: the exported module's names and submodules, the program's operators.

The graph of a program is flat. Which submodule each operator belongs to is written beside it, and the tree of submodules
is built again from that and from the names of the weights, so that blocks, patterns and masks work as on the module that
was exported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mfcompile.frontends.module_calls import ReportsCalls
from mfcompile.graph import ExportedModel, ModuleCall
from mfcompile.inputs import ExampleInputs
from mfcompile.rewriting import over_state

_SEQUENTIAL = "torch.nn.modules.container.Sequential"
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch writes beside nodes that its own passes added."""


class ProgramModule(ReportsCalls):
    """Runs a program on its module's weights, node by node. Made by ``program_module``.

    Attributes:
        held: the program; copies of the module share it.
    """

    held: _Held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the exported forward gave; arguments by its names or in its order."""
        held = self.held
        values = dict(held.signature.bind(*args, **kwargs).arguments)
        count = len(held.names) - len(held.keywords)
        positional = tuple(values[name] for name in held.names[:count])
        keywords = {name: values[name] for name in held.keywords}
        flat = held.in_spec.flatten_up_to((positional, keywords))
        results = _Runner(self).run(*flat, enable_io_processing=False)
        return pytree.tree_unflatten(results, held.out_spec)

    def own_inputs(self) -> dict[str, Any] | None:
        """The example inputs that the program was exported with, by the names of forward's parameters; None without any."""
        example = self.held.program.example_inputs
        if example is None:
            return None
        args, kwargs = example
        return dict(zip(self.held.names, [*args, *kwargs.values()], strict=True))

    def exported(self, inputs: ExampleInputs, output_names: tuple[str, ...]) -> ExportedModel:
        """The program as what ONNX files are made from.

        Args:
            inputs: what the model was captured with; stands in for the example inputs of a program that has none.
            output_names: of the tensors that it gives, in order.
        """
        held = self.held
        values = self.own_inputs() or dict(held.signature.bind(*inputs.args, **inputs.kwargs).arguments)
        count = len(held.names) - len(held.keywords)
        names, axes = _tensor_inputs(held.program, {name: values[name] for name in held.names})
        args = tuple(values[name] for name in held.names[:count])
        example = ExampleInputs(args, {name: values[name] for name in held.keywords}, names)
        return ExportedModel(held.program, "the .pt2 archive", names, output_names, axes, example)

    def save_archive(self, path: Path) -> None:
        """Write the program with the module's weights as they are now."""
        own = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers(remove_duplicate=False))
        changed = over_state(self.held.program, own)
        torch.export.save(changed, path)


def program_module(program: ExportedProgram) -> ProgramModule:
    """The module of a program; its parameters are those of the program's state dict, under their FQNs.

    Args:
        program: as torch.export gives it, or as an archive holds it.
    """
    runnable: Any = program.module(check_guards=False)
    graph: fx.Graph = runnable.graph
    calls = {node: _calls(node) for node in graph.nodes}
    classes = _classes(graph.nodes)
    kinds: dict[str, type[nn.Module]] = {}
    root_class = type(_short(classes.get("", "ExportedProgram")), (ProgramModule,), {"__doc__": ProgramModule.__doc__})
    model: ProgramModule = root_class()
    attributes = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    owners = (name.rpartition(".")[0] for name in (*program.state_dict, *attributes))  # in the order of registration
    every = dict.fromkeys(path[:end] for path in (*owners, *classes) if path for end in _ends(path))
    for path in every:
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner).add_module(leaf, _part(path, classes, every, kinds)())
    _add_tensors(model, program, runnable)
    args_spec, kwargs_spec = program.call_spec.in_spec.children()
    keywords = tuple(kwargs_spec.context)
    names = _argument_names(program, args_spec.num_children, keywords)
    model.held = _Held(program, graph, calls, names, keywords)
    return model.eval()


class _Held:
    """What a module keeps of its program. It is never written to, so that copies share it."""

    def __init__(
        self,
        program: ExportedProgram,
        graph: fx.Graph,
        calls: Mapping[fx.Node, tuple[ModuleCall, ...]],
        names: tuple[str, ...],
        keywords: tuple[str, ...],
    ) -> None:
        self.program, self.graph, self.calls, self.names, self.keywords = program, graph, calls, names, keywords
        self.in_spec, self.out_spec = program.call_spec.in_spec, program.call_spec.out_spec
        self.signature = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


class _Runner(fx.Interpreter):
    """Runs the graph with the module's own attributes, saying which submodules each node belongs to."""

    def __init__(self, module: ProgramModule) -> None:
        super().__init__(module, graph=module.held.graph)
        self._owner, self._calls = module, module.held.calls

    def run_node(self, n: fx.Node) -> Any:
        """See fx.Interpreter."""
        self._owner.report(self._calls[n])
        return super().run_node(n)


class _Part(nn.Module):
    """A submodule of the exported module: it holds weights and a place in the tree; the program runs them."""


def _part(path: str, classes: Mapping[str, str], every: Iterable[str], kinds: dict[str, type[nn.Module]]) -> type[nn.Module]:
    """Class of the submodule at ``path``: containers are containers again, others have a class for each exported class."""
    if path in classes:
        if classes[path] == _SEQUENTIAL:
            return nn.Sequential
        return kinds.setdefault(classes[path], type(_short(classes[path]), (_Part,), {"__doc__": _Part.__doc__}))
    # A container of layers is never called itself; its items are numbered.
    items = [other[len(path) + 1 :] for other in every if other.startswith(path + ".") and "." not in other[len(path) + 1 :]]
    return nn.ModuleList if items and all(item.isdigit() for item in items) else _Part


def _classes(nodes: Iterable[fx.Node]) -> dict[str, str]:
    """Path of every submodule that was called -> name of its class."""
    found: dict[str, str] = {}
    for node in nodes:
        for path, kind in _stack(node).values():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            found.setdefault(path.partition("@")[0], name)
    return found


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return {key: value for key, value in stack.items() if key != _NOWHERE}


def _calls(node: fx.Node) -> tuple[ModuleCall, ...]:
    """The submodule calls that a node belongs to, outermost first; torch counts repeated calls as ``path@1``."""
    found = []
    for key, (path, _) in _stack(node).items():
        count = str(key).rpartition("@")[2]
        found.append(ModuleCall(path.partition("@")[0], int(count) if "@" in str(key) and count.isdigit() else 0))
    return tuple(found)


def _add_tensors(model: ProgramModule, program: ExportedProgram, runnable: nn.Module) -> None:
    """Register weights, constants and the graphs of control-flow operators under their names; tied weights stay one."""
    known: dict[tuple[object, ...], nn.Parameter] = {}
    for name, tensor in program.state_dict.items():
        owner, leaf = _place(model, name)
        if isinstance(tensor, nn.Parameter):
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
            owner.register_parameter(leaf, known.setdefault(key, tensor))
        else:
            owner.register_buffer(leaf, tensor)
    for node in runnable.graph.nodes:  # type: ignore[union-attr]
        if node.op == "get_attr":
            owner, leaf = _place(model, str(node.target))
            if not hasattr(owner, leaf):
                value = _attribute(runnable, str(node.target))
                if isinstance(value, nn.Module):
                    owner.add_module(leaf, value)
                elif isinstance(value, Tensor):
                    owner.register_buffer(leaf, value, persistent=False)
                else:  # how an operator over functions packs its arguments
                    setattr(owner, leaf, value)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _attribute(root: Any, name: str) -> Any:
    for part in name.split("."):
        root = getattr(root, part)
    return root


def _argument_names(program: ExportedProgram, positional: int, keywords: tuple[str, ...]) -> tuple[str, ...]:
    signature = program.module_call_graph[0].signature
    given = list(signature.forward_arg_names or []) if signature is not None else []
    names = given[:positional] if len(given) >= positional else [f"input_{index}" for index in range(positional)]
    return (*names, *keywords)


def _tensor_inputs(program: ExportedProgram, values: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, dict[int, str]]]:
    """Names of the tensor inputs in the program's order, and the dimensions that it leaves free, by name."""
    flat, _ = pytree.tree_flatten_with_path(dict(values))
    tensors = [(".".join(_key(key) for key in path), leaf) for path, leaf in flat if isinstance(leaf, Tensor)]
    users = set(program.graph_signature.user_inputs)
    given = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    shapes = [value.shape for value in given if isinstance(value, Tensor)]
    symbols: dict[str, str] = {}
    axes: dict[str, dict[int, str]] = {}
    for (name, tensor), shape in zip(tensors, shapes, strict=True):
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                axes.setdefault(name, {})[dim] = symbols.setdefault(str(size), _axis(dim, tensor, symbols))
    return tuple(name for name, _ in tensors), axes


def _axis(dim: int, tensor: Tensor, taken: Mapping[str, str]) -> str:
    """Name of a free dimension: the first one is the batch, the second of integers a sequence."""
    is_sequence = dim == 1 and not tensor.is_floating_point()
    wanted = "batch" if dim == 0 else "sequence" if is_sequence else f"dim_{dim}"
    count = sum(name == wanted or name.startswith(f"{wanted}_") for name in taken.values())
    return f"{wanted}_{count + 1}" if count else wanted


def _key(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _ends(path: str) -> list[int]:
    """Where the prefixes of a path end, shortest first."""
    return [index for index, letter in enumerate(path) if letter == "."] + [len(path)]


def _short(name: str) -> str:
    return name.rpartition(".")[2] or name
