"""Weights under a mask: how a module holds its pruned places at zero, and what it shows of that to the outside.

A masked weight is a parametrization of torch: an optimizer moves the stored values, everybody who reads ``weight`` gets
them with zeros at the pruned places. To the outside the module looks as if it had no masks: ``state_dict()`` has the names and
the effective values that a plain model has, ``load_state_dict`` takes the same, and the module can be pickled.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from mfcompile.errors import InputError
from mfcompile.low_rank import LowRank
from mfcompile.masks import MaskSet, PackedMask

_BASE = "base"


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


@dataclass(frozen=True)
class MaskRecord:
    """Where a mask comes from.

    Attributes:
        region: region of the weight, "" when unknown.
        fingerprint: fingerprint of the model that the masks were made for, "" when unknown.
        sparsity: requested sparsity of the whole set, the fraction removed: one, or region -> its own.
    """

    region: str = ""
    fingerprint: str = ""
    sparsity: float | Mapping[str, float] | None = None


class WeightMask(nn.Module):
    """A parametrization that holds a weight's pruned places at zero.

    The mask is no buffer: averages of weights, broadcasts of buffers and checkpoints have no business with it.

    Args:
        mask: bool, shape of the weight, 1 = kept; never written to.
        order: parameter names of the module that owns the weight, in order of registration.
        shared: the parameter of a dense model that the masked module shares; zeros are not written into it.
        record: where the mask comes from.
    """

    def __init__(
        self,
        mask: Tensor,
        order: tuple[str, ...] = (),
        shared: nn.Parameter | None = None,
        record: MaskRecord | None = None,
    ) -> None:
        super().__init__()
        self.mask = mask
        self.order = order
        self.record = record or MaskRecord()
        self._shared = None if shared is None else weakref.ref(shared)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros at its pruned places; see ``mask_weight``."""
        return mask_weight(weight, _sharded_like(weight, self.mask))

    def is_shared(self, original: Tensor) -> bool:
        """The stored tensor is a dense model's own, whose values at pruned places must stay."""
        is_cut = hasattr(original, "device_mesh")  # by FSDP, which leaves no dense model over the same parameters
        return self._shared is not None and self._shared() is original and not is_cut

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> WeightMask:
        self.mask = self.mask.to(fn(self.mask.new_empty(0)).device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightMask:
        twin = WeightMask(self.mask, self.order, None, self.record).train(self.training)
        twin._shared = self._shared  # only a copy over the very same parameter still shares it
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shared": None}


def hold(owner: nn.Module, leaf: str, mask: WeightMask) -> None:
    """Put a mask on a parameter of a module, in place; the parameter object stays the one that optimizers know."""
    parametrize.register_parametrization(owner, leaf, mask, unsafe=True)
    _look_plain(type(owner))


def put_masks(module: nn.Module, masks: MaskSet, *, shared: bool) -> None:
    """Put masks on the weights of a module, in place; a tied weight gets one mask under all its names.

    Args:
        module: a module without masks.
        masks: FQN -> mask; their new values are left aside.
        shared: the parameters are also those of a dense model, into which no zeros are to be written.

    Raises:
        InputError: a mask has no weight of its shape; nothing was put.
    """
    named = dict(module.named_parameters())
    for fqn, packed in masks.packed.items():
        if fqn not in named or tuple(named[fqn].shape) != packed.shape:
            raise InputError(
                f"the masks hold {fqn} {packed.shape}, but the model has no such weight: they belong to another model"
            )
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    orders = {id(owner): tuple(name for name, _ in owner._parameters.items()) for owner in module.modules()}
    for owner in module.modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((owner, leaf))
    for fqn, packed in masks.packed.items():
        mask = packed.unpack().to(named[fqn].device)
        record = MaskRecord(masks.regions.get(fqn, ""), masks.fingerprint, masks.sparsity)
        for owner, leaf in places[id(named[fqn])]:
            hold(owner, leaf, WeightMask(mask, orders[id(owner)], named[fqn] if shared else None, record))


def masks_of(module: nn.Module) -> MaskSet:
    """The masks that are in force in a module, as ``save`` writes them; a tied weight is listed under its first name.

    Args:
        module: a module with masks in force, or one without: its set is empty.
    """
    packed: dict[str, PackedMask] = {}
    records: dict[str, MaskRecord] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, stack, mask in stacks_of(owner):
            if id(stack.original) not in seen:
                seen.add(id(stack.original))
                fqn = f"{path}.{leaf}" if path else leaf
                packed[fqn], records[fqn] = PackedMask.pack(mask.mask), mask.record
    first = next(iter(records.values()), MaskRecord())
    alike = all((item.fingerprint, item.sparsity) == (first.fingerprint, first.sparsity) for item in records.values())
    regions = {fqn: record.region for fqn, record in records.items() if record.region}
    return MaskSet(packed, regions, first.fingerprint if alike else "", first.sparsity if alike else None)


def stacks_of(owner: nn.Module) -> Iterator[tuple[str, Any, WeightMask]]:
    """(parameter name, its parametrizations, its mask) of every masked weight that a module owns itself."""
    for leaf, stack in getattr(owner, "parametrizations", {}).items():
        masks = [item for item in stack if isinstance(item, WeightMask)]
        if masks:
            yield leaf, stack, masks[-1]


def masked_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(FQN without parametrization, dense original, mask) of every masked weight of a module, each name once."""
    for path, owner in module.named_modules():
        for leaf, stack, mask in stacks_of(owner):
            yield f"{path}.{leaf}" if path else leaf, stack.original, mask.mask


def plain_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name without parametrization, stored parameter) of every parameter, a tied one under each of its names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield _STORED.sub(r"\1", name), parameter


_STORED = re.compile(r"parametrizations\.([^.]+)\.original$")


def replaced_weights(module: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
    """FQN -> what a masked module computes with in the place of a dense module's parameter, where they share it no longer.

    Loading with ``assign=True``, for instance, brings other parameters; an adapter adds to one.
    """
    own = dict(plain_parameters(module))
    found = {fqn: own[fqn].detach() for fqn, parameter in dense.named_parameters() if own.get(fqn, parameter) is not parameter}
    for path, owner in module.named_modules():
        for leaf, stack, _ in stacks_of(owner):
            if any(isinstance(item, LowRank) for item in stack):
                found[f"{path}.{leaf}" if path else leaf] = getattr(owner, leaf).detach()
    first = {fqn for fqn, _ in dense.named_parameters()}
    return {fqn: value for fqn, value in found.items() if fqn in first}


def strip(module: nn.Module) -> nn.Module:
    """Bake the zeros into plain parameters and stop enforcing them, in place; tied weights stay tied.

    The dense values are not overwritten: masked weights become new parameters. Adapters of ``add_lora`` are merged.

    Args:
        module: a module with masks in force (``compiled.module``).

    Returns:
        The same object, without parametrizations of mfcompile.
    """
    baked: dict[int, nn.Parameter] = {}
    for owner in list(module.modules()):
        for leaf, stack, mask in list(stacks_of(owner)):
            original: Tensor = stack.original
            if id(original) not in baked:
                trainable = original.requires_grad or any(isinstance(item, LowRank) for item in stack)
                baked[id(original)] = nn.Parameter(getattr(owner, leaf).detach(), requires_grad=trainable)
            _own_class(owner)
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
            setattr(owner, leaf, baked[id(original)])
            _reorder(owner, mask.order)
    return module


def _own_class(owner: nn.Module) -> None:
    """Give a module a class of its own: a deep copy shares its class with its model, which taking a mask off would break."""
    kind = type(owner)
    owner.__class__ = type(
        kind.__name__, kind.__bases__, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    )


def _reorder(owner: nn.Module, order: tuple[str, ...]) -> None:
    """Bring parameters back into their order of registration, which ``named_parameters`` and optimizers follow."""
    found = dict(owner._parameters)
    owner._parameters.clear()
    owner._parameters.update({name: found.pop(name) for name in order if name in found} | found)


def _look_plain(kind: Any) -> None:
    """Give the class that torch made for one parametrized module plain state dicts and a way to be pickled."""
    if "_mfcompile_base" in vars(kind):
        return
    base = kind.__bases__[0]

    def state_dict(
        self: nn.Module, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        if args:  # torch still takes them by position
            destination, prefix, keep_vars = [*args, *[destination, prefix, keep_vars][len(args) :]]
        found: dict[str, Any] = base.state_dict(self, destination=destination, prefix=prefix, keep_vars=keep_vars)
        _to_plain(self, found, prefix, keep_vars)
        return found

    def load(
        self: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        _from_plain(self, state, prefix, missing)
        base._load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest)

    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        return _unmasked, (base,), _pickled(self), None, None, _unpickle

    kind._mfcompile_base = base
    kind.state_dict = state_dict
    kind._load_from_state_dict = load
    kind.__reduce_ex__ = reduce_ex
    # What libraries write into configurations is the user's class.
    kind.__name__, kind.__qualname__, kind.__module__ = base.__name__, base.__qualname__, base.__module__


_BAKED: MutableMapping[Any, weakref.ref[Tensor]] = WeakIdKeyDictionary()
"""Stored tensor -> its effective values, as last given in a state dict that still exists."""


def _to_plain(owner: nn.Module, state: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Rename what torch saved of a masked module to what it would have saved of a plain one."""
    tail = list(itertools.takewhile(lambda key: key.startswith(prefix), reversed(state)))
    saved = {key: state.pop(key) for key in reversed(tail)}
    order: tuple[str, ...] = ()
    for leaf, stack, mask in stacks_of(owner):
        stored = f"{prefix}parametrizations.{leaf}"
        order = mask.order
        if f"{stored}.original" not in saved:
            continue  # a hook of the user's left it out
        original = saved.pop(f"{stored}.original")
        saved[f"{prefix}{leaf}"] = _effective(owner, leaf, stack, mask, state, keep_vars)
        for index, item in enumerate(stack):
            if isinstance(item, LowRank):
                saved[f"{prefix}{leaf}_lora.{_BASE}"] = original
                for name in ("down", "up"):
                    saved[f"{prefix}{leaf}_lora.{name}"] = saved.pop(f"{stored}.{index}.{name}")
    state.update({key: saved.pop(key) for key in (prefix + name for name in order) if key in saved})
    state.update(saved)
    metadata = getattr(state, "_metadata", {})
    for key in [key for key in metadata if key.startswith(f"{prefix}parametrizations")]:
        del metadata[key]


def _effective(owner: nn.Module, leaf: str, stack: Any, mask: WeightMask, state: Mapping[str, Any], keep_vars: bool) -> Tensor:
    """The values that a layer computes with: the stored tensor itself, with its zeros, wherever that may hold them.

    Averages of weights are often taken by writing into the tensors of a state dict. A copy of a model owns its stored
    values, so that zeros are written there; those of a model that shares a dense one's are given as new tensors.
    """
    original: Tensor = stack.original
    if not mask.is_shared(original) and not any(isinstance(item, LowRank) for item in stack):
        with torch.no_grad():
            original.masked_fill_(~_sharded_like(original, mask.mask), 0.0)
        return original if keep_vars else original.detach()
    if keep_vars:
        weight: Tensor = getattr(owner, leaf)
        return weight
    made = _BAKED[original]() if original in _BAKED else None
    if made is None or all(value is not made for value in state.values()):
        made = getattr(owner, leaf).detach()
        _BAKED[original] = weakref.ref(made)
    return made  # a tied weight is the same tensor under all its names in one state dict


def _sharded_like(original: Tensor, mask: Tensor) -> Tensor:
    """The mask, cut as the stored tensor is: layers of FSDP hold whole tensors in their forward only."""
    if type(original) in (Tensor, nn.Parameter):
        return mask
    mesh: Any = getattr(original, "device_mesh", None)
    if mesh is None:
        return mask
    from torch.distributed.tensor import distribute_tensor

    placements: Any = original.placements  # type: ignore[attr-defined]
    return distribute_tensor(mask, mesh, placements, src_data_rank=None)  # every process has the whole mask


def _from_plain(owner: nn.Module, state: dict[str, Any], prefix: str, missing: list[str]) -> None:
    """Rename the keys of a plain state dict to those that torch expects of a parametrized module."""
    for leaf, stack, _ in stacks_of(owner):
        stored = f"{prefix}parametrizations.{leaf}"
        adapted = [str(index) for index, item in enumerate(stack) if isinstance(item, LowRank)]
        plain = state.pop(f"{prefix}{leaf}", state.pop(f"{stored}.original", None))  # or as named_parameters calls it
        base = state.pop(f"{prefix}{leaf}_lora.{_BASE}", plain) if adapted else plain
        if base is None:  # no such name in the file, which is said in the model's own words
            missing.append(f"{prefix}{leaf}")
            base = stack.original.detach()
        state[f"{stored}.original"] = base
        for index in adapted:
            for name in ("down", "up"):
                key = f"{prefix}{leaf}_lora.{name}"
                if key not in state:
                    missing.append(key)
                state[f"{stored}.{index}.{name}"] = state.pop(key, getattr(stack[int(index)], name).detach())


def _unmasked(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _pickled(owner: nn.Module) -> dict[str, Any]:
    """What a masked module is made of, with plain parameters and its masks apart."""
    held = {leaf: (stack.original, list(stack)) for leaf, stack in owner.parametrizations.items()}  # type: ignore[union-attr,operator]
    modules = {name: item for name, item in owner._modules.items() if name != "parametrizations"}
    return {"state": owner.__dict__ | {"_modules": modules}, "held": held}


def _unpickle(owner: nn.Module, pickled: Mapping[str, Any]) -> None:
    owner.__dict__.update(pickled["state"])
    for leaf, (original, items) in pickled["held"].items():
        owner.register_parameter(leaf, original)
        for item in items:
            parametrize.register_parametrization(owner, leaf, item, unsafe=True)
    _look_plain(type(owner))
