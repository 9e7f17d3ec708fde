"""A model from what a user names on the command line: a ``model.py``, a ``.pt2`` archive or a Hugging Face directory."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mfcompile.errors import InputError
from mfcompile.frontends.user_code import UserModule

_HELP = (
    "Name a Python file that defines `model` (or `build_model()`) and `example_inputs`, "
    "a .pt2 archive of torch.export, or a Hugging Face directory with config.json and *.safetensors"
)
_PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class ModelSource:
    """A model with everything that its source says about it.

    Attributes:
        model: in eval mode.
        example_inputs: a dict, tuple or tensor, as the source gave it.
        path: what was named.
        kind: "python", "huggingface" or "pt2".
        calibration: gives a fresh iterable of calibration batches at every call; None when the source has none.
        evaluate: measures a model; None when the source has no such function.
        loss_fn: the loss of a model on a calibration batch; None when the source has no such function.
        criterion: what ranks the weights, where the source brings its own.
        modalities: input name -> modality, where the source says so.
        regions: pattern -> region, where the source overrides what dataflow finds.
        padding_mask: name of the input that marks padding, where the source says so.
        notes: what was synthesised or assumed, in words for the user.
        save_extras: writes the files that belong beside saved weights (config, tokenizer, ...) into a directory.
    """

    model: nn.Module
    example_inputs: Any
    path: Path
    kind: str
    calibration: Callable[[], Iterable[Any]] | None = None
    evaluate: Callable[[nn.Module], Any] | None = None
    loss_fn: Callable[[Any, Any], Any] | None = None
    criterion: Any = None
    modalities: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    regions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    padding_mask: str | None = None
    notes: tuple[str, ...] = ()
    save_extras: Callable[[Path], None] | None = None


def load_source(path: str | Path, *, weights: bool = True) -> ModelSource:
    """The model that a path names.

    A ``model.py`` is executed with its folder importable. It defines

    * ``model`` or ``build_model()``: an nn.Module, or a program of torch.export;
    * ``example_inputs``: a dict, tuple or tensor for ``model.forward``, or a function that returns one;
    * optionally ``calibration_batches``: a list, Dataset or DataLoader, or a function that returns or yields batches
      and is called again for every pass. An iterator (a generator object, ``zip``, ``map``) can be read only once, so
      its batches are kept in memory as they are first drawn, and later passes replay them;
    * optionally ``loss_fn(model, batch)``, which returns the loss of a calibration batch, for criteria that need
      gradients, and ``criterion``, an object of a criterion of one's own;
    * optionally ``evaluate(model)``, ``modalities`` (input name -> modality), ``regions`` (pattern -> region) and
      ``padding_mask`` (input name).

    A directory is a model saved by transformers' ``save_pretrained``; see ``mfcompile.frontends.huggingface``. A ``.pt2`` file
    is an archive of torch.export; see ``mfcompile.frontends.pt2``. An ``.onnx`` file is pruned itself.

    Args:
        path: the file or directory.
        weights: False builds the model of a directory on the meta device, for a plan.

    Raises:
        InputError: the path, or what was found there, cannot be used; says which, why, and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(_describe_missing(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(_describe_other_directory(path))
        from mfcompile.frontends.huggingface import load_huggingface

        return load_huggingface(path, weights=weights)
    if not weights:
        raise InputError(
            f"{path} is no Hugging Face directory, so it cannot be loaded without its weights. In a model.py, build the model "
            f"inside `with torch.device('meta'):` and the example inputs outside of it"
        )
    if path.suffix == ".pt2":
        from mfcompile.frontends.pt2 import load_pt2

        return load_pt2(path)
    if path.suffix == ".onnx":
        from mfcompile.frontends.onnx_source import load_onnx

        return load_onnx(path)
    if path.suffix != ".py":
        raise InputError(_describe_other_file(path))
    return _load_python(path)


def _describe_missing(path: Path) -> str:
    text = f"{path} does not exist (looked in {Path.cwd()}). "
    folder = path.parent
    if folder.is_dir():
        close = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=1)
        if close:
            return f"{text}Did you mean {folder / close[0]}?"
    if not path.is_absolute() and len(path.parts) == 2 and not path.suffix:
        text += f"If this is a name on the Hugging Face Hub, run `hf download {path} --local-dir DIR` and name DIR. "
    return text + _HELP


def _describe_other_directory(path: Path) -> str:
    if (path / "model.py").is_file():
        return f"{path} is a directory without config.json. It holds a model.py: name {path / 'model.py'}"
    if (path / "adapter_config.json").is_file():
        return (
            f"{path} is a directory without config.json: it holds an adapter (adapter_config.json), not a model. "
            f"Merge the adapter into its base model, save that with save_pretrained, and name its directory"
        )
    return f"{path} is a directory without config.json, so it is no Hugging Face model. {_HELP}"


def _describe_other_file(path: Path) -> str:
    if path.suffix in _PICKLED:
        return (
            f"{path} is a pickled file: loading it can run any code, so mfcompile does not. "
            f"Write a model.py that builds the model, loads its weights and defines `example_inputs`, and name that"
        )
    if path.suffix == ".safetensors" or path.name == "config.json":
        return f"{path} is only a part of a model. Name its directory, {path.parent}"
    return f"{path} is not a Python file. {_HELP}"


def _load_python(path: Path) -> ModelSource:
    user = UserModule(path)
    notes: list[str] = []
    model = _find_model(user, notes)
    example_inputs = _find_example_inputs(user)
    calibration = find_calibration(user, notes)
    if any(module.training for module in model.modules()):
        model.eval()
        notes.append("the model was in train mode and was set to eval(): dropout is off, batch norm is frozen")
    return ModelSource(
        model=model,
        example_inputs=example_inputs,
        path=path,
        kind="python",
        calibration=calibration,
        evaluate=_find_evaluate(user),
        loss_fn=_find_loss(user),
        criterion=user.namespace.get("criterion"),
        modalities=_find_names(user, "modalities", '{"pixel_values": "vision"}'),
        regions=_find_names(user, "regions", '{"re:.*adapter": "fusion"}'),
        padding_mask=_find_padding_mask(user),
        notes=tuple(notes),
    )


def _find_model(user: UserModule, notes: list[str]) -> nn.Module:
    names = user.namespace
    if "model" in names:
        where, model = "model", names["model"]
        if "build_model" in names:
            notes.append(f"{user.path.name} defines both model and build_model(): model was used")
    elif "build_model" in names:
        _check_callable(user, "build_model")
        where, model = "build_model()", user.run("calling build_model()", names["build_model"])
    else:
        raise InputError(_describe_no_model(user))
    if isinstance(model, torch.export.ExportedProgram):
        from mfcompile.frontends.program_module import program_module

        return program_module(model)
    if isinstance(model, nn.Module):
        return model
    problem = f"{where} in {user.path} is {_describe_value(model)}, not an nn.Module. "
    if inspect.isclass(model) and issubclass(model, nn.Module):
        advice = "Make an instance" + (f": model = {model.__name__}(...)" if where == "model" else " of it")
    elif where == "build_model()":
        advice = "Let build_model() return the model"
    elif inspect.isroutine(model):
        advice = "Call it (model = model()), or name it build_model"
    elif isinstance(model, Mapping):
        advice = "Weights alone cannot run: build the model, call model.load_state_dict(...), and assign it to model"
    else:
        advice = "Assign the torch module to model"
    raise InputError(problem + advice)


def _describe_no_model(user: UserModule) -> str:
    found = []
    for name, value in user.namespace.items():
        is_own = getattr(value, "__module__", None) == user.name
        if isinstance(value, nn.Module):
            found.append((0, f"{name} ({_describe_value(value)})", f"model = {name}"))
        elif inspect.isclass(value) and issubclass(value, nn.Module) and is_own:
            found.append((1, f"{name} ({_describe_value(value)})", f"model = {name}(...)"))
        elif inspect.isfunction(value) and is_own and any(word in name.lower() for word in ("model", "net", "build")):
            found.append((2, f"{name}() (a function)", f"build_model = {name}"))
    text = f"{user.path} defines neither model nor build_model(), so there is nothing to prune. "
    if not found:
        return text + "Add `model = ...`, an nn.Module, or a function build_model() that returns one"
    found.sort(key=lambda item: item[0])
    return f"{text}It does define {', '.join(item[1] for item in found[:8])}. Add `{found[0][2]}`"


def _find_example_inputs(user: UserModule) -> Any:
    value = user.namespace.get("example_inputs")
    if value is None:
        words = ("input", "example", "sample", "dummy", "batch")
        similar = [
            name
            for name, item in user.namespace.items()
            if any(word in name.lower() for word in words)
            and name not in ("example_inputs", "calibration_batches")
            and not (inspect.ismodule(item) or inspect.isclass(item))
        ]
        text = f"{user.path} defines no example_inputs, so the model cannot be run and captured. "
        if similar:
            text += f"It does define {', '.join(similar[:8])}. "
        raise InputError(
            text + "Add `example_inputs = {...}`, a dict of tensors whose keys are parameters of forward, "
            "or a function of that name that returns one"
        )
    if callable(value):
        _check_callable(user, "example_inputs")
        value = user.run("calling example_inputs()", value)
        if value is None:
            raise InputError(f"example_inputs() in {user.path} returned None. Let it return a dict of tensors")
    return value


def find_calibration(user: UserModule, notes: list[str]) -> Callable[[], Iterable[Any]] | None:
    """The calibration_batches of a Python file, read anew at every call; None where it defines none."""
    value = user.namespace.get("calibration_batches")
    if value is None:
        return None
    what = "calibration_batches"
    if callable(value) and not _is_iterable(value):
        _check_callable(user, what)
        doing = f"drawing from {what}()"
        return lambda: user.iterate(doing, lambda: _iterate(user, f"{what}()", value()))
    doing = f"drawing from {what}"
    if isinstance(value, Iterator):
        notes.append(
            f"{what} is an iterator ({type(value).__name__}), which can be read only once: its batches are kept in "
            f"memory after they are first drawn. A function or a DataLoader of that name would not need that"
        )
        replay = _Replay(value)
        return lambda: user.iterate(doing, lambda: iter(replay))
    _iterate(user, what, value, check_only=True)
    if isinstance(value, Sized):
        return lambda: _SizedBatches(lambda: user.iterate(doing, lambda: _iterate(user, what, value)), value)
    return lambda: user.iterate(doing, lambda: _iterate(user, what, value))


def _is_iterable(value: Any) -> bool:
    return not inspect.isclass(value) and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))


