"""Weights under a mask: how a module holds its pruned places at zero, and what it shows of that to the outside.

A masked weight stays the parameter that it was, under its own name and in its own place: ``named_parameters``, optimizers,
state dicts and wrappers find it there and move the stored values as they like. Whoever reads ``layer.weight`` gets these
values with zeros at the pruned places: the class of a masked layer has a property of that name, which stands before the
parameter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mfcompile.errors import InputError, MaskError
from mfcompile.low_rank import LowRank
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.weight_mask import MaskRecord, WeightMask, mask_weight

__all__ = [
    "adapter_of",
    "computed_weight",
    "hold",
    "mask_weight",
    "masked_parameters",
    "masked_places",
    "masks_of",
    "put_masks",
    "replaced_weights",
    "stored_weight",
    "strip",
]

_MASKS = "_weight_masks"
_BASE = "base"


def hold(owner: nn.Module, leaf: str, mask: WeightMask) -> None:
    """Put a mask on a parameter of a module, in place; the parameter stays the one that optimizers know."""
    masks: dict[str, WeightMask] = owner.__dict__.get(_MASKS) or {}
    owner.__dict__[_MASKS] = masks | {leaf: mask}
    kind = type(owner)
    owner.__class__ = _masked_kind(vars(kind).get("_mfcompile_base", kind), tuple(sorted(masks | {leaf: mask})))


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
    for owner in module.modules():
        for leaf, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((owner, leaf))
    for fqn, packed in masks.packed.items():
        record = MaskRecord(masks.regions.get(fqn, ""), masks.fingerprint, masks.sparsity)
        mask = WeightMask(packed.unpack(), named[fqn] if shared else None, record)
        mask.move(named[fqn].device)
        for owner, leaf in places[id(named[fqn])]:
            hold(owner, leaf, mask)
            _write_zeros(owner, leaf, mask)


def masks_of(module: nn.Module) -> MaskSet:
    """The masks that are in force in a module, as ``save`` writes them; a tied weight is listed under its first name.

    Args:
        module: a module with masks in force, or one without: its set is empty.
    """
    packed: dict[str, PackedMask] = {}
    records: dict[str, MaskRecord] = {}
    seen: set[int] = set()
    for fqn, owner, leaf, mask in masked_places(module):
        stored = stored_weight(owner, leaf)
        if id(stored) not in seen:
            seen.add(id(stored))
            packed[fqn], records[fqn] = PackedMask.pack(mask.mask), mask.record
    first = next(iter(records.values()), MaskRecord())
    alike = all((item.fingerprint, item.sparsity) == (first.fingerprint, first.sparsity) for item in records.values())
    regions = {fqn: record.region for fqn, record in records.items() if record.region}
    return MaskSet(packed, regions, first.fingerprint if alike else "", first.sparsity if alike else None)


def masked_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, WeightMask]]:
    """(FQN, owner, parameter name, mask) of every masked weight of a module, a tied one under each of its names.

    Raises:
        MaskError: something took the parameter of a masked weight away.
    """
    for path, owner in module.named_modules():
        masks: Mapping[str, WeightMask] = owner.__dict__.get(_MASKS) or {}
        for leaf, mask in masks.items():
            fqn = f"{path}.{leaf}" if path else leaf
            if leaf not in owner._parameters and leaf not in owner.__dict__:
                raise MaskError(_taken_away(fqn))
            yield fqn, owner, leaf, mask


def masked_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(FQN, stored values, mask) of every masked weight of a module, a tied one under each of its names."""
    for fqn, owner, leaf, mask in masked_places(module):
        yield fqn, stored_weight(owner, leaf), mask.mask


def stored_weight(owner: nn.Module, leaf: str) -> Tensor:
    """What is stored of a weight: the parameter, without zeros. Wrappers put plain tensors in its place for a while."""
    stored = owner.__dict__.get(leaf)
    stored = owner._parameters.get(leaf) if stored is None else stored
    if stored is None:
        raise AttributeError(f"{type(owner).__name__} has no parameter {leaf}", name=leaf, obj=owner)
    return stored


def computed_weight(owner: nn.Module, leaf: str) -> Tensor:
    """What a layer computes with: the stored values, and an adapter's, under the mask."""
    stored, adapter = stored_weight(owner, leaf), adapter_of(owner, leaf)
    mask: WeightMask = owner.__dict__[_MASKS][leaf]
    return mask(stored if adapter is None else adapter(stored))


