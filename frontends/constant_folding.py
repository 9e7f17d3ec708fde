"""Folding what no input reaches in a recorded graph: positions, causal masks, sizes turned into tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfcompile.frontends.recorder import _is_random

ASSERTIONS = ("aten._assert", "aten.sym_constrain", "aten._functional_assert")
"""Operators that check and compute nothing."""

LARGEST = 1 << 26
"""Elements of a constant that is still worth having; a larger one is computed."""


def fold_constants(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph in which whatever neither inputs, nor parameters, nor random numbers reach is a constant.

    Parameters stay, with all that is computed from them, because masks find them by name. Assertions go, and so does
    what nothing reads. A tensor that is written in place is folded only when nothing but constants is written into it,
    and only with its last values. An output that is a constant stays computed.

    Args:
        graph_module: as recorded; it is not changed.

    Returns:
        A new graph module that shares tensors with the given one; its constants are called ``folded_0``, ...
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    root = nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        attach(root, str(node.target), fetch(graph_module, str(node.target)))
    aliases = _Aliases(graph_module.graph)
    constant = _constant_nodes(graph_module, aliases)
    for index, (node, value) in enumerate(_values(graph_module, constant).items()):
        name = f"folded_{index}"
        root.register_buffer(name, value, persistent=False)
        copy = copies[node]
        with graph.inserting_before(copy):
            folded = graph.get_attr(name)
        folded.meta.update(copy.meta)
        for reader in [copies[user] for user in node.users if user not in constant and user.op != "output"]:
            reader.replace_input_with(copy, folded)
    _drop_unread(graph)
    return fx.GraphModule(root, graph)


class _Aliases:
    """Which nodes share memory, and where that memory is written, by the operators' schemas.

    Attributes:
        base: node -> the node whose memory it (perhaps) is a view of.
        writes: base -> the nodes that write into it, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.base: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            viewed = self._viewed(node)
            self.base[node] = self.base[viewed] if viewed is not None else node
            for written in _written(node):
                self.writes.setdefault(self.base[written], []).append(node)

    @staticmethod
    def _viewed(node: fx.Node) -> fx.Node | None:
        if node.op != "call_function":
            return None
        if not isinstance(node.target, torch._ops.OpOverload):  # getitem of several results
            return next(iter(node.all_input_nodes), None)
        schema = node.target._schema
        given = {name for item in schema.returns if item.alias_info is not None for name in item.alias_info.before_set}
        for item, value in zip(schema.arguments, node.args, strict=False):
            if item.alias_info is not None and given & set(item.alias_info.before_set) and isinstance(value, fx.Node):
                return value
        return None


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node changes in place."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[fx.Node] = []
    for position, item in enumerate(node.target._schema.arguments):
        if item.alias_info is not None and item.alias_info.is_write:
            value = node.kwargs.get(item.name, node.args[position] if position < len(node.args) else None)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]
    return found


def _constant_nodes(graph_module: fx.GraphModule, aliases: _Aliases) -> set[fx.Node]:
    """Nodes whose value is known before any input is."""
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    varying: set[fx.Node] = set()  # memory into which something that is no constant is written, or that changes under a reader
    while True:
        constant: set[fx.Node] = set()
        for node in order:
            if aliases.base[node] not in varying and _is_constant(node, graph_module, constant):
                constant.add(node)
        found = {
            base
            for base, writes in aliases.writes.items()
            if base not in varying and (set(writes) - constant or _read_between(base, writes, constant, order, aliases))
        }
        if not found:
            return constant
        varying |= found


def _read_between(
    base: fx.Node, writes: list[fx.Node], constant: set[fx.Node], order: dict[fx.Node, int], aliases: _Aliases
) -> bool:
    """Something that is no constant reads the memory before it has its last values."""
    last = max(order[write] for write in writes)
    views = [node for node in order if aliases.base[node] is base]
    return any(user not in constant and order[user] < last for view in views for user in view.users)


def _is_constant(node: fx.Node, graph_module: fx.GraphModule, constant: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return not isinstance(fetch(graph_module, str(node.target)), nn.Parameter)
    if node.op != "call_function" or not all(source in constant for source in node.all_input_nodes):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not _is_random(node.target, node.args, node.kwargs) and _size(node) <= LARGEST
    return True


def _size(node: fx.Node) -> int:
    shape = getattr(node.meta.get("val"), "shape", ())
    return int(torch.Size(shape).numel())


def _values(graph_module: fx.GraphModule, constant: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """Computed value of every constant node that something else reads."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph_module.graph.nodes:
            if node not in constant:
                continue
            if node.op == "get_attr":
                value = fetch(graph_module, str(node.target))
                writes = any(node in _written(user) for user in node.users)
                values[node] = value.clone() if value.is_inference() or writes else value
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
                values[node] = node.target(*args, **kwargs)
    read = {
        node
        for node in constant
        if node.op != "get_attr" and any(user not in constant and user.op != "output" for user in node.users)
    }
    return {
        node: value.contiguous().clone()
        for node, value in values.items()
        if node in read and isinstance(value, Tensor) and value.layout is torch.strided
    }


def _drop_unread(graph: fx.Graph) -> None:
    """Erase assertions, and then whatever computes something that nothing reads and writes nothing that is read."""
    aliases = _Aliases(graph)
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" and node.op != "get_attr":
            continue
        is_check = str(node.target).startswith(ASSERTIONS)
        written = [target for target in _written(node) if any(other is not node for other in target.users)]
        if is_check or (not node.users and not written and not _views_live(node, aliases)):
            graph.erase_node(node)


def _views_live(node: fx.Node, aliases: _Aliases) -> bool:
    """The node writes into memory that something else still reads."""
    bases = {aliases.base[target] for target in _written(node)}
    return any(
        other is not node and aliases.base.get(other) in bases and any(user is not node for user in other.users)
        for other in node.graph.nodes
    )


def fetch(root: nn.Module, target: str) -> Tensor:
    """The tensor that a ``get_attr`` node of a recorded graph reads."""
    owner, _, leaf = target.rpartition(".")
    found = getattr(root.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)  # a recorded graph's attributes are tensors
    return found


def attach(root: nn.Module, target: str, tensor: Tensor) -> None:
    """Hang a shared tensor into ``root`` under the name that a ``get_attr`` node calls it by."""
    *path, leaf = target.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        # What was made in inference mode may not be written or viewed outside of it.
        owner.register_buffer(leaf, tensor.clone() if tensor.is_inference() else tensor, persistent=False)
