"""A model from a directory that transformers' ``save_pretrained`` wrote.

Offline, from safetensors only, and without running code from the directory: neither pickled weights nor custom model
code (``trust_remote_code``) is ever loaded. transformers is imported when a directory is loaded, not before.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfcompile.errors import InputError
from mfcompile.files import write_atomically
from mfcompile.frontends.sources import ModelSource
from mfcompile.frontends.synthesize import synthesize_inputs

_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LFS_POINTER = b"version https://git-lfs"
# What transformers reads beside the weights: configs, tokenizers, processors; and the licence the weights came with.
_EXTRAS = (
    "*config*.json",
    "tokenizer*",
    "*vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "LICENSE*",
    "NOTICE*",
)
_NOT_EXTRAS = {"config.json", "adapter_config.json"}


def load_huggingface(directory: Path, *, weights: bool = True) -> ModelSource:
    """The model in a Hugging Face directory, in float32, with synthesised example inputs.

    Args:
        directory: holds config.json and, where they are wanted, weights.
        weights: False builds the model on the meta device: good for a plan, and as cheap for a model of any size.

    Raises:
        InputError: transformers is not installed, the directory is incomplete or holds pickled weights only, or no
            example inputs were found that the model runs with.
    """
    transformers = _import_transformers()
    config_json = _read_config(directory)
    if weights:
        _check_weights(directory)
    notes: list[str] = []
    # Weights that are not in the files are drawn at random: the same ones every time.
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = _load_config(transformers, directory, config_json)
        model_class = _find_class(transformers, config, notes)
        model = _load_model(model_class, directory, config, notes)[0] if weights else _build_empty(model_class, config, notes)
        inputs, input_notes = synthesize_inputs(model, directory)

    def save_extras(target: Path) -> None:
        _save_extras(directory, target, type(model).__name__)

    return ModelSource(
        model=model,
        example_inputs=inputs,
        path=directory,
        kind="huggingface",
        notes=(*notes, *input_notes, "a Hugging Face directory holds no calibration data"),
        save_extras=save_extras,
    )


def load_pretrained(directory: Path) -> nn.Module:
    """The model in a Hugging Face directory, complete, in the dtype that it was saved in.

    Args:
        directory: holds config.json and weights.

    Raises:
        InputError: transformers is not installed, or the directory is incomplete, or holds not all weights of the model.
    """
    transformers = _import_transformers()
    config_json = _read_config(directory)
    _check_weights(directory)
    notes: list[str] = []
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        config = _load_config(transformers, directory, config_json)
        model_class = _find_class(transformers, config, notes)
        model, missing = _load_model(model_class, directory, config, notes, dtype="auto")
    if missing:
        raise InputError(
            f"{directory} does not hold all weights of {type(model).__name__}: {_shorten(missing)}. Give the module that they "
            f"belong to"
        )
    return model


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"a Hugging Face directory needs transformers, which cannot be imported ({error}). "
            f"Run: pip install 'mfcompile[transformers]'"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no warnings from transformers on the user's terminal: what matters becomes a note."""
    logging = transformers.utils.logging
    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}. Fetch or save the model again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a {type(config).__name__}, not a JSON object. Fetch or save the model again")
    return config


def _check_weights(directory: Path) -> None:
    """The directory holds all its weights, as safetensors.

    Raises:
        InputError: names the file that is missing or not acceptable.
    """
    index, single = directory / _INDEX, directory / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = _shards(index)
    else:
        raise InputError(_describe_no_weights(directory))
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing: {index.name} lists it among the weights. Fetch or save it again")
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(f"{file} is a Git LFS pointer, not the weights. Run `git lfs pull` in {directory}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of safetensors shards: {error!r}. Fetch or save the model again") from error
    return [index.parent / str(name) for name in names]


