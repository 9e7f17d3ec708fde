"""Wrappers around models: what ``torch.compile`` and the data-parallel classes put around a module is taken off.

A wrapper changes names (``_orig_mod.``, ``module.``) and hides the operators of its module; the module inside is what is
captured, pruned and saved.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mfcompile.errors import CaptureError
from mfcompile.module_copy import share_weights_copy


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module inside every wrapper, and what was taken off, in words.

    Args:
        model: any module; it is not changed.

    Returns:
        (the module, notes). Without a wrapper it is ``model`` itself. Where the whole model is wrapped it is the module inside.
        Where submodules are, it is a second object over the same weights that holds the modules inside in their places.

    Raises:
        CaptureError: the model is a TorchScript module, its weights are sharded over processes, or a model with wrapped
            submodules cannot be copied.
    """
    notes: list[str] = []
    inner = _inside(model)
    while inner is not None:
        notes.append(f"the {type(inner).__name__} inside {_kind(model)}")
        model, inner = inner, _inside(inner)
    _refuse_shards(model)
    notes += _compiled_code(model)
    wrapped: dict[nn.Module, nn.Module] = {}
    places: dict[str, list[str]] = {}
    for path, item in model.named_modules():
        inside = _inside(item)
        if inside is not None:
            wrapped[item] = inside
            places.setdefault(_kind(item), []).append(_without_wrappers(model, path))
    if not wrapped:
        return model, tuple(notes)
    for kind, paths in places.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        notes.append(f"the eager code of {', '.join(paths[:3])}{more}, without {kind}")
    try:
        return share_weights_copy(model, wrapped), tuple(notes)
    except Exception as error:  # deepcopy runs arbitrary code of the user's attributes
        raise CaptureError(
            f"{type(model).__name__} holds submodules inside wrappers ({', '.join(places)}), which are taken off in a copy, "
            f"but it cannot be copied ({type(error).__name__}: {error}). Give the model as it was before it was wrapped"
        ) from error


def check_devices(model: nn.Module) -> None:
    """Refuse a model that does not lie on one device; the meta device, where nothing lies, does not count.

    Raises:
        CaptureError: the weights are spread over several devices.
    """
    devices = Counter(str(tensor.device) for tensor in (*model.parameters(), *model.buffers()))
    real = [device for device in devices if device != "meta"]
    if len(real) > 1:
        spread = ", ".join(f"{devices[device]} on {device}" for device in sorted(real))
        raise CaptureError(
            f"the model's tensors are spread over several devices ({spread}): observers and masks live on one. Bring the model "
            f"to one device (model.to('cpu') needs no accelerator), and the inputs too"
        )


def _compiled_code(model: nn.Module) -> list[str]:
    """A note about submodules whose code TorchScript holds.

    Raises:
        CaptureError: the whole model is one, so that no weight of it could be pruned.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is a TorchScript module: its submodules cannot be told apart while it runs, and no mask can be put on "
            "its weights. Give the Python module that it was made from, or a torch.export archive of it (.pt2)"
        )
    paths = [path for path, item in model.named_modules() if isinstance(item, torch.jit.ScriptModule)]
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    if not outermost:
        return []
    more = f" and {len(outermost) - 3} more" if len(outermost) > 3 else ""
    return [
        f"the TorchScript code of {', '.join(outermost[:3])}{more}: weights in there stay dense; put the Python modules "
        f"in their places to prune them"
    ]


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper is around; None for a module that is no wrapper."""
    for (owner, name), attribute in _WRAPPERS.items():
        found = getattr(sys.modules.get(owner), name, None)  # a wrapper of a module that nobody loaded is around nothing
        if isinstance(found, type) and isinstance(module, found):
            inner = attribute(module)
            return inner if isinstance(inner, nn.Module) else None
    return None


_WRAPPERS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): lambda module: module._orig_mod,
    ("torch.nn.parallel.data_parallel", "DataParallel"): lambda module: module.module,
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): lambda module: module.module,
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): lambda module: module.module,
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): lambda module: (
        module._checkpoint_wrapped_module
    ),
}
"""(module, class) of each wrapper of torch -> what it is around."""


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return "torch.compile" if name == "OptimizedModule" else name


def _without_wrappers(model: nn.Module, path: str) -> str:
    """The path of a submodule as it is called once the wrappers around it are gone."""
    kept, current = [], model
    for part in path.split("."):
        if _inside(current) is None:
            kept.append(part)
        current = current.get_submodule(part)
    return ".".join(kept)


def _refuse_shards(model: nn.Module) -> None:
    for path, item in model.named_modules():
        if getattr(getattr(item, "_handle", None), "uses_sharded_strategy", False):
            raise CaptureError(_sharded(path or "the model", "sharded over processes"))
    for name, parameter in model.named_parameters():
        is_flat = getattr(parameter, "_is_flat_param", False)
        if is_flat or _is_distributed(parameter):
            raise CaptureError(_sharded(f"the parameter {name}", "flattened" if is_flat else "sharded over processes"))


def _sharded(what: str, how: str) -> str:
    return (
        f"{what} is {how} by FSDP: weights cannot be pruned in that form. Load the full state dict into the plain model "
        f"(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), and give that"
    )


def _is_distributed(parameter: Tensor) -> bool:
    found = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return isinstance(found, type) and isinstance(parameter, found)
