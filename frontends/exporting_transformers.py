"""transformers' own preparation for export, behind our interface.

``transformers.exporters`` knows how to trace packed vision attention, masks and caches of its models. It is young and
moves: it is imported when it is needed, and whatever is missing or raises is a reason to take the next way.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mfcompile.errors import CaptureError
from mfcompile.frontends.traceable import Traceable
from mfcompile.inputs import ExampleInputs


@contextlib.contextmanager
def prepared_model(module: nn.Module, inputs: ExampleInputs) -> Iterator[Traceable]:
    """Trace a transformers model with that library's patches in force; they are gone afterwards.

    What the model computes on the host (position ids, window indices, lengths of sequences) is computed beforehand and
    given to forward as constants: the program takes the inputs that the user's model takes.

    Args:
        module: a module of our own; its forward is replaced.
        inputs: what it is traced with.

    Yields:
        The module, and what was fixed.

    Raises:
        CaptureError: the module is no transformers model, or the library has no such exporters.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(module, library.PreTrainedModel):
        raise CaptureError("the model is not one of transformers")
    try:
        from transformers.exporters import exporter_dynamo, exporter_onnx, utils
    except ImportError as error:
        raise CaptureError(f"this transformers has no exporters: {error}") from error
    given = _keywords(module, inputs)
    wanted: Any = dict(given)
    if wanted.get("position_ids") is None:
        wanted.update(_position_ids(module, wanted))
    prepared: Any
    prepared, wanted, flags = utils.prepare_for_export(module, wanted)
    baked = {name: value for name, value in wanted.items() if not _is_same(given.get(name), value)}
    del exporter_onnx  # importing it registers its patches
    forward = prepared.forward
    signature = inspect.signature(forward)

    def with_constants(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        arguments = {key: value for key, value in _flat(bound, signature).items() if key in wanted}
        return forward(**{**arguments, **baked})

    with_constants.__signature__ = signature  # type: ignore[attr-defined]
    with (
        torch.no_grad(),
        utils.apply_patches("dynamo"),
        utils.apply_patches("onnx"),
        exporter_dynamo.reset_model_state(prepared),
        exporter_dynamo.patch_model_config(prepared, flags),
    ):
        prepared.forward = with_constants
        try:
            yield Traceable(prepared, _notes(baked))
        finally:
            prepared.forward = forward


def _position_ids(module: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """Positions by the model's own rule for several axes, wherever in the model that rule is."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return {}
    for item in module.modules():
        rule = getattr(item, "get_rope_index", None)
        if callable(rule):
            names = set(inspect.signature(rule).parameters)
            with torch.no_grad():
                positions, *_ = rule(**{name: value for name, value in given.items() if name in names})
            return {"position_ids": positions}
    return {}


def _keywords(module: nn.Module, inputs: ExampleInputs) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    return _flat(signature.bind(*inputs.args, **inputs.kwargs), signature)


def _flat(bound: inspect.BoundArguments, signature: inspect.Signature) -> dict[str, Any]:
    """Every argument by its name; those that ``**kwargs`` takes too."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(f"forward takes *{name}, which cannot be named")
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return found


def _is_same(given: Any, prepared: Any) -> bool:
    if isinstance(given, Tensor) and isinstance(prepared, Tensor):
        return given.shape == prepared.shape and given.dtype == prepared.dtype and torch.equal(given, prepared)
    return given is prepared


def _notes(baked: dict[str, Any]) -> tuple[str, ...]:
    if not baked:
        return ()
    return (
        f"{', '.join(baked)}: computed beforehand from the example and fixed in the file, which is right for inputs that "
        f"give the same (images of the same sizes, placeholders and padding in the same places)",
    )
