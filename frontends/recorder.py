"""The recorder: run a model once and write every operator that it executes into an fx graph.

It needs nothing from the model but that it runs. The graph is specialised to the example (its shapes, its branches,
the numbers that were read from tensors) and says so. Run in inference mode, composite operators (``aten.linear``,
``aten.scaled_dot_product_attention``) reach the recorder whole, as in a torch.export program.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.errors import CaptureError
from mfcompile.graph import BakedScalar, InputSpec, ModuleCall, TensorValue
from mfcompile.inputs import ExampleInputs, output_tensors


@dataclass
class Recording:
    """What one recorded run gives; ``frontends.capture`` turns it into a CapturedGraph."""

    graph_module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    parameter_nodes: dict[str, str]
    baked_scalars: tuple[BakedScalar, ...]
    outputs: dict[str, Tensor]
    lifted_constants: int


def record(module: nn.Module, inputs: ExampleInputs) -> Recording:
    """Run ``module`` once in eval mode and record every aten operator that it executes.

    The module is left as it was, training mode included. Parameters are shared with the graph.

    Args:
        module: any module that runs eagerly.
        inputs: the arguments of the one call.

    Returns:
        The recorded graph and what belongs to it.

    Raises:
        CaptureError: the model raised, or gave no tensor.
    """
    with eval_mode(module), _whole_operators():
        recorder = _Recorder(module)
        recorder.add_inputs(inputs)
        try:
            with torch.inference_mode(), track_modules(module, recorder.modules), recorder:
                result = inputs.call(module)
        except Exception as error:
            raise CaptureError(
                f"{type(module).__name__} raised {type(error).__name__} when it was run on the example inputs "
                f"(in {recorder.modules.describe()}): {error}. The model must run eagerly on example_inputs in eval mode"
            ) from error
    return recorder.finish(result)


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch every submodule to eval mode for the duration of the block."""
    training = [item for item in module.modules() if item.training]
    for item in training:
        item.training = False
    try:
        yield
    finally:
        for item in training:
            item.training = True


