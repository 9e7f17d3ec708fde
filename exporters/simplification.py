"""Simplifying a converted graph without touching a parameter."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer


def simplify(model: ir.Model) -> None:
    """Fold shape computations and rewrite operators that runtimes cannot fold, in place.

    onnxscript's optimizer, which torch.onnx.export runs by default, would also transpose parameters and give the
    results new names, and masks find parameters by name. So it gets to see parameters as tensors of known shape and
    unknown values; runtimes do the transposes when they load the file. What is gained: no chain of Shape, Gather and
    Concat per reshape, and no SplitToSequence, which onnxruntime does not fold (the packed projection of
    nn.MultiheadAttention in cross-attention would be copied on every run).

    Args:
        model: as converted; initializers keep their names and values.
    """
    graph = model.graph
    inputs = [(value, value.name) for value in graph.inputs]
    hidden = [(value, value.const_value) for value in graph.initializers.values()]
    graph.initializers.clear()
    for value, _ in hidden:
        value.const_value = None
    try:
        optimizer.optimize(model)
    finally:
        for value, tensor in hidden:
            value.const_value = tensor
            if value.uses() or value.is_graph_output():
                graph.initializers.add(value)
        _restore_names(graph, inputs)


def _restore_names(graph: ir.Graph, inputs: list[tuple[ir.Value, str | None]]) -> None:
    """Inputs that are outputs as well lose their name to the output; they get it back."""
    for value, name in inputs:
        if value.name != name:
            for output in graph.outputs:
                if output.name == name:
                    output.name = f"{name}_copy"
            value.name = name
