"""What the rules for single operators share: how they read an ONNX node, and how they write into the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import onnx
import torch
from torch import fx

aten = torch.ops.aten


class Builder(Protocol):
    """What the rules may ask for and do."""

    def read(self, name: str) -> fx.Node:
        """The node of a value."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Its sizes in the example."""

    def numbers(self, name: str) -> list[int] | None:
        """Its integers, where they are known."""

    def is_matrix(self, node: fx.Node) -> bool:
        """The node is a 2-D view of a stored float tensor."""

    def is_stored(self, node: fx.Node) -> bool:
        """The node is a view of a stored tensor."""

    def is_constant(self, node: fx.Node) -> bool:
        """No input decides the values of the node; its sizes perhaps."""

    def call(self, target: Any, *args: Any, out: str = "", shape: Sequence[int] | None = None) -> fx.Node:
        """Add a node; it is the value ``out``, or a step of its own of this shape."""


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of a node, or the default."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def stand_in(name: str) -> Callable[..., Any]:
    """A stand-in for an operator whose result carries no content, or for one that aten does not have."""
    known = _STAND_INS.get(name)
    if known is None:

        def refuse(*args: Any) -> Any:
            raise RuntimeError("this graph is read, not run")

        refuse.__name__ = refuse.__qualname__ = name
        known = _STAND_INS.setdefault(name, refuse)
    return known


_STAND_INS: dict[str, Callable[..., Any]] = {}


def operands(builder: Builder, node: onnx.NodeProto, start: int = 0) -> list[fx.Node]:
    """The nodes of all operands from one on, optional ones that are absent left out."""
    return [builder.read(name) for name in node.input[start:] if name]


def swap(builder: Builder, node: fx.Node) -> fx.Node:
    """The last two dimensions in each other's place."""
    shape = list(node.meta["val"].shape)
    return builder.call(aten.transpose.int, node, -2, -1, shape=[*shape[:-2], shape[-1], shape[-2]])


def multiply(builder: Builder, first: fx.Node, second: fx.Node, out: str, shape: Sequence[int] | None = None) -> fx.Node:
    """A stored matrix on the right makes a linear layer, as torch has it; every other product is one of activations."""
    if builder.is_matrix(second) and not (builder.is_stored(first) and builder.is_matrix(first)):
        return builder.call(aten.linear.default, first, swap(builder, second), out=out, shape=shape)
    return builder.call(aten.matmul.default, first, second, out=out, shape=shape)
