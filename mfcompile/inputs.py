"""Example inputs and calibration batches in the one form that the rest of the compiler uses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfcompile.errors import InputError


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of one forward call.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments; None values are passed on, but are no graph inputs.
        names: name of each tensor in ``args`` and ``kwargs``, in flattening order.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, in flattening order."""
        leaves = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return dict(zip(self.names, leaves, strict=True))

    def map_tensors(self, change: Callable[[str, Tensor], Tensor]) -> ExampleInputs:
        """A copy in which every tensor is replaced by ``change(name, tensor)``."""
        names = iter(self.names)

        def replace(leaf: Any) -> Any:
            return change(next(names), leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(replace, (self.args, self.kwargs))
        return ExampleInputs(args, kwargs, self.names)

    def call(self, module: Callable[..., Any]) -> Any:
        """``module(*args, **kwargs)``."""
        return module(*self.args, **self.kwargs)

    def batch_size(self) -> int | None:
        """Size of dimension 0 when every tensor input that has one agrees on it, else None."""
        sizes = {tensor.shape[0] for tensor in self.tensors().values() if tensor.ndim > 0}
        return sizes.pop() if len(sizes) == 1 else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def normalize_inputs(module: nn.Module, inputs: Any, *, what: str = "example_inputs") -> ExampleInputs:
    """Bring what a user hands over into an ExampleInputs for ``module.forward``.

    A tensor or a tuple (list) is positional; a mapping (dict, BatchEncoding) is keyword arguments, or the single
    positional argument when ``forward`` does not take its keys but takes one argument (and perhaps flags).

    Args:
        module: the model whose forward will receive the inputs.
        inputs: a tensor, a tuple or list, or a mapping; containers may nest and may hold None.
        what: how error messages call the inputs.

    Raises:
        InputError: the inputs hold no tensor, or do not fit the signature of ``forward``.
    """
    if isinstance(inputs, ExampleInputs):
        return inputs
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(inputs, Tensor):
        args, kwargs = (inputs,), {}
    elif isinstance(inputs, Mapping):
        plain = {str(key): _plain(value) for key, value in inputs.items()}
        if _accepts(module, (), plain) is None:
            args, kwargs = (), plain
        elif _takes_one_argument(module) and not _parameter_names(module) & set(plain):
            args, kwargs = (plain,), {}
        else:
            args, kwargs = (), plain
    elif isinstance(inputs, (tuple, list)):
        args, kwargs = tuple(_plain(value) for value in inputs), {}
    else:
        raise InputError(
            f"{what} is a {type(inputs).__name__}: give a tensor, a tuple of tensors, or a dict of keyword arguments"
        )
    problem = _accepts(module, args, kwargs)
    if problem is not None:
        raise InputError(
            f"{what} does not fit {type(module).__name__}.forward{inspect.signature(module.forward)}: {problem}. "
            f"Pass a dict whose keys are parameters of forward, or a tuple in their order"
        )
    names = _tensor_names(module, args, kwargs)
    if not names:
        raise InputError(f"{what} holds no tensor: {type(module).__name__} needs at least one tensor input to be captured")
    return ExampleInputs(args, kwargs, names)


def _plain(value: Any) -> Any:
    """Mappings become dicts, so that pytree flattens BatchEncoding and its like; the rest stays."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _accepts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """None when ``forward`` can be called this way, else why it cannot."""
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def _takes_one_argument(module: nn.Module) -> bool:
    """``forward`` takes one argument; what else it takes has defaults other than None, and is no further input."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    return bool(plain) and all(item.default is not None and item.default is not item.empty for item in plain[1:])


def _parameter_names(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _tensor_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(module.forward).parameters.values())
    listed = [item.name for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
    rest = next((item.name for item in parameters if item.kind is item.VAR_POSITIONAL), "")
    positional = [listed[index] if index < len(listed) else f"{rest}_{index}" for index in range(len(args))]
    flat, _ = pytree.tree_flatten_with_path((args, kwargs))
    names: list[str] = []
    for path, leaf in flat:
        if not isinstance(leaf, Tensor):
            continue
        is_keyword = _key_text(path[0]) == "1"
        root = _key_text(path[1]) if is_keyword else positional[int(_key_text(path[1]))]
        names.append(".".join([root, *(_key_text(key) for key in path[2:])]))
    return tuple(names)


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def output_tensors(output: Any) -> dict[str, Tensor]:
    """Name -> tensor for every tensor in a model's output, in flattening order.

    Mappings (ModelOutput among them) give their keys, named tuples and dataclasses their fields, plain tuples
    ``output_0``, ...
    """
    found: dict[str, Tensor] = {}
    has_names = isinstance(output, Mapping) and all(isinstance(key, str) for key in output)  # "613" is a name, 613 a place

    def visit(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Tensor):
            is_named = bool(path) and (has_names or not path[0].isdigit())
            found[".".join(path) if is_named else "_".join(("output", *(path or ("0",))))] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(item, (*path, str(key)))
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            for key, item in zip(value._fields, value, strict=True):
                visit(item, (*path, str(key)))
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name), (*path, field.name))
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(item, (*path, str(index)))

    visit(output, ())
    return found


def slice_batch(inputs: ExampleInputs, rows: list[int]) -> ExampleInputs:
    """The same inputs with the given samples of dimension 0, in that order; rows may repeat.

    Raises:
        InputError: the tensors do not share one batch dimension.
    """
    if inputs.batch_size() is None:
        raise InputError("the inputs share no batch dimension (dimension 0 differs between tensors): they cannot be re-batched")
    return inputs.map_tensors(lambda _, tensor: tensor[torch.tensor(rows)] if tensor.ndim else tensor)


def as_function(
    batches: Iterable[Any] | Callable[[], Iterable[Any]], num_samples: int | None = None
) -> Callable[[], Iterable[Any]]:
    """A function that gives the batches from the start at every call.

    Args:
        batches: such a function, or an iterable; an iterator can be read only once, so its batches are kept.
        num_samples: stop after the batch that reaches this many samples; None gives all.
    """
    if callable(batches) and not isinstance(batches, Iterable):
        make = batches
        return make if num_samples is None else lambda: _first_samples(make(), num_samples)
    assert isinstance(batches, Iterable)
    if isinstance(batches, Iterator):
        kept = list(batches if num_samples is None else _first_samples(batches, num_samples))
        return lambda: kept
    given: Iterable[Any] = batches
    return lambda: given if num_samples is None else _first_samples(given, num_samples)


def _first_samples(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Batches up to the one that reaches ``count`` samples; the size of a batch is that of its first tensor that has one."""
    seen = 0
    for batch in batches:
        yield batch
        leaves = pytree.tree_leaves(_plain(batch))
        seen += next((int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)
        if seen >= count:
            return


def as_batch(inputs: ExampleInputs) -> Any:
    """Example inputs in the form in which users give a batch: a mapping, a tensor or a tuple."""
    if not inputs.args:
        return dict(inputs.kwargs)
    return inputs.args[0] if len(inputs.args) == 1 and not inputs.kwargs else inputs.args
