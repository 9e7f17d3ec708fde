"""What the passes know of aten operators: which contract, which only re-arrange, which carry no content."""

from __future__ import annotations

from typing import Any

from torch import fx


def operator_name(node: fx.Node) -> str:
    """Name of the operator without namespace and overload ("linear", "add_"), "" for nodes that call none."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).partition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def argument(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """An argument of a node, given by keyword or by position."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def is_view(node: fx.Node) -> bool:
    """The operator returns a view of its first argument (by its schema)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    if alias is not None and not alias.is_write and any(item.alias_info is not None for item in schema.returns):
        return True
    # Composite operators whose schema declares no alias because they copy when they must.
    return operator_name(node) in {"reshape", "contiguous", "to", "flatten", "view_as", "reshape_as", "expand_as"}


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes whose tensors the operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = []
    for position, item in enumerate(schema.arguments):
        if item.alias_info is not None and item.alias_info.is_write:
            value = argument(node, item.name, position)
            if isinstance(value, fx.Node):
                written.append(value)
    return written


GROUPED_PRODUCTS = frozenset({"_grouped_mm", "grouped_mm_fallback"})
"""Operators that multiply groups of rows, each by a matrix of its own."""

CONTRACTIONS = GROUPED_PRODUCTS | {
    "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "addmv", "mv", "addbmm", "tensordot",
}  # fmt: skip
"""Operators that sum products of two operands."""

TRANSPOSED_CONVOLUTIONS = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})

CONVOLUTIONS = TRANSPOSED_CONVOLUTIONS | {"conv1d", "conv2d", "conv3d", "convolution", "_convolution"}
"""Operators that multiply places of their input by a weight (out, in / groups, *kernel)."""

BILINEAR = frozenset({"bilinear", "_trilinear"})
"""Operators that multiply a weight by two activations at once."""

RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"})
"""Operators that are whole recurrent layers, or one step of one."""

SOFTMAX_ATTENTION = frozenset(
    {
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
        "flex_attention",
    }
)
"""Operators that are a whole attention (softmax of queries and keys, times values)."""

SOFTMAXES = frozenset({"softmax", "_softmax", "_safe_softmax"})

RANDOM = frozenset(
    {
        "rand",
        "randn",
        "randint",
        "rand_like",
        "randn_like",
        "randint_like",
        "bernoulli",
        "bernoulli_",
        "normal",
        "normal_",
        "uniform_",
        "multinomial",
        "randperm",
        "exponential_",
    }
)
"""Operators whose result differs from call to call."""

CONTENT_FREE = frozenset(
    {
        "zeros", "ones", "full", "empty", "arange", "linspace", "eye", "tril_indices", "triu_indices", "scalar_tensor",
        "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
        "new_tensor", "sym_size", "sym_numel", "size", "numel", "eq", "ne", "lt", "le", "gt", "ge", "equal", "isnan",
        "isinf", "isfinite", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_not", "any", "all",
        "nonzero", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size", "_assert_tensor_metadata",
        "_is_all_true", "_is_any_true", *RANDOM,
    }
)  # fmt: skip
"""Operators whose result says something about shapes or truth, but carries no content of a modality."""


_LINEAR_MAPS = frozenset(
    {"linear", "addmm", "matmul", "mm", "add", "sub", "mul", "div", "dropout", "to", "_to_copy", "clone", "alias", "detach"}
)
"""Operators that map an activation linearly, where nothing but one activation and stored values take part."""


def is_linear_map(node: fx.Node) -> bool:
    """The operator only re-arranges an activation, adds activations, or multiplies one by stored values.

    A product of two activations, an attention, a normalisation or an activation function is not linear.
    """
    name = operator_name(node).rstrip("_") or operator_name(node)
    if is_view(node):
        return True
    if name not in _LINEAR_MAPS:
        return False
    operands = [source for source in node.all_input_nodes if not is_stored(source)]
    return len(operands) <= 1 or name in {"add", "sub"}


def is_stored(node: fx.Node) -> bool:
    """A parameter, a buffer or a constant, perhaps re-arranged or cast."""
    while (
        node.op == "call_function"
        and len(node.all_input_nodes) == 1
        and (is_view(node) or operator_name(node) in {"to", "_to_copy", "clone", "alias", "detach"})
    ):
        node = node.all_input_nodes[0]
    return node.op == "get_attr"