def _describe_no_weights(directory: Path) -> str:
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return (
            f"{directory} holds neither model.safetensors nor {_INDEX}, only {', '.join(others)}. "
            f"Rename the file with the weights to model.safetensors"
        )
    pickled = sorted({path.name for pattern in _PICKLED for path in directory.glob(pattern)})
    if pickled:
        return (
            f"{directory} holds its weights only as a pickled file, {', '.join(pickled)}: loading it can run any code, "
            f"so mfcompile does not. Convert it to safetensors once, where you trust it: "
            f"MODEL_CLASS.from_pretrained({str(directory)!r}, use_safetensors=False).save_pretrained(NEW_DIR)"
        )
    return (
        f"{directory} holds config.json but no weights (*.safetensors): there is nothing to prune. "
        f"Fetch the weights into it, or name the directory that save_pretrained wrote. Its regions can be seen without "
        f"them: mfcompile inspect {directory} --no-weights"
    )


def _load_config(transformers: Any, directory: Path, config_json: dict[str, Any]) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        model_type = config_json.get("model_type")
        if "auto_map" in config_json:
            raise InputError(
                f"{directory / 'config.json'} (model_type {model_type!r}) asks for Python code from the directory "
                f"(auto_map), which mfcompile does not run. Write a model.py that imports that code, builds the model "
                f"and defines `example_inputs`, and name it"
            ) from error
        raise InputError(
            f"transformers {transformers.__version__} cannot use {directory / 'config.json'} "
            f"(model_type {model_type!r}): {_first_line(error)}. Update transformers, or write a model.py"
        ) from error


def _find_class(transformers: Any, config: Any, notes: list[str]) -> Any:
    """The class named in ``config.architectures``, else AutoModel, which goes by the type of the config."""
    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    named = f"names {', '.join(names)}, which transformers does not have" if names else "names no architecture"
    notes.append(f"config.json {named}: the base model of its type was loaded (AutoModel)")
    return transformers.AutoModel


def _load_model(
    model_class: Any, directory: Path, config: Any, notes: list[str], dtype: torch.dtype | str = torch.float32
) -> tuple[nn.Module, list[str]]:
    """The model, and the names of its weights that are not in the files."""
    try:
        model, info = model_class.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and the model itself raise many kinds
        raise InputError(
            f"{model_class.__name__} cannot be loaded from {directory}: {type(error).__name__}: {_first_line(error)}. "
            f"Check that config.json belongs to these weights, or write a model.py that builds the model"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{model_class.__name__}.from_pretrained gave a {type(model).__name__}. Write a model.py")
    missing = sorted(info["missing_keys"])
    if missing and len(missing) >= len(model.state_dict()):
        raise InputError(
            f"the weights in {directory} hold none of the parameters of {type(model).__name__} ({missing[0]}, ...). "
            f"Check that config.json belongs to these weights"
        )
    if missing:
        notes.append(f"not among the saved weights, so random: {_shorten(missing)}")
    if info["unexpected_keys"]:
        unexpected = _shorten(sorted(info["unexpected_keys"]))
        notes.append(f"saved weights that {type(model).__name__} does not use, left out: {unexpected}")
    return model.eval(), missing


def _build_empty(model_class: Any, config: Any, notes: list[str]) -> nn.Module:
    """The model on the meta device, without looking at any weights."""
    try:
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=torch.float32)
    except Exception as error:  # the model's own code raises anything
        raise InputError(
            f"{model_class.__name__} cannot be built from config.json without weights: {type(error).__name__}: "
            f"{_first_line(error)}. Load it with its weights"
        ) from error
    notes.append("no weights were loaded: this is a plan, and nothing can be pruned with it")
    return model.eval()


def _save_extras(source: Path, target: Path, class_name: str) -> None:
    """Write what ``from_pretrained`` needs beside float32 weights; files that ``target`` has already stay as they are."""
    target.mkdir(parents=True, exist_ok=True)
    if not (target / "config.json").exists():
        config = _read_config(source)
        # The weights are saved as they were pruned: in float32, by this class. A stale dtype would round them on load.
        config.pop("torch_dtype", None)
        config |= {"architectures": [class_name], "dtype": "float32"}
        write_atomically(target / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    for path in sorted({path for pattern in _EXTRAS for path in source.glob(pattern)}):
        copy = target / path.name
        if path.name in _NOT_EXTRAS or copy.exists():
            continue
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copyfile(path, copy)


def _shorten(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
