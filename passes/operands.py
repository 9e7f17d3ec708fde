"""What an operator multiplies by what: the operand that may be a stored weight, and how the other one is read.

Everything here holds for nodes of a graph and for tensors of a running module alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mfcompile.passes.operators import CONVOLUTIONS, GROUPED_PRODUCTS, TRANSPOSED_CONVOLUTIONS
from mfcompile.region import Patches, Reading

_SPATIAL = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class Pairing:
    """One way to read a contraction: this operand is the weight, that one the activation.

    Attributes:
        weight: node or tensor.
        contracted: its dimensions that are summed over, counted from the end.
        activation: node or tensor.
        reading: how the activation is read; its features stand in the order of ``contracted``.
        batch: dimensions of the weight that run along those of ``reading.experts``, counted from the end.
        ends: node or tensor, where the rows of every expert end; None for all but grouped products.
    """

    weight: Any
    contracted: tuple[int, ...]
    activation: Any
    reading: Reading
    batch: tuple[int, ...] = ()
    ends: Any = None


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Sizes of a tensor, or of what a node computes; None where they are not known."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def pairings(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Pairing]:
    """What a contraction may multiply by what.

    Args:
        name: the operator, without namespace.
        args, kwargs: its arguments.

    Returns:
        Possible readings, likelier weights first; none for operators that are no product of an activation and a matrix.
    """

    def at(key: str, position: int) -> Any:
        return kwargs[key] if key in kwargs else args[position] if len(args) > position else None

    if name == "linear":
        return [Pairing(at("weight", 1), (-1,), at("input", 0), Reading())]
    if name in {"mm", "matmul", "bmm"}:
        return _product(at("self", 0), at("other" if name == "matmul" else "mat2", 1))
    if name == "addmm":
        return _product(at("mat1", 1), at("mat2", 2))
    if name == "baddbmm":
        return _product(at("batch1", 1), at("batch2", 2))
    if name in GROUPED_PRODUCTS:
        return _grouped(args[0] if args else kwargs.get("self", kwargs.get("input")), *_rest(args, kwargs))
    if name == "einsum":
        return _einsum(at("equation", 0), at("tensors", 1))
    if name == "tensordot":
        return _tensordot(at("self", 0), at("other", 1), at("dims_self", 2), at("dims_other", 3))
    if name in CONVOLUTIONS and convolution_refusal(name, args, kwargs) is None:
        found = _convolution(name, args, kwargs)
        return [_patchwise(found)] if found is not None else []
    return []


def _rest(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Weight and offsets of a grouped product, by position or by keyword."""
    weight = args[1] if len(args) > 1 else kwargs.get("mat2", kwargs.get("weight"))
    return weight, args[2] if len(args) > 2 else kwargs.get("offs")


def _product(first: Any, second: Any) -> list[Pairing]:
    """``first @ second``, either of which may be the weight."""
    found = []
    for weight, contracted, activation, feature in ((second, -2, first, -1), (first, -1, second, -2)):
        own, other = shape_of(weight) or (), shape_of(activation)
        # Where the activation is the same for all matrices, their rows are outputs of one layer: no batch.
        batch = tuple(
            dim for dim in range(-len(own), -2) if own[dim] > 1 and (other is None or (len(other) >= -dim and other[dim] > 1))
        )
        found.append(Pairing(weight, (contracted,), activation, Reading((feature,), batch), batch))
    return found


def _grouped(rows: Any, weights: Any, ends: Any) -> list[Pairing]:
    """Rows (S, in) in groups, each group times its own matrix of (experts, in, out)."""
    if ends is None or len(shape_of(weights) or ()) != 3 or len(shape_of(rows) or ()) != 2:
        return []
    return [Pairing(weights, (-2,), rows, Reading((-1,), (-2,), "ends"), (-3,), ends)]