def adapter_of(owner: nn.Module, leaf: str) -> LowRank | None:
    """What ``add_lora`` put before a mask."""
    found = owner._modules.get(f"{leaf}_lora")
    return found if isinstance(found, LowRank) else None


def replaced_weights(module: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
    """FQN -> what a masked module computes with in the place of a dense module's parameter, where they share it no longer.

    Loading with ``assign=True``, for instance, brings other parameters; an adapter adds to one.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    found = {fqn: own[fqn].detach() for fqn, parameter in dense.named_parameters() if own.get(fqn, parameter) is not parameter}
    for fqn, owner, leaf, _ in masked_places(module):
        if adapter_of(owner, leaf) is not None:
            found[fqn] = computed_weight(owner, leaf).detach()
    first = {fqn for fqn, _ in dense.named_parameters()}
    return {fqn: value for fqn, value in found.items() if fqn in first}


def strip(module: nn.Module) -> nn.Module:
    """Bake the zeros into plain parameters and stop enforcing them, in place; tied weights stay tied.

    The dense values are not overwritten: masked weights become new parameters. Adapters of ``add_lora`` are merged.

    Args:
        module: a module with masks in force (``compiled.module``).

    Returns:
        The same object, of plain classes again.
    """
    baked: dict[int, nn.Parameter] = {}
    places = list(masked_places(module))
    for _, owner, leaf, _ in places:
        stored, adapter = stored_weight(owner, leaf), adapter_of(owner, leaf)
        if id(stored) not in baked:
            trainable = stored.requires_grad or adapter is not None
            baked[id(stored)] = nn.Parameter(computed_weight(owner, leaf).detach(), requires_grad=trainable)
    for _, owner, leaf, _ in places:
        new = baked[id(stored_weight(owner, leaf))]
        if adapter_of(owner, leaf) is not None:
            del owner._modules[f"{leaf}_lora"]
        owner.__dict__.pop(leaf, None)
        owner._parameters[leaf] = new
    for owner in {id(owner): owner for _, owner, _, _ in places}.values():
        del owner.__dict__[_MASKS]
        owner.__class__ = vars(type(owner)).get("_mfcompile_base", type(owner))
    return module


@functools.cache
def _masked_kind(base: Any, leaves: tuple[str, ...]) -> type[nn.Module]:
    """The class of masked modules of a class: equal layers share one, so that what is compiled for one serves all."""

    def state_dict(
        self: nn.Module, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        if args:  # torch still takes them by position
            destination, prefix, keep_vars = [*args, *[destination, prefix, keep_vars][len(args) :]]
        found: dict[str, Any] = base.state_dict(self, destination=destination, prefix=prefix, keep_vars=keep_vars)
        _to_effective(self, found, prefix, keep_vars)
        return found

    def load(
        self: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        for leaf in leaves:  # under an adapter the weight's own name holds what is computed
            if adapter_of(self, leaf) is not None and f"{prefix}{leaf}_lora.{_BASE}" in state:
                state[f"{prefix}{leaf}"] = state.pop(f"{prefix}{leaf}_lora.{_BASE}")
        base._load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest)

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        base._apply(self, fn, recurse)
        for leaf, mask in (self.__dict__.get(_MASKS) or {}).items():
            mask.move(stored_weight(self, leaf).device)
        return self

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        mask = (self.__dict__.get(_MASKS) or {}).get(name)
        if mask is not None and param is not None and param.shape != mask.mask.shape and not hasattr(param, "device_mesh"):
            raise InputError(
                f"{name} of {base.__name__} has a mask of shape {tuple(mask.mask.shape)}, the new parameter is "
                f"{tuple(param.shape)}: bake the zeros in first (mfcompile.strip(module)), then change the layer"
            )
        base.register_parameter(self, name, param)

    def remove(self: nn.Module, name: str) -> None:
        if name in (self.__dict__.get(_MASKS) or {}):
            raise MaskError(_taken_away(f"{name} of {base.__name__}"))
        base.__delattr__(self, name)

    def set_state(self: nn.Module, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        for leaf, mask in (self.__dict__.get(_MASKS) or {}).items():
            _write_zeros(self, leaf, mask)  # a copy owns its weights

    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        return _new, (base, leaves), self.__getstate__()  # type: ignore[no-untyped-call]

    members: dict[str, Any] = {
        "state_dict": state_dict,
        "_load_from_state_dict": load,
        "_apply": apply,
        "__delattr__": remove,
        "__reduce_ex__": reduce_ex,
        "__setstate__": set_state,
    }
    members |= {leaf: _masked_property(leaf) for leaf in leaves}
    members |= {"register_parameter": register_parameter, "_mfcompile_base": base, "__doc__": base.__doc__}
    # What libraries write into configurations is the user's class.
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), members)


def _masked_property(leaf: str) -> property:
    """What reads a masked weight; it stands before the parameter of its name, which torch finds last."""

    def computed(self: nn.Module) -> Tensor:
        stored = stored_weight(self, leaf)
        mask = (self.__dict__.get(_MASKS) or {}).get(leaf)
        if mask is None or mask.is_cut(self, stored):
            return stored
        key = (id(self), leaf)
        if not parametrize._cache_enabled:  # as other computed weights of torch
            return computed_weight(self, leaf)
        if key not in parametrize._cache:
            parametrize._cache[key] = computed_weight(self, leaf)
        found: Any = parametrize._cache[key]
        return found  # type: ignore[no-any-return]

    def replace(self: nn.Module, value: Tensor) -> None:  # replicas of DataParallel hold tensors in the place of parameters
        if getattr(self, "_is_fsdp_managed_module", False):
            raise MaskError(_taken_away(f"{leaf} of {type(self).__name__}"))
        self.__dict__[leaf] = value

    return property(computed, replace)


def _taken_away(name: str) -> str:
    return (
        f"{name} has a mask, and its parameter is taken away from it, by a parametrization that is put over it (weight_norm, "
        f"spectral_norm, torch.nn.utils.prune) or by FullyShardedDataParallel. Put norms on the dense model, before it is "
        f"pruned, or bake the zeros in first (mfcompile.strip(module)); shard with torch.distributed.fsdp.fully_shard"
    )


def _new(base: Any, leaves: tuple[str, ...]) -> nn.Module:
    kind: Any = _masked_kind(base, leaves)
    made: nn.Module = kind.__new__(kind)
    return made


_BAKED: MutableMapping[int, Tensor] = weakref.WeakValueDictionary()
"""id of a stored tensor -> its effective values, as last given in a state dict that still exists."""


def _to_effective(owner: nn.Module, state: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Put what a masked module computes with in the place of what torch saved of it; its own values stand beside an adapter."""
    for leaf, mask in (owner.__dict__.get(_MASKS) or {}).items():
        if f"{prefix}{leaf}" not in state:
            continue  # a hook of the user's left it out
        saved = state[f"{prefix}{leaf}"]
        state[f"{prefix}{leaf}"] = _effective(owner, leaf, mask, state, keep_vars)
        if adapter_of(owner, leaf) is not None:
            state[f"{prefix}{leaf}_lora.{_BASE}"] = saved


def _effective(owner: nn.Module, leaf: str, mask: WeightMask, state: Mapping[str, Any], keep_vars: bool) -> Tensor:
    """The values that a layer computes with: the stored tensor itself, with its zeros, wherever that may hold them.

    Averages of weights are often taken by writing into the tensors of a state dict. A copy of a model owns its stored
    values, so that zeros are written there; those of a model that shares a dense one's are given as new tensors.
    """
    stored = stored_weight(owner, leaf)
    if _write_zeros(owner, leaf, mask):
        return stored if keep_vars else stored.detach()
    if keep_vars:
        return computed_weight(owner, leaf)
    made = _BAKED.get(id(stored))
    if made is None or all(value is not made for value in state.values()):
        made = computed_weight(owner, leaf).detach()
        _BAKED[id(stored)] = made
    return made  # a tied weight is the same tensor under all its names in one state dict


def _write_zeros(owner: nn.Module, leaf: str, mask: WeightMask) -> bool:
    """Write zeros to pruned places of what is stored, and say whether that may be done: it is this module's alone, and all."""
    stored = stored_weight(owner, leaf)
    if mask.is_shared(stored) or adapter_of(owner, leaf) is not None:
        return False
    with torch.no_grad():
        stored.masked_fill_(~mask.over(stored), 0.0)
    return True
