"""The recorder: run a model once and write every operator that it executes into an fx graph.

It needs nothing from the model but that it runs. The graph is specialised to the example (its shapes, its branches,
the numbers that were read from tensors) and says so. State that the run writes (counters, queues, clamped
temperatures) is put back, and the graph works on a copy of it. Run in inference mode, composite operators (``aten.linear``,
``aten.scaled_dot_product_attention``) reach the recorder whole, as in a torch.export program.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.control_flow import eager_code, operator_name, run_eagerly, user_line
from mfcompile.errors import CaptureError
from mfcompile.frontends.module_calls import ModuleTracker, eval_mode, module_names, track_modules
from mfcompile.frontends.without_weights import PartialRun, has_no_values
from mfcompile.graph import BakedScalar, InputSpec, TensorValue
from mfcompile.inputs import ExampleInputs, output_tensors
from mfcompile.module_copy import KeptState, storage_address, written_tensors

_READS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})
"""Ways to read a tensor that no operator shows; ``.item()``, ``bool()`` and indexing are operators."""

_LISTED = 16
"""Numbers of one reading that are listed; a whole array may be read."""


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
    random_operators: int
    control_flow: tuple[str, ...] = ()
    written: tuple[str, ...] = ()


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
    inputs = _told_apart(inputs)
    with eval_mode(module), eager_code():
        recorder = _Recorder(module)
        recorder.add_inputs(inputs)
        try:
            with torch.inference_mode(), track_modules(module, recorder.modules), recorder, _ReadingMode(recorder):
                result = inputs.call(module)
            return recorder.finish(result)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(module).__name__} raised {type(error).__name__} when it was run on the example inputs "
                f"(in {recorder.modules.where_raised(error)}): {error}. The model must run eagerly on example_inputs in "
                f"eval mode"
            ) from error
        finally:
            recorder.state.restore()


def _told_apart(inputs: ExampleInputs) -> ExampleInputs:
    """One tensor object per input: ``labels`` may be the very tensor that ``input_ids`` is."""
    seen: set[int] = set()

    def own(_: str, tensor: Tensor) -> Tensor:
        address = storage_address(tensor)
        if address in seen:
            return tensor.clone()
        seen.add(address)
        return tensor

    return inputs.map_tensors(own)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Writes operators into an fx.Graph; keeps no tensor alive that the model lets go."""

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.modules = ModuleTracker(module_names(module))
        self._partial = PartialRun() if has_no_values(module) else None
        self.parameter_nodes: dict[str, str] = {}
        self.baked: list[BakedScalar] = []
        self.inputs: list[InputSpec] = []
        self.lifted_constants = 0
        self.random_operators = 0
        self.control_flow: list[str] = []
        self.state = KeptState(module)
        self._nodes: dict[int, tuple[int, fx.Node, weakref.ref[Tensor]]] = {}
        self._by_memory: dict[tuple[object, ...], tuple[fx.Node, StorageWeakRef]] = {}
        self._from_input: set[int] = set()
        self._attributes: list[tuple[fx.Node, Tensor]] = []
        self._names: dict[object, str] = {}
        self._registered = list(_named_tensors(module))
        for name, tensor in self._registered:
            self._names[id(tensor), storage_address(tensor)] = name
            if tensor.layout is torch.strided and tensor.numel():
                self._names.setdefault(_memory(tensor), name)

    def add_inputs(self, inputs: ExampleInputs) -> None:
        """One placeholder per tensor input."""
        for name, tensor in inputs.tensors().items():
            node = self.graph.placeholder(name.replace(".", "_"))
            node.target = node.name  # the generated code's argument: a legal name of its own
            self.state.watch(tensor)
            self.inputs.append(InputSpec(name, node.name, tuple(tensor.shape), tensor.dtype))
            self._attributes.append((node, tensor))
            self._from_input.add(storage_address(tensor))
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
        self._copy_written_state()
        self.graph.lint()
        graph_module = fx.GraphModule(self.root, self.graph)
        return Recording(
            graph_module,
            tuple(self.inputs),
            tuple(outputs),
            self.parameter_nodes,
            tuple(self.baked),
            {name: tensor.clone() if self.state.is_written(tensor) else tensor for name, tensor in outputs.items()},
            self.lifted_constants,
            self.random_operators,
            tuple(dict.fromkeys(self.control_flow)),
            tuple(fqn for fqn, tensor in self._registered if self.state.is_written(tensor)),
        )

    def note_reading(self, tensor: Tensor, numbers: Sequence[Any]) -> None:
        """Python read a whole tensor: list the first of its numbers."""
        node = self._node_of(tensor)
        for number in numbers[:_LISTED]:
            self._bake(node, number, [tensor])

    def _copy_written_state(self) -> None:
        """Let the graph write into a copy, where the model wrote into a parameter, a buffer, a constant or an input.

        ::

            count --> add_(count, 1)      ==>      count --> clone --> add_(clone, 1)
        """
        for node, tensor in self._attributes:
            if self.state.is_written(tensor):
                readers = list(node.users)
                with self.graph.inserting_after(node):
                    copy = self.graph.call_function(torch.ops.aten.clone.default, (node,))
                copy.meta.update(node.meta)
                for reader in readers:
                    reader.replace_input_with(node, copy)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            where = self.modules.describe()
            self.control_flow.append(f"{operator_name(func)} in {where} ({user_line()})")
            return run_eagerly(func, args, kwargs, self, where)
        node_args, node_kwargs = pytree.tree_map(
            lambda leaf: self._node_of(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        self.state.before(func, args, kwargs)
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs) if self._partial is None else self._partial.execute(func, args, kwargs)
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not results and not func._schema.is_mutable:
            if operands and isinstance(result, (bool, int, float)):
                self._bake(self._node_of(operands[0]), result, operands)
            return result
        node = self.graph.call_function(func, tuple(node_args), dict(node_kwargs))
        self._describe(node, result)
        self._bind(result, node)
        self.random_operators += _is_random(func, args, kwargs)
        given = {storage_address(operand) for operand in operands}
        if given & self._from_input:
            written = written_tensors(func, args, kwargs) if func._schema.is_mutable else []
            self._from_input.update(storage_address(tensor) for tensor in (*results, *written))
        else:
            self._from_input -= {storage_address(tensor) for tensor in results} - given  # memory that is used again
        if _has_free_size(func, args):
            for tensor in results:
                self._bake(self._node_of(tensor), tensor.shape[0], operands)
        return result

    def _bake(self, node: fx.Node, number: float, operands: Sequence[Tensor]) -> None:
        """A tensor was read as a Python number: from here on the graph holds that number."""
        from_input = any(storage_address(operand) in self._from_input for operand in operands)
        self.baked.append(BakedScalar(node.name, number, self.modules.describe(), from_input))

    def _bind(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, (list, tuple)):
            for index, item in enumerate(result):
                if isinstance(item, (Tensor, list, tuple)):
                    picked = self.graph.call_function(operator.getitem, (node, index))
                    self._describe(picked, item)
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
        # A freed tensor's id is used again: the entry goes with the tensor.
        identity, nodes = id(tensor), self._nodes
        nodes[identity] = (storage_address(tensor), node, weakref.ref(tensor, lambda _: nodes.pop(identity, None)))
        if tensor.layout is torch.strided and tensor.numel():
            self._by_memory[_memory(tensor)] = (node, StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]

    def _node_of(self, tensor: Tensor) -> fx.Node:
        address, node, _ = self._nodes.get(id(tensor), (None, None, None))
        if node is not None and address == storage_address(tensor):
            return node
        # A tensor whose ``data`` was exchanged, or that came back from NumPy, is known by its memory.
        node, storage = self._by_memory.get(_memory(tensor), (None, None))
        if node is not None and storage is not None and not storage.expired():  # type: ignore[no-untyped-call]
            return node
        return self._attribute(tensor)

    def _attribute(self, tensor: Tensor) -> fx.Node:
        """A parameter, a buffer, or a tensor that existed before the run (then a constant of the graph)."""
        fqn = self._names.get((id(tensor), storage_address(tensor)))
        if fqn is None and tensor.layout is torch.strided and tensor.numel():
            fqn = self._names.get(_memory(tensor))  # another object for the same weight, as scripted modules give
        if fqn is None:
            target = f"_constant_{self.lifted_constants}"
            self.lifted_constants += 1
            self._from_input.discard(storage_address(tensor))
            self.root.register_buffer(target, tensor.detach(), persistent=False)
        else:
            target = fqn
            _attach(self.root, fqn, tensor)
        node = self.graph.get_attr(target)
        if fqn is not None:
            self.parameter_nodes[node.name] = fqn
        node.meta["module_stack"] = tuple(self.modules.stack)
        self._remember(tensor, node)
        self._attributes.append((node, tensor))
        self.state.watch(tensor)
        return node


class _ReadingMode(TorchFunctionMode):
    """Tells the recorder of readings that no operator shows."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _READS:
            self._recorder.note_reading(args[0], np.asarray(result).reshape(-1).tolist())
        return result


def _is_random(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """The operator draws random numbers; dropout that is switched off draws none."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, item in enumerate(func._schema.arguments):
        if item.name in {"train", "training", "dropout_p"}:
            given = args[position] if position < len(args) else item.default_value
            return bool(kwargs.get(item.name, given))
    return True


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two living tensors that are the same view of the same memory."""
    place = (storage_address(tensor), tensor.storage_offset()) if tensor.device.type == "meta" else tensor.data_ptr()
    return (place, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _has_free_size(func: Any, args: tuple[Any, ...]) -> bool:
    """How long the result is depends on values: the sizes that follow from it are fixed in the graph."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return True


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
