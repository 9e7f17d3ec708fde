"""What each input of a model is: an image, text, audio, or control (masks, positions, sizes).

A modality set by the user wins; then the input's name, where the field has a settled word for it; then dtype, rank
and use. An input that none of these decides is an error, since a wrong guess would paint whole towers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from mfcompile.errors import InputError, RegionError
from mfcompile.graph import CapturedGraph, InputSpec
from mfcompile.passes.labels import flow_labels
from mfcompile.passes.operators import CONTENT_FREE, argument, operator_name
from mfcompile.region import InputModality

VISION, TEXT, AUDIO = "vision", "text", "audio"

_FEW_TYPES = 4
"""A table of so few rows holds types of tokens, not words."""

# Words that an input's name is made of. Control words come first: `pixel_attention_mask` is a mask, not an image.
_CONTROL = re.compile(
    r"(mask|atts?|position_ids?|position_embeddings|token_type_ids?|segment_ids?|grid_t?hw|image_grids?|sizes?|lengths?|"
    r"bbox|boxes|pos|positions?|use_cache|labels?|ratio|spatial_shapes|num_\w+|idx_\w+|\w+_idx|indices|cu_seqlens)(_\d+)?$"
)
_TEXT_IN_MASK_NAME = re.compile(r"^(input|token|text|caption|question|decoder_input)?_?ids_mask(ed)?$")
_TEXT = re.compile(
    r"(^|_)(input_ids?|inputs_embeds|texts?|txts?|token_ids|tokens|captions?|questions?|sentences?|prompts?|ids)(_|$)|_ids$"
)
_VISION = re.compile(r"(^|_)(pixel\w*|images?|imgs?|videos?|frames?|vision|visual\w*|pictures?|photos?|patches)(_|$)")
_AUDIO = re.compile(r"(^|_)(input_features?|input_values|audios?|spectrograms?|waveforms?|mel|speech)(_|$)")


def infer_modalities(captured: CapturedGraph, overrides: Mapping[str, str] | None = None) -> tuple[InputModality, ...]:
    """Decide what every input is.

    Args:
        captured: any captured graph.
        overrides: input name -> modality, or "control" for an input that carries no content. The name of a nested
            input ("images") stands for everything in it ("images.0"), unless that has an entry of its own.

    Returns:
        One InputModality per input, in order, with the rule that decided.

    Raises:
        InputError: an override names no input.
        RegionError: an input is neither recognised nor overridden.
    """
    overrides = dict(overrides or {})
    names = [spec.name for spec in captured.inputs]
    for given in overrides:
        if not any(name == given or name.startswith(f"{given}.") for name in names):
            raise InputError(f"modalities: the model has no input {given!r}; its inputs are {', '.join(names)}")
    tensors = captured.example_inputs.tensors()
    uses = table_rows(captured)
    return tuple(_decide(spec, tensors[spec.name], overrides, uses) for spec in captured.inputs)


def _decide(spec: InputSpec, tensor: Tensor, overrides: Mapping[str, str], uses: Mapping[str, int]) -> InputModality:
    given = next((overrides[name] for name in _with_parents(spec.name) if name in overrides), None)
    if given is not None:
        return InputModality(spec.name, None if given == "control" else given, "given by the user")
    if tensor.dtype == torch.bool:
        return InputModality(spec.name, None, "a bool tensor steers, it is no content")
    name = _own_name(spec.name)
    by_name = _by_name(name, tensor)
    if by_name is not None and by_name[0] is None and name.endswith("labels"):
        # Teacher forcing: a model that shifts its labels and embeds them reads them as text.
        rows = uses.get(spec.name, 0)
        if rows and rows == max(uses.values()):
            return InputModality(spec.name, TEXT, f"labels that look up a table of {rows} rows, the largest of this model")
    if by_name is not None and by_name[0] == TEXT and tensor.ndim <= 1 and spec.name not in uses:
        return InputModality(spec.name, None, "one number for each sample, which looks nothing up: it steers")
    if by_name is not None:
        return InputModality(spec.name, by_name[0], by_name[1])
    by_shape = _by_structure(spec, tensor, uses)
    if by_shape is not None:
        return InputModality(spec.name, by_shape[0], by_shape[1])
    raise RegionError(
        f"the input {spec.name!r} ({tuple(spec.shape)}, {spec.dtype}) has no modality: neither its name nor its dtype and "
        f"rank tell what it holds. Say so with modalities={{{spec.name!r}: 'vision'}} (--modality {spec.name}=vision), "
        f"any other modality, or 'control' when it carries no content"
    )


def _with_parents(name: str) -> list[str]:
    """The input's name, then the names of what it is nested in, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _own_name(name: str) -> str:
    """The innermost part of an input's name that is no position in a list ("images" of "images.0"), in lower case."""
    parts = [part for part in name.lower().split(".") if not part.isdigit()]
    return parts[-1] if parts else name.lower()


