"""Pruned directories read back into modules that train on, and written again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mfcompile.errors import InputError, MaskError
from mfcompile.files import staged_directory
from mfcompile.frontends.huggingface import load_pretrained
from mfcompile.frontends.unwrapping import unwrap
from mfcompile.masked_weights import masks_of, put_masks, strip
from mfcompile.masks import MaskSet
from mfcompile.module_copy import share_weights_copy, with_weights
from mfcompile.passes.masking import mask_module as _mask_module
from mfcompile.saving import save_weights
from mfcompile.training.verification import verify_masks

WEIGHTS, MASKS, REPORT = "model.safetensors", "masks.safetensors", "report.json"
_INDEX = "model.safetensors.index.json"


def mask_module(module: nn.Module, masks: MaskSet | Path | str) -> nn.Module:
    """A module with masks in force over the weights of a dense one; where masks bring new values, the kept weights have these.

    Args:
        module: the dense module; it stays as it is. Its parameters are shared, so that training one trains the other, but for
            weights with new values.
        masks: FQN -> mask, or the path of masks.safetensors.

    Raises:
        InputError: the masks do not fit the module (see ``transfer_masks``), masks are in force in it, or it cannot be copied.
    """
    masks = masks if isinstance(masks, MaskSet) else MaskSet.load(masks)
    module, _ = unwrap(module)
    _refuse_masked(module)
    masked = _mask_module(module, masks)  # checks names and shapes before any weight is rewritten
    if not masks.new_values:
        return masked
    values = {fqn: masks.updated_weight(fqn, module.get_parameter(fqn)) for fqn in masks.new_values}
    return _mask_module(with_weights(module, values), masks)


def load(directory: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The pruned model in a directory that ``compiled.save``, ``mfcompile prune``, ``save`` or the transformers Trainer (with
    ``MaskCallback``) wrote: masks in force, ready to be trained on.

    Weights are those of model.safetensors, as trained last. Values that masks.safetensors brings from an update at the time
    of pruning are in there already, and are left aside.

    Args:
        directory: holds model.safetensors and masks.safetensors.
        model: the module that the weights belong to; they are loaded into it, strictly. None builds the transformers model
            that config.json names, in the dtype that was saved.

    Returns:
        The module itself, of its own class, with masks in force; one from transformers is in eval mode, as it loads them.
        The masks are ``masks_of(module)``.

    Raises:
        InputError: a file is missing or damaged, files are of different runs, or names and shapes of weights do not match the
            module (all of them are said).
        MaskError: model.safetensors holds values where masks.safetensors prunes.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"there is no directory {directory}: give one that compiled.save or mfcompile prune wrote")
    masks = MaskSet.load(directory / MASKS)
    _check_report(directory, masks)
    if model is not None:
        _refuse_masked(model)
        load_weights(model, directory)
    elif (directory / "config.json").is_file():
        model = load_pretrained(directory)
    else:
        raise InputError(
            f"{directory} has no config.json, which would name a transformers model: build your module and give it, "
            f"mfcompile.load({str(directory)!r}, model=YourModel())"
        )
    try:
        verify_masks(model, masks)
    except MaskError as error:
        raise MaskError(f"{directory / WEIGHTS} does not belong to {MASKS} beside it: {error}") from error
    put_masks(model, replace(masks, new_values={}), shared=False)
    return model


def save(module: nn.Module, directory: Path | str, *, overwrite: bool = False) -> Path:
    """Write a masked module into a new directory, complete or not at all: plain weights with zeros baked in, and its masks.

    The module may write its own configuration (``save_pretrained``). ``load`` reads the directory, and so does the module's
    own library, without mfcompile. Adapters of ``add_lora`` are merged in what is written, and stay in the module.

    Args:
        module: with masks in force; it stays as it is. Wrappers around it are left out.
        directory: new or empty.
        overwrite: replace what is there.

    Raises:
        InputError: no masks are in force, or the directory cannot be written.
    """
    module, _ = unwrap(module)
    masks = masks_of(module)
    if not masks:
        raise InputError(f"{type(module).__name__} has no masks in force: save a module without masks as its library does")
    verify_masks(module)
    with staged_directory(Path(directory), overwrite=overwrite) as staging:
        save_weights(strip(share_weights_copy(module)), staging)
        masks.save(staging / MASKS)
    return Path(directory)


def load_weights(model: nn.Module, directory: Path) -> None:
    """Load model.safetensors (or its shards) into a module; names, shapes and dtypes must all match.

    Raises:
        InputError: they do not (nothing was loaded), or there is no such file.
    """
    stored = read_weights(directory)
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    there = {own[name].data_ptr() for name in stored if name in own and own[name].numel()}
    problems = [f"not in the file: {name}" for name in own if name not in stored and own[name].data_ptr() not in there]
    problems += [f"not in the module: {name}" for name in stored if name not in own]
    for name in stored.keys() & own.keys():
        kinds = [f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in (stored[name], own[name])]
        if kinds[0] != kinds[1]:
            problems.append(f"{name} is {kinds[0]} in the file, {kinds[1]} in the module")
    if problems:
        more = f", and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise InputError(
            f"the weights in {directory} do not fit {type(model).__name__}: {'; '.join(sorted(problems)[:6])}{more}. "
            f"Build the module with the options, and in the dtype, that it was pruned with"
        )
    model.load_state_dict(stored, strict=False)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the shards that its index lists; a tied one under all its names.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    files = [directory / WEIGHTS]
    if (directory / _INDEX).is_file():
        files = [directory / name for name in sorted(set(_json(directory / _INDEX).get("weight_map", {}).values()))]
    elif not files[0].is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise InputError(f"{directory} holds no {WEIGHTS} (but {found}): the weights of a pruned .onnx file are in that file")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
                aliases = {name: first for name, first in (file.metadata() or {}).items() if first in tensors}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read as safetensors ({error}): it is damaged or missing") from error
        tensors |= {name: tensors[first] for name, first in aliases.items()}
    return tensors


def _check_report(directory: Path, masks: MaskSet) -> None:
    """A report beside the masks is of the same masks."""
    path = directory / REPORT
    if path.is_file() and _json(path).get("digest", masks.mask_digest()) != masks.mask_digest():
        raise InputError(f"{path} is of other masks than {MASKS} beside it: they are files of different runs")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _refuse_masked(module: nn.Module) -> None:
    if masks_of(module):
        raise InputError(
            f"{type(module).__name__} has masks in force already: give the dense module, or bake their zeros in first with "
            f"mfcompile.strip(module)"
        )