def _iterate(user: UserModule, what: str, value: Any, *, check_only: bool = False) -> Iterator[Any]:
    """``iter(value)``; a map-style Dataset, which has a length and no ``__iter__``, gives its items in order.

    Raises:
        InputError: the value is one batch, or nothing that holds batches.
    """
    if isinstance(value, (Tensor, Mapping, str, bytes)) or not _is_iterable(value):
        is_batch = isinstance(value, (Tensor, Mapping))
        advice = f"If it is one batch, write [{what}]" if is_batch else "Give a list or DataLoader of batches"
        raise InputError(
            f"{what} in {user.path} is {_describe_value(value)}, not an iterable of batches. {advice}, "
            f"or a function that yields them"
        )
    if check_only:
        return iter(())
    if hasattr(value, "__iter__"):
        return cast("Iterator[Any]", iter(value))
    return (value[index] for index in range(len(value)))


class _SizedBatches:
    """Batches that know their number, so that calibration can say how much is left."""

    def __init__(self, draw: Callable[[], Iterable[Any]], source: Sized) -> None:
        self._draw, self._source = draw, source

    def __iter__(self) -> Iterator[Any]:
        return iter(self._draw())

    def __len__(self) -> int:
        return len(self._source)


class _Replay:
    """An iterator made readable more than once: what has been drawn is kept."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._drawn: list[Any] = []
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        position = 0
        while True:
            if position == len(self._drawn):
                # A generator that raised is finished: without this, the next pass would end early in silence.
                if self._error is not None:
                    raise self._error
                try:
                    self._drawn.append(next(self._source))
                except StopIteration:
                    return
                except BaseException as error:
                    self._error = error
                    raise
            yield self._drawn[position]
            position += 1


def _find_evaluate(user: UserModule) -> Callable[[nn.Module], Any] | None:
    function = user.namespace.get("evaluate")
    if function is None:
        return None
    _check_callable(user, "evaluate", "model")
    return lambda model: user.run("calling evaluate(model)", function, model)


def _find_loss(user: UserModule) -> Callable[[Any, Any], Any] | None:
    function = user.namespace.get("loss_fn")
    if function is None:
        return None
    _check_callable(user, "loss_fn", "model", "batch")
    return lambda model, batch: user.run("calling loss_fn(model, batch)", function, model, batch)


def _find_names(user: UserModule, what: str, example: str) -> Mapping[str, str]:
    value = user.namespace.get(what)
    if value is None:
        return MappingProxyType({})
    if not isinstance(value, Mapping):
        raise InputError(f"{what} in {user.path} is {_describe_value(value)}, not a dict of strings. Write {example}")
    for key, item in value.items():
        if not (isinstance(key, str) and isinstance(item, str)):
            raise InputError(f"{what} in {user.path} maps {key!r} to {item!r}: both must be strings. Write {example}")
    return MappingProxyType(dict(value))


def _find_padding_mask(user: UserModule) -> str | None:
    value = user.namespace.get("padding_mask")
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"padding_mask in {user.path} is {_describe_value(value)}, not the name of an input. "
            f'Write padding_mask = "attention_mask"'
        )
    return value


def _check_callable(user: UserModule, name: str, *arguments: str) -> None:
    """The user's ``name`` can be called with these positional arguments."""
    function = user.namespace[name]
    call = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise InputError(f"{name} in {user.path} is {_describe_value(function)}, not a function. Define {call}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise InputError(
            f"{name}{signature} in {user.path} cannot be called as {call}: {error}. Define it so that it can"
        ) from error


def _describe_value(value: Any) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return "a function"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