def _einsum(equation: Any, tensors: Any) -> list[Pairing]:
    if not isinstance(equation, str) or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return []
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or any(len(set(term)) < len(term.replace("...", ".")) for term in terms):
        return []
    found = []
    for weight, other in ((1, 0), (0, 1)):
        # Letters behind an ellipsis are counted from the end; a weight has none.
        own, its = terms[weight], terms[other].rpartition("...")[2]
        hidden = set(terms[other]) - set(its)
        summed = [letter for letter in own if letter not in result]
        shared = [letter for letter in own if letter in result and letter in terms[other]]
        if "." in own or not summed or not set(summed) <= set(its) or hidden & set(shared):
            continue
        reading = Reading(
            tuple(its.index(letter) - len(its) for letter in summed), tuple(its.index(letter) - len(its) for letter in shared)
        )
        contracted, batch = ([own.index(letter) - len(own) for letter in letters] for letters in (summed, shared))
        found.append(Pairing(tensors[weight], tuple(contracted), tensors[other], reading, tuple(batch)))
    return found


def _tensordot(first: Any, second: Any, first_dims: Any, second_dims: Any) -> list[Pairing]:
    shapes = (shape_of(first), shape_of(second))
    if shapes[0] is None or shapes[1] is None or not first_dims:
        return []
    ours, theirs = (
        tuple(dim % len(shape) - len(shape) for dim in listed)
        for listed, shape in ((first_dims, shapes[0]), (second_dims, shapes[1]))
    )
    return [Pairing(second, theirs, first, Reading(ours)), Pairing(first, ours, second, Reading(theirs))]


@dataclass(frozen=True)
class _Convolution:
    """Arguments of a convolution; ``padding`` is None where a mode says it and it is not zero."""

    input: Any
    weight: Any
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | None
    dilation: tuple[int, ...]
    groups: int
    is_transposed: bool


def _convolution(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Convolution | None:
    """The arguments of a convolution; None where the sizes of its weight are not known."""

    def at(key: str, position: int, default: Any = None) -> Any:
        return kwargs[key] if key in kwargs else args[position] if len(args) > position else default

    weight = at("weight", 1)
    shape = shape_of(weight)
    if shape is None:
        return None
    kernel = shape[2:]

    def per_dimension(value: Any) -> tuple[int, ...]:
        listed = [value] if isinstance(value, int) else list(value)
        return tuple(listed * len(kernel) if len(listed) == 1 else listed)

    given = at("padding", 4, 0)
    if isinstance(given, str):
        padding = (0,) * len(kernel) if given == "valid" or set(kernel) == {1} else None
    else:
        padding = per_dimension(given)
    is_general = name in {"convolution", "_convolution"}
    return _Convolution(
        at("input", 0),
        weight,
        kernel,
        per_dimension(at("stride", 3, 1)),
        padding,
        per_dimension(at("dilation", 5, 1)),
        at("groups", 8 if is_general else 6, 1),
        name in TRANSPOSED_CONVOLUTIONS or (is_general and bool(at("transposed", 6))),
    )


def convolution_refusal(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why the weight of a convolution is no linear weight; None for one that multiplies patches that do not overlap."""
    found = _convolution(name, args, kwargs)
    if found is None:
        return "not a linear weight: a convolution of unknown size"
    if found.is_transposed:
        return "not a linear weight: transposed convolution"
    if found.groups != 1:
        return f"not a linear weight: grouped convolution ({found.groups} groups)"
    sizes = f"(kernel {_times(found.kernel)}, stride {_times(found.stride)})"
    if any(size > step for size, step in zip(found.kernel, found.stride, strict=True)):
        return f"not a linear weight: overlapping convolution {sizes}"
    if any(spread != 1 and size != 1 for size, spread in zip(found.kernel, found.dilation, strict=True)):
        return f"not a linear weight: dilated convolution (dilation {_times(found.dilation)})"
    return None if found.padding is not None else f"not a linear weight: convolution padded by mode {sizes}"


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _patchwise(found: _Convolution) -> Pairing:
    """A convolution as a linear layer: patches (..., in, *kernel) times a weight (out, in, *kernel)."""
    assert found.padding is not None  # ``convolution_refusal`` was asked before
    count = len(found.kernel)
    # Cut into patches, the activation is (..., in, *places, *kernel): see ``reduction.read``.
    features = (-2 * count - 1, *range(-count, 0))
    reading = Reading(features, patches=Patches(found.kernel, found.stride, found.padding))
    return Pairing(found.weight, tuple(range(-count - 1, 0)), found.input, reading)
