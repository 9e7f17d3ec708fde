"""New values of kept weights: a captured model over weights of its own where an update changed them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet
from mfcompile.module_copy import with_weights


def set_values(captured: CapturedGraph, masks: MaskSet) -> CapturedGraph:
    """The captured model with the new values that a set of masks carries; the given one and its weights are not touched.

    Weights without new values stay shared with the user's module; a program that was exported before is forgotten.

    Args:
        captured: the dense model.
        masks: masks; without values the captured model is returned as it is.

    Raises:
        InputError: the module cannot be copied.
    """
    if not masks.new_values:
        return captured
    return with_values(captured, {fqn: masks.updated_weight(fqn, captured.parameter(fqn)) for fqn in masks.new_values})


def with_values(captured: CapturedGraph, weights: Mapping[str, Tensor]) -> CapturedGraph:
    """The captured model over some weights of its own; the given one and its weights are not touched.

    Args:
        captured: the captured model.
        weights: FQN -> values, of the parameter's shape and dtype; they become parameters without being copied.

    Raises:
        InputError: the module cannot be copied.
    """
    try:
        module = with_weights(captured.module, weights)
    except Exception as error:
        raise InputError(
            f"{type(captured.module).__name__} cannot be copied ({type(error).__name__}: {error}): updated weights are put "
            f"into a copy so that your model stays as it is: remove the attribute that deepcopy refuses, or the update"
        ) from error
    named = dict(module.named_parameters(remove_duplicate=False))
    graph_module = fx.GraphModule(captured.graph_module, captured.graph)
    for node in captured.graph.nodes:
        fqn = captured.parameter_nodes.get(node.name, "") if node.op == "get_attr" else ""
        if fqn in weights:
            owner, _, leaf = str(node.target).rpartition(".")
            setattr(graph_module.get_submodule(owner), leaf, named[fqn])
    return replace(captured, module=module, graph_module=graph_module, exported=None)
