"""Heads that masks have removed while the graph still computes them: Eq. 7 of CoMP (CVPR 2026) leaves them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.node import map_arg

from mfcompile.errors import InputError
from mfcompile.masked_weights import mask_weight
from mfcompile.masks import MaskSet
from mfcompile.passes.operators import argument, is_view, operator_name
from mfcompile.passes.symbolic_sizes import number_of
from mfcompile.passes.token_attention import Attention

ValueOf = Callable[[fx.Node], Tensor | None]
"""The tensor that a node of a parameter holds, zeros where masks removed weights; None for nodes of other things."""

_MOVES = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "swapaxes", "movedim",
        "unsqueeze", "squeeze", "expand", "select", "slice", "unbind", "chunk", "split", "split_with_sizes", "tensor_split",
        "getitem", "contiguous", "clone", "to", "_to_copy", "alias", "detach", "dropout", "repeat_interleave", "lift_fresh",
        "narrow",
    }
)  # fmt: skip
"""Operators whose result holds elements of their first operand in other places."""

_JOINS = frozenset({"cat", "concat"})

_TRIES = 64


def live_heads(attention: Attention, samples: int, value_of: ValueOf) -> Tensor | None:
    """Which heads of an attention still give something, by the weights around it.

    A head is dead where all columns of W_out that read its result are zero, or where all rows that make its values, and
    their biases, are. Which columns and rows those are is found by following numbers of heads and rows through the
    operators between.

    Args:
        attention: the attention, in any graph with sizes.
        samples: sequences that share its first axis with heads, where they do.
        value_of: gives parameters.

    Returns:
        (heads,) float32, one for heads that live and zero for dead ones. None where all live, or where it cannot be told, and
        where none lives: then nothing that the attention gives counts, and its weights are as good as any.
    """
    sizes = _sizes(attention.node)
    heads = prod(sizes[:-2]) // samples
    dead = torch.zeros(heads, dtype=torch.bool)
    for found in (_unread(attention, sizes, heads, value_of), _silent(attention, heads, value_of)):
        dead |= dead if found is None else found
    return None if not bool(dead.any()) or bool(dead.all()) else (~dead).float()


def heads_of_program(
    attention: Attention, point: fx.Node, batch: int, program: ExportedProgram, masks: MaskSet | None, given: Tensor | None
) -> Tensor | None:
    """(heads,) weights of the heads of an attention of a program; None where all count.

    Args:
        attention: of the program's graph, or of a copy with placeholders of the same names.
        point: a node of its stream.
        batch: the batch axis of that node.
        program: holds the parameters.
        masks: what has been masked since; None for nothing.
        given: factors in place of what the weights say.

    Raises:
        InputError: ``given`` is no (heads,) tensor of factors between 0 and 1.
    """
    samples = _sizes(point)[batch]
    if given is not None:
        heads = prod(_sizes(attention.node)[:-2]) // samples
        if given.shape != (heads,) or not bool(((given >= 0) & (given <= 1)).all()):
            raise InputError(
                f"head_factors[{attention.name!r}] is of shape {tuple(given.shape)}: give one factor between 0 and 1 for each "
                f"of its {heads} heads"
            )
        return given.detach().cpu().float()
    names = program.graph_signature.inputs_to_parameters

    def value_of(node: fx.Node) -> Tensor | None:
        fqn = names.get(node.name)
        return None if fqn is None else masked_value(program.state_dict[fqn], fqn, masks)

    return live_heads(attention, samples, value_of)


def masked_value(parameter: Tensor, fqn: str, masks: MaskSet | None) -> Tensor:
    """A parameter with zeros where masks removed weights; on the CPU."""
    value = parameter.detach().cpu()
    return value * masks[fqn] if masks is not None and fqn in masks.packed else value


def _unread(attention: Attention, sizes: Sequence[int], heads: int, value_of: ValueOf) -> Tensor | None:
    """(heads,) bool: nothing reads a head's result but zeros."""
    numbers = torch.arange(prod(sizes[:-2])).remainder(heads).view(*sizes[:-2], 1, 1).expand(*sizes)
    dead = torch.ones(heads, dtype=torch.bool)
    pending: list[tuple[fx.Node, Any]] = [(attention.node, numbers)]
    for _ in range(_TRIES):
        if not pending:
            return dead
        node, value = pending.pop()
        for user in node.users:
            if operator_name(user) in _MOVES and user.args[0] is node:
                pending.append((user, _run(user, value)))
                continue
            weight = _layer_weight(user, node, value_of)
            rows = None if weight is None else _alike(value, weight.shape[1])
            if weight is None or rows is None:
                return None
            is_read = (weight != 0).any(dim=0)
            dead &= ~torch.zeros(heads, dtype=torch.bool).index_put((rows[is_read],), torch.tensor(True))
    return None


