"""Masks applied: in the graph, by rewriting linear nodes; in the user's module, by parametrizations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from mfcompile.errors import InputError, PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet
from mfcompile.module_copy import share_weights_copy
from mfcompile.passes.base import PassResult
from mfcompile.passes.weights import parameter_views


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
                raise PreconditionError(f"the mask of {fqn} is {mask.shape}, the weight is {shape}")

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


def mask_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with zeros at its pruned places: exact (+0.0), also where the stored value is NaN.

    Args:
        weight: any shape and dtype; not changed.
        mask: bool, of the same shape, 1 = kept.

    Returns:
        A new tensor of the weight's shape and dtype; no gradient flows to pruned places.
    """
    if not weight.requires_grad or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.where(mask, weight, 0.0)
    # Without autograd torch still picks the kernel of a linear layer by whether its weight is trainable: this one is
    # as much as the dense one, so that both round alike to the last bit. An inference tensor could not say so.
    with torch.inference_mode(False), torch.no_grad():
        return torch.where(mask, weight, 0.0).requires_grad_()


class WeightMask(nn.Module):
    """A parametrization that holds a weight's pruned places at zero.

    Args:
        mask: bool, shape of the weight, 1 = kept.
        order: parameter names of the module that owns the weight, in order of registration.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.order = order

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros at its pruned places; see ``mask_weight``."""
        return mask_weight(weight, self.mask)


def mask_module(module: nn.Module, masks: MaskSet) -> nn.Module:
    """The user's module with its masks in force: a second object of the same class over the same weights.

    The dense values stay in ``parametrizations.<name>.original``; reading ``weight`` gives the masked one. A tied
    weight keeps one parameter and one mask under all its names.

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
    named = dict(copy.named_parameters())
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    orders = {id(owner): tuple(name for name, _ in owner._parameters.items()) for owner in copy.modules()}
    for owner in copy.modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((owner, leaf))
    for fqn, packed in masks.packed.items():
        if fqn not in named or tuple(named[fqn].shape) != packed.shape:
            raise InputError(
                f"the masks hold {fqn} {packed.shape}, but the model has no such weight: they belong to another model"
            )
        mask = packed.unpack().to(named[fqn].device)
        for owner, leaf in places[id(named[fqn])]:
            parametrization = WeightMask(mask, orders[id(owner)])
            parametrize.register_parametrization(owner, leaf, parametrization, unsafe=True)
    return copy


def masked_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(FQN without parametrization, dense original, mask) of every masked weight of a module, each name once."""
    for path, owner in module.named_modules():
        for leaf, stack in getattr(owner, "parametrizations", {}).items():
            for item in stack:
                if isinstance(item, WeightMask):
                    yield f"{path}.{leaf}" if path else leaf, stack.original, item.mask


def strip(module: nn.Module) -> nn.Module:
    """Bake the zeros into plain parameters and stop enforcing them, in place; tied weights stay tied.

    The dense values are not overwritten: masked weights become new parameters.

    Args:
        module: a module from ``mask_module`` (``compiled.module``).

    Returns:
        The same object, without parametrizations of mfcompile.
    """
    baked: dict[int, nn.Parameter] = {}
    owners: list[tuple[nn.Module, str, Any]] = [
        (owner, leaf, stack)
        for owner in module.modules()
        for leaf, stack in list(getattr(owner, "parametrizations", {}).items())
    ]
    for owner, leaf, stack in owners:
        masks = [item for item in stack if isinstance(item, WeightMask)]
        if not masks:
            continue
        original: Tensor = stack.original
        if id(original) not in baked:
            baked[id(original)] = nn.Parameter(getattr(owner, leaf).detach(), requires_grad=original.requires_grad)
        parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
        setattr(owner, leaf, baked[id(original)])
        _reorder(owner, masks[0].order)
    return module


def _reorder(owner: nn.Module, order: tuple[str, ...]) -> None:
    """Bring parameters back into their order of registration, which ``named_parameters`` and optimizers follow."""
    found = dict(owner._parameters)
    owner._parameters.clear()
    owner._parameters.update({name: found.pop(name) for name in order if name in found} | found)
