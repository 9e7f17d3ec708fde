"""Masks applied: in the graph, by rewriting linear nodes; in the user's module, over its parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx, nn

from mfcompile.errors import InputError, PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph
from mfcompile.masked_weights import mask_weight, masked_parameters, put_masks, strip
from mfcompile.masks import MaskSet
from mfcompile.module_copy import share_weights_copy
from mfcompile.passes.base import PassResult
from mfcompile.passes.weights import parameter_views

__all__ = ["ApplyMasks", "mask_module", "mask_weight", "masked_parameters", "strip"]


@dataclass(frozen=True)
class ApplyMasks:
    """Rewrite every linear node that reads a masked weight.

    ::

        weight --> [t, slice, ...] --> linear      ==>      weight --> mask_weight(weight, mask) --> [t, ...] --> linear

    Attributes:
        masks: FQN -> mask in the layout of the parameter.
    """

    masks: MaskSet

    def requires(self, graph: CapturedGraph) -> None:
        """Every masked weight is in the graph, with its shape, and only linear nodes read it."""
        known = set(graph.parameter_nodes.values())
        for fqn, mask in self.masks.packed.items():
            if fqn not in known:
                raise PreconditionError(f"the graph reads no weight called {fqn}: the masks belong to another model")
            shape = tuple(graph.parameter(fqn).shape)
            if mask.shape != shape:
                raise PreconditionError(
                    f"the mask of {fqn} is {mask.shape}, the weight is {shape}: the masks belong to another model, or to this "
                    f"one before units were removed. Select masks for it, or remove units where masks are applied already"
                )

    def apply(self, graph: CapturedGraph) -> PassResult:
        """A graph that multiplies by masked weights; the parameters stay dense and shared."""
        new_graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        new_graph.output(new_graph.graph_copy(graph.graph, copies))
        root = fx.GraphModule(graph.graph_module, new_graph)
        rewritten = 0
        for node, copy in copies.items():
            fqn = graph.parameter_nodes.get(node.name, "") if node.op == "get_attr" else ""
            if fqn in self.masks.packed:
                target = f"mfcompile_mask_{rewritten}"
                root.register_buffer(target, self.masks[fqn].to(graph.parameter(fqn).device), persistent=False)
                readers = list(copy.users)
                with new_graph.inserting_after(copy):
                    bits = new_graph.get_attr(target)
                with new_graph.inserting_after(bits):
                    masked = new_graph.call_function(mask_weight, (copy, bits))
                masked.meta.update(copy.meta)
                for reader in readers:
                    reader.replace_input_with(copy, masked)
                rewritten += 1
        return PassResult(
            replace(graph, graph_module=fx.GraphModule(root, new_graph), masks=self.masks), modified=rewritten > 0
        )

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """No node reads a masked weight but the one that masks it."""
        views = parameter_views(result.graph)
        for node, view in views.items():
            if view.fqn in self.masks.packed and node.op == "get_attr":
                stray = [user for user in node.users if user.target is not mask_weight]
                if stray or not node.users:
                    raise PostconditionError(f"{view.fqn} is still read unmasked, by {[user.name for user in stray]}")


def mask_module(module: nn.Module, masks: MaskSet) -> nn.Module:
    """The user's module with its masks in force: a second object of the same class over the same weights.

    Parameters keep their names and dense values; reading ``layer.weight`` gives the masked one. A tied weight keeps one
    parameter and one mask under all its names.

    Args:
        module: the dense module; its attributes are left alone, its parameters are shared.
        masks: FQN -> mask.

    Raises:
        InputError: a mask has no weight of its shape, or the module cannot be copied.
    """
    try:
        copy = share_weights_copy(module)
    except Exception as error:
        raise InputError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}): masks are put on a copy so that your "
            f"model stays as it is. Remove the attribute that deepcopy refuses"
        ) from error
    put_masks(copy, masks, shared=True)
    return copy