def _by_name(name: str, tensor: Tensor) -> tuple[str | None, str] | None:
    if _TEXT_IN_MASK_NAME.search(name) and not tensor.is_floating_point():
        if int(tensor.max()) > 1:
            return TEXT, "token ids with masked places, by name and values"
        return None, "a mask, by name and values"
    if _CONTROL.search(name):
        return None, "control, by name"
    if _VISION.search(name) and tensor.ndim >= 2:
        return VISION, "an image, by name"
    if _AUDIO.search(name):
        return AUDIO, "audio, by name"
    if _TEXT.search(name):
        if not tensor.is_floating_point() and tensor.ndim >= 2 and _is_binary(tensor) and name not in {"input_ids", "ids"}:
            return None
        return TEXT, "text, by name"
    return None


def _by_structure(spec: InputSpec, tensor: Tensor, uses: Mapping[str, int]) -> tuple[str | None, str] | None:
    if tensor.is_floating_point() or tensor.dtype == torch.uint8:
        if tensor.ndim >= 2 and _is_two_valued(tensor):
            return None, "two values only: a mask"
        if tensor.ndim in (4, 5) and (min(tensor.shape[1:3]) <= 4 or tensor.shape[-1] in (1, 3, 4)):
            return VISION, f"a {tensor.ndim}-D tensor of numbers with few channels"
    if tensor.ndim <= 1:
        return None, "a scalar or vector"
    if tensor.is_floating_point():
        return None
    rows = uses.get(spec.name)
    if rows is None:
        return (None, "a 0/1 matrix that looks nothing up") if _is_binary(tensor) else None
    if rows == max(uses.values()) and rows > 2:
        return TEXT, f"integers that look up a table of {rows} rows, the largest of this model"
    if rows <= _FEW_TYPES or _counts_up(tensor):
        return None, f"integers that look up a small table of {rows} rows (types or positions)"
    return TEXT, f"integers that look up a table of {rows} rows, in no order"


def _counts_up(tensor: Tensor) -> bool:
    """Along every row the next number is the same or one more: positions."""
    steps = tensor.long().diff(dim=-1)
    return bool(((steps == 0) | (steps == 1)).all())


def _is_two_valued(tensor: Tensor) -> bool:
    return int(torch.unique(tensor).numel()) <= 2


def _is_binary(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def table_rows(captured: CapturedGraph) -> dict[str, int]:
    """Input name -> rows of the largest table that it looks up; inputs of integers that look up none are left out.

    Numbers that are computed from an input (positions counted from a mask) are not the input any more.
    """
    integers = [spec for spec in captured.inputs if not spec.dtype.is_floating_point and spec.dtype != torch.bool]
    flow = flow_labels(captured, {spec.name: frozenset({spec.name}) for spec in integers}, _stays_index)
    found: dict[str, int] = {}
    for node in captured.graph.nodes:
        if operator_name(node) == "embedding":
            table, index = argument(node, "weight", 0), argument(node, "indices", 1)
        elif operator_name(node) == "index_select":
            table, index = argument(node, "self", 0), argument(node, "index", 2)
        elif operator_name(node) in {"index", "_unsafe_index"}:
            table, index = argument(node, "self", 0), next((item for item in argument(node, "indices", 1) if item), None)
        else:
            continue
        if isinstance(index, fx.Node) and isinstance(table, fx.Node) and table.op == "get_attr":
            for name in flow.at(index, node):
                found[name] = max(found.get(name, 0), int(table.meta["val"].shape[0]))
    return found


_COMPUTES = frozenset({"cumsum", "cumprod", "mul", "mul_", "sum", "argmax", "argmin", "argsort", "sort", "bitwise_and"})
"""Operators after which integers are no more the indices that were given."""


def _stays_index(node: fx.Node) -> bool:
    value = node.meta.get("val")
    dtype = getattr(value, "dtype", None)
    is_integer = dtype is not None and not dtype.is_floating_point and dtype != torch.bool
    return is_integer and operator_name(node) not in _COMPUTES and operator_name(node) not in CONTENT_FREE
