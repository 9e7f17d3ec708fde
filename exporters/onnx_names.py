"""Names of inputs, outputs and dimensions of an onnx_ir model, as the captured model calls them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from mfcompile.exporters.conversion import RefusedProgramError

SYMBOL = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Interface:
    """What a caller of the ONNX model sees.

    Attributes:
        input_names: graph inputs, in order.
        output_names: graph outputs, in order.
        dynamic_axes: input name -> dimension -> axis name, for the dimensions that are free in the file.
        notes: inputs that are missing or unused, dimensions that are fixed, names that were taken.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    notes: tuple[str, ...]


def name_interface(
    model: ir.Model,
    input_names: Mapping[str, str],
    output_names: tuple[str, ...],
    dynamic_axes: Mapping[str, Mapping[int, str]],
) -> Interface:
    """Give inputs, outputs and symbolic dimensions their names, in place.

    A name that something else in the graph already has is taken from it. Two different symbols never share an axis
    name, even where the same was asked for ("batch", "batch_2"): runtimes take equal names for equal sizes.

    Args:
        model: as converted.
        input_names: converter's name of each tensor input -> its name.
        output_names: one name per graph output, in order.
        dynamic_axes: input name -> dimension -> axis name.

    Raises:
        RefusedProgramError: the graph has another number of outputs than there are names.
    """
    graph = model.graph
    notes: list[str] = []
    if len(graph.outputs) != len(output_names):
        raise RefusedProgramError(
            f"the converted graph has {len(graph.outputs)} outputs, but the captured model names {len(output_names)} "
            f"({', '.join(output_names)}). Return tensors only, in a tuple or a dict"
        )
    _separate_outputs(graph)
    named = [(value, input_names.get(str(value.name), str(value.name))) for value in graph.inputs]
    taken = {name for _, name in named}
    for value, name in zip(graph.outputs, output_names, strict=True):
        unique = _unused(f"{name}_out", taken) if name in taken else name
        if unique != name:
            notes.append(f"output {name} is called {unique} in the file: an input or another output has its name")
        taken.add(unique)
        named.append((value, unique))
    _rename(graph, named, notes)
    present = {str(value.name) for value in graph.inputs}
    notes += [
        f"input {name} is not in the file: the graph does not use it" for name in input_names.values() if name not in present
    ]
    notes += [f"input {value.name} is not used by the graph" for value in graph.inputs if not value.uses()]
    notes += _rename_axes(model, dynamic_axes)
    return replace(describe_interface(model), notes=tuple(notes))


def describe_interface(model: ir.Model) -> Interface:
    """The inputs, outputs and free dimensions that a model has."""
    graph = model.graph
    return Interface(
        tuple(str(value.name) for value in graph.inputs),
        tuple(str(value.name) for value in graph.outputs),
        {
            str(value.name): {dim: str(size) for dim, size in enumerate(value.shape or ()) if isinstance(size, ir.SymbolicDim)}
            for value in graph.inputs
            if any(isinstance(size, ir.SymbolicDim) for size in value.shape or ())
        },
        (),
    )


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the main graph and its subgraphs."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _separate_outputs(graph: ir.Graph) -> None:
    """Outputs that are inputs, parameters or other outputs as well get an Identity, hence a name of their own."""
    seen: set[ir.Value] = set()
    for index, value in enumerate(list(graph.outputs)):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.node("Identity", [value], name=f"output_{index}")
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = copy
        seen.add(value)


def _rename(graph: ir.Graph, named: list[tuple[ir.Value, str]], notes: list[str]) -> None:
    interface = {value for value, _ in named}
    wanted = {name for _, name in named}
    used = wanted | {str(value.name) for value in _values(graph)}
    for value in list(_values(graph)):
        if value.name in wanted and value not in interface:
            fresh = _unused(f"{value.name}_inner", used)
            if value.is_initializer():
                notes.append(f"parameter {value.name} is called {fresh} in the file: an input or output has its name")
            value.name = fresh
            used.add(fresh)
    for number, (value, _) in enumerate(named):  # first to names that nobody has, so that two can swap
        value.name = _unused(f"interface_{number}", used)
        used.add(value.name)
    for value, name in named:
        value.name = name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _rename_axes(model: ir.Model, dynamic_axes: Mapping[str, Mapping[int, str]]) -> list[str]:
    for value in all_values(model):  # a symbol that turned out to be one number is written as that number
        if value.shape is not None and any(_is_number(size) for size in value.shape):
            value.shape = ir.Shape([int(str(size)) if _is_number(size) else size for size in value.shape])
    inputs = {str(value.name): value for value in model.graph.inputs}
    axis_of: dict[str, str] = {}
    notes: list[str] = []
    for name, axes in dynamic_axes.items():
        shape = inputs[name].shape if name in inputs else None
        for dim, axis in axes.items():
            size = shape[dim] if shape is not None and dim < len(shape) else None
            if isinstance(size, int):
                notes.append(f"dimension {dim} ({axis}) of input {name} is fixed to {size} in the file")
            symbol = size.value if isinstance(size, ir.SymbolicDim) else None
            if symbol is not None and SYMBOL.fullmatch(symbol) and symbol not in axis_of:
                axis_of[symbol] = _unused(axis, set(axis_of.values()))
    if axis_of:
        for value in all_values(model):
            if value.shape is not None:
                value.shape = _substitute(value.shape, lambda match: axis_of.get(match[0], match[0]))
    return notes


def _is_number(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is not None and size.value.isdecimal()


def _substitute(shape: ir.Shape, replace: Callable[[re.Match[str]], str]) -> ir.Shape:
    sizes: list[int | str | None] = []
    for size in shape:
        if isinstance(size, ir.SymbolicDim):
            sizes.append(None if size.value is None else SYMBOL.sub(replace, size.value))
        else:
            sizes.append(size)
    return ir.Shape(sizes)


def _unused(name: str, used: set[str]) -> str:
    """The name, or the name with the first number from 2 on that makes it new."""
    if name not in used:
        return name
    number = 2
    while f"{name}_{number}" in used:
        number += 1
    return f"{name}_{number}"
