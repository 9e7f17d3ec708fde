"""Floating-point operations of an exported program, counted from the sizes in its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from mfcompile.passes.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, argument, operator_name
from mfcompile.passes.symbolic_sizes import Values, number_of, values_in_example
from mfcompile.passes.token_attention import module_path

Sizes = Callable[[Any], list[int]]
"""Takes a node of a tensor."""

Formula = Callable[[fx.Node, Sizes], int]


@dataclass(frozen=True)
class FlopCount:
    """Multiplications and additions of the products in a program, two per pair, as torch's FlopCounterMode counts.

    Attributes:
        total: of all nodes, for inputs of the sizes of the example.
        by_module: submodule -> its own share, without those inside it.
        uncounted: operators that compute products and have no formula here; empty where the count is whole.
        by_weight: FQN of a parameter of two axes or more -> the share of the products that read it.
    """

    total: int
    by_module: Mapping[str, int]
    uncounted: tuple[str, ...] = ()
    by_weight: Mapping[str, int] = field(default_factory=dict)

    def below(self, path: str) -> int:
        """The share of a submodule with all that is inside it."""
        return sum(count for name, count in self.by_module.items() if name == path or name.startswith(f"{path}."))


def count_flops(program: ExportedProgram) -> FlopCount:
    """Count the operations of matrix products, attentions and convolutions; elementwise operators count nothing.

    A size that is free counts as it is in the example; where values decide one, the example is run for it.

    Args:
        program: as torch.export gives it, or rewritten.
    """
    sizes = _sizes_with(values_in_example(program))
    by_module: dict[str, int] = {}
    by_weight: dict[str, int] = {}
    uncounted: dict[str, None] = {}
    for node in program.graph.nodes:
        name = operator_name(node)
        formula = _FORMULAS.get(name)
        if formula is not None:
            path, count = module_path(node), formula(node, sizes)
            by_module[path] = by_module.get(path, 0) + count
            for fqn in _weights_of(node, program.graph_signature.inputs_to_parameters):
                by_weight[fqn] = by_weight.get(fqn, 0) + count
        elif name in _WITHOUT_FORMULA:
            uncounted[name] = None
    return FlopCount(sum(by_module.values()), by_module, tuple(uncounted), by_weight)


def _weights_of(node: fx.Node, parameters: Mapping[str, str]) -> set[str]:
    """FQNs of the matrices that a product reads, as they are or turned and reshaped; not of biases."""
    found = set()
    for operand in node.all_input_nodes:
        while operand.op == "call_function" and len(operand.all_input_nodes) == 1:
            operand = operand.all_input_nodes[0]
        if operand.name in parameters and operand.meta["val"].ndim > 1:
            found.add(parameters[operand.name])
    return found


def _sizes_with(values: Values) -> Sizes:
    def sizes(node: Any) -> list[int]:
        value = node.meta["val"]
        assert isinstance(value, Tensor)  # operands of products are tensors
        return [number_of(size, values) for size in value.shape]

    return sizes


def _linear(node: fx.Node, sizes: Sizes) -> int:
    return 2 * prod(sizes(node)) * sizes(node.args[0])[-1]


def _product(first: int) -> Formula:
    return lambda node, sizes: 2 * prod(sizes(node)) * sizes(node.args[first])[-1]


def _attention(node: fx.Node, sizes: Sizes) -> int:
    *leading, queries, width = sizes(node.args[0])
    keys, value_width = sizes(node.args[1])[-2], sizes(node.args[2])[-1]
    return 2 * prod(leading) * queries * keys * (width + value_width)


def _convolution(node: fx.Node, sizes: Sizes) -> int:
    weight = sizes(argument(node, "weight", 1))
    given = node.args[0] if operator_name(node) in TRANSPOSED_CONVOLUTIONS else node
    return 2 * prod(sizes(given)) * prod(weight[1:])


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(operands, (list, tuple))  # by the schema
    lengths = {
        letter: size
        for term, operand in zip(equation.partition("->")[0].split(","), operands, strict=True)
        for letter, size in zip(term, sizes(operand), strict=True)
    }
    return 2 * prod(lengths.values()) if len(operands) == 2 else 0


_FORMULAS: dict[str, Formula] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), _product(1)),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(CONVOLUTIONS - {"_convolution"}, _convolution),
}

_WITHOUT_FORMULA = frozenset(
    {"bilinear", "_grouped_mm", "grouped_mm", "lstm", "gru", "rnn_tanh", "rnn_relu", "flex_attention", "tensordot"}
)