@contextlib.contextmanager
def _whole_operators() -> Iterator[None]:
    """Keep torch from replacing a whole attention layer by one fused operator that hides its weights."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@dataclass
class ModuleTracker:
    """The stack of submodule calls that are running."""

    names: dict[int, str]
    stack: list[ModuleCall] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def enter(self, module: nn.Module) -> None:
        """A submodule starts."""
        path = self.names.get(id(module))
        if path is None:
            return
        call = self.counts.get(path, 0)
        self.counts[path] = call + 1
        self.stack.append(ModuleCall(path, call))

    def leave(self, module: nn.Module) -> None:
        """A submodule returned or raised."""
        path = self.names.get(id(module))
        if path is not None and self.stack and self.stack[-1].path == path:
            self.stack.pop()

    def describe(self) -> str:
        """Name of the innermost running submodule, for messages."""
        return self.stack[-1].path or "the model itself" if self.stack else "the model itself"


@contextlib.contextmanager
def track_modules(module: nn.Module, tracker: ModuleTracker) -> Iterator[None]:
    """Keep ``tracker.stack`` up to date while submodules of ``module`` run."""
    handles = []
    for item in module.modules():
        if isinstance(item, torch.jit.ScriptModule):
            continue
        handles.append(item.register_forward_pre_hook(lambda mod, _: tracker.enter(mod), prepend=True))
        handles.append(item.register_forward_hook(lambda mod, _, __: tracker.leave(mod), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_names(module: nn.Module) -> dict[int, str]:
    """id of every submodule -> its first name."""
    return {id(item): name for name, item in module.named_modules()}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Writes operators into an fx.Graph; holds every tensor, since a freed one's id would be used again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.modules = ModuleTracker(module_names(module))
        self.parameter_nodes: dict[str, str] = {}
        self.baked: list[BakedScalar] = []
        self.inputs: list[InputSpec] = []
        self.lifted_constants = 0
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        self._depends_on_input: set[fx.Node] = set()
        self._names = {id(tensor): name for name, tensor in _named_tensors(module)}

    def add_inputs(self, inputs: ExampleInputs) -> None:
        """One placeholder per tensor input."""
        for name, tensor in inputs.tensors().items():
            node = self.graph.placeholder(name.replace(".", "_"))
            self.inputs.append(InputSpec(name, node.name, tuple(tensor.shape), tensor.dtype))
            self._depends_on_input.add(node)
            self._remember(tensor, node)

    def finish(self, result: Any) -> Recording:
        """Close the graph with the model's outputs."""
        outputs = output_tensors(result)
        if not outputs:
            raise CaptureError(
                f"the model returned {type(result).__name__} without a tensor in it: there is nothing to capture. "
                f"Return a tensor, a tuple or a dict of tensors"
            )
        self.graph.output(tuple(self._node_of(tensor) for tensor in outputs.values()))
        self.graph.lint()
        graph_module = fx.GraphModule(self.root, self.graph)
        return Recording(
            graph_module,
            tuple(self.inputs),
            tuple(outputs),
            self.parameter_nodes,
            tuple(self.baked),
            outputs,
            self.lifted_constants,
        )

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        node_args, node_kwargs = pytree.tree_map(
            lambda leaf: self._node_of(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)) and not func._schema.is_mutable:
            self._bake(func, node_args, result)
            return result
        node = self.graph.call_function(func, tuple(node_args), dict(node_kwargs))
        self._describe(node, result)
        if any(source in self._depends_on_input for source in node.all_input_nodes):
            self._depends_on_input.add(node)
        self._bind(result, node)
        return result

    def _bake(self, func: Any, node_args: Any, result: Any) -> None:
        """A tensor was read as a Python number: from here on the graph holds that number."""
        sources = [leaf for leaf in pytree.tree_leaves(node_args) if isinstance(leaf, fx.Node)]
        if sources and isinstance(result, (bool, int, float)):
            from_input = any(source in self._depends_on_input for source in sources)
            self.baked.append(BakedScalar(sources[0].name, result, self.modules.describe(), from_input))

    def _bind(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, (list, tuple)):
            for index, item in enumerate(result):
                if isinstance(item, (Tensor, list, tuple)):
                    picked = self.graph.call_function(operator.getitem, (node, index))
                    self._describe(picked, item)
                    if node in self._depends_on_input:
                        self._depends_on_input.add(picked)
                    self._bind(item, picked)

    def _describe(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = pytree.tree_map(
            lambda leaf: TensorValue(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf,
            list(value) if isinstance(value, (list, tuple)) else value,
        )
        node.meta["module_stack"] = tuple(self.modules.stack)

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta.setdefault("val", TensorValue(tuple(tensor.shape), tensor.dtype))
        node.meta.setdefault("module_stack", tuple(self.modules.stack))
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            node = self._attribute(tensor)
        return node

    def _attribute(self, tensor: Tensor) -> fx.Node:
        """A parameter, a buffer, or a tensor that existed before the run (then a constant of the graph)."""
        fqn = self._names.get(id(tensor))
        if fqn is None:
            target = f"_constant_{self.lifted_constants}"
            self.lifted_constants += 1
            self.root.register_buffer(target, tensor.detach(), persistent=False)
        else:
            target = fqn
            _attach(self.root, fqn, tensor)
        node = self.graph.get_attr(target)
        if fqn is not None:
            self.parameter_nodes[node.name] = fqn
        node.meta["module_stack"] = tuple(self.modules.stack)
        self._remember(tensor, node)
        return node


def _attach(root: nn.Module, fqn: str, tensor: Tensor) -> None:
    """Hang a shared parameter or buffer into ``root`` under its FQN."""
    *path, leaf = fqn.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=False)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers()
    yield from module.named_parameters()


def tensor_aliases(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """FQN of every parameter -> all names under which it is registered, the FQN first."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: tuple(found) for found in names.values()}


def replay(graph_module: Callable[..., Any], inputs: ExampleInputs) -> tuple[Tensor, ...]:
    """Run a captured graph on the tensors of ``inputs``."""
    with torch.inference_mode():
        result = graph_module(*inputs.tensors().values())
    return tuple(result)