def _silent(attention: Attention, heads: int, value_of: ValueOf) -> Tensor | None:
    """(heads,) bool: the values of a head are zero whatever comes in."""
    node = attention.node.args[2 if attention.fused else 1]
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and operator_name(node) in _MOVES | _JOINS and len(chain) < _TRIES:
        full = [item for item in node.all_input_nodes if prod(_sizes(item))]
        if operator_name(node) in _MOVES:
            chain.append(node)
        if not full or (operator_name(node) in _JOINS and len(full) != 1):
            return None
        node = full[0]  # of a join: with nothing, as values are with an empty cache
    if not isinstance(node, fx.Node):
        return None
    rows, sizes = _nonzero_rows(node, value_of), _sizes(node)
    if rows is None or rows.numel() != sizes[-1]:
        return None
    value: Any = rows.expand(sizes)
    for item in reversed(chain):
        value = _run(item, value)
    if value.ndim not in {3, 4}:
        return None
    speaks = value.flatten(0, -3)[:, 0].any(dim=-1)  # of samples and heads, in one axis
    own = speaks[: min(value.shape[-3], heads)]
    return None if heads % own.numel() else ~own.repeat_interleave(heads // own.numel())


def _nonzero_rows(node: fx.Node, value_of: ValueOf) -> Tensor | None:
    """(rows,) bool: outputs of a layer that have a weight or a bias that is not zero."""
    weight = _layer_weight(node, node.args[1 if operator_name(node) == "addmm" else 0], value_of)
    bias = argument(node, "bias", 2) if operator_name(node) == "linear" else None
    bias = node.args[0] if operator_name(node) == "addmm" else bias
    if weight is None:
        return None
    rows = (weight != 0).any(dim=1)
    if bias is None:
        return rows
    value = _value(bias, value_of) if isinstance(bias, fx.Node) else None
    return None if value is None or value.shape != rows.shape else rows | (value != 0)


def _layer_weight(node: fx.Node, activation: Any, value_of: ValueOf) -> Tensor | None:
    """(out, in) of a layer that reads an activation; None for other operators."""
    name = operator_name(node)
    first = 1 if name == "addmm" else 0
    if name not in {"linear", "addmm", "mm", "matmul"} or node.args[first] is not activation:
        return None
    weight = node.args[first + 1]
    value = _value(weight, value_of) if isinstance(weight, fx.Node) else None
    if value is None or value.ndim != 2:
        return None
    return value if name == "linear" else value.t()


def _value(node: fx.Node, value_of: ValueOf) -> Tensor | None:
    """A parameter, perhaps re-arranged."""
    found = value_of(node)
    if found is not None:
        return found
    if node.target is mask_weight:
        return _value(node.args[0], value_of)  # type: ignore[arg-type]  # by its signature
    if not is_view(node) or len(node.all_input_nodes) != 1:
        return None
    source = _value(node.all_input_nodes[0], value_of)
    return None if source is None else _run(node, source)


def _alike(numbers: Tensor, width: int) -> Tensor | None:
    """(width,) numbers that all rows of an activation agree on."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    return rows[0] if rows.shape[1] == width and bool((rows == rows[0]).all()) else None


def _run(node: fx.Node, value: Any) -> Any:
    """A node's operator on another first operand; free sizes are those of the example."""
    if operator_name(node) in {"to", "_to_copy", "clone", "dropout"}:
        return value
    args = [map_arg(item, lambda given: number_of(given.meta.get("val"))) for item in node.args[1:]]
    if operator_name(node) in {"view", "_unsafe_view"} and isinstance(args[0], (list, tuple)):
        return value.reshape(args[0])  # it may lie in memory in another order than what the model views
    return node.target(value, *args, **node.kwargs)  # type: ignore[operator]


def _sizes(node: fx.Node) -> list[int]:
    value = node.meta.get("val")
    return [number_of(size) for size in value.shape] if isinstance(value, Tensor) else []
