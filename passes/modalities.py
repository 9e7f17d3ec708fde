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
from mfcompile.passes.operators import argument, operator_name
from mfcompile.region import InputModality

VISION, TEXT, AUDIO = "vision", "text", "audio"

# Words that an input's name is made of. Control words come first: `pixel_attention_mask` is a mask, not an image.
_CONTROL = re.compile(
    r"(mask|atts?|position_ids?|position_embeddings|token_type_ids?|segment_ids?|grid_thw|image_grid|sizes?|lengths?|"
    r"bbox|boxes|cache_position|use_cache|labels?|ratio|spatial_shapes|num_\w+|idx_\w+|\w+_idx|indices|cu_seqlens)(_\d+)?$"
)
_TEXT_IN_MASK_NAME = re.compile(r"^(input|token|text|caption|question|decoder_input)?_?ids_mask(ed)?$")
_TEXT = re.compile(r"(^|_)(input_ids?|inputs_embeds|text|texts|token_ids|tokens|caption|question|prompt|ids)(_|$)|_ids$")
_VISION = re.compile(r"(^|_)(pixel\w*|images?|imgs?|videos?|frames?|vision|visual\w*|picture)(_|$)")
_AUDIO = re.compile(r"(^|_)(input_features?|input_values|audios?|spectrograms?|waveforms?|mel|speech)(_|$)")


def infer_modalities(captured: CapturedGraph, overrides: Mapping[str, str] | None = None) -> tuple[InputModality, ...]:
    """Decide what every input is.

    Args:
        captured: any captured graph.
        overrides: input name -> modality, or "control" for an input that carries no content.

    Returns:
        One InputModality per input, in order, with the rule that decided.

    Raises:
        InputError: an override names no input.
        RegionError: an input is neither recognised nor overridden.
    """
    overrides = dict(overrides or {})
    names = [spec.name for spec in captured.inputs]
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise InputError(f"modalities: the model has no input {unknown[0]!r}; its inputs are {', '.join(names)}")
    tensors = captured.example_inputs.tensors()
    uses = {spec.name: table_rows(captured, spec) for spec in captured.inputs}
    return tuple(_decide(spec, tensors[spec.name], overrides, uses) for spec in captured.inputs)


def _decide(spec: InputSpec, tensor: Tensor, overrides: Mapping[str, str], uses: Mapping[str, int | None]) -> InputModality:
    if spec.name in overrides:
        given = overrides[spec.name]
        return InputModality(spec.name, None if given == "control" else given, "given by the user")
    if tensor.dtype == torch.bool:
        return InputModality(spec.name, None, "a bool tensor steers, it is no content")
    by_name = _by_name(spec.name.rpartition(".")[2].lower(), tensor)
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


def _by_structure(spec: InputSpec, tensor: Tensor, uses: Mapping[str, int | None]) -> tuple[str | None, str] | None:
    if tensor.is_floating_point():
        if tensor.ndim in (4, 5) and min(tensor.shape[1:3]) <= 4:
            return VISION, f"a {tensor.ndim}-D float tensor with few channels"
        if tensor.ndim <= 1:
            return None, "a float scalar or vector"
        return None if tensor.ndim != 2 or not _is_binary(tensor) else (None, "a 0/1 matrix")
    if tensor.ndim <= 1:
        return None, "an integer scalar or vector"
    rows = uses[spec.name]
    tables = [count for count in uses.values() if count is not None]
    if rows is not None and rows == max(tables) and rows > 2:
        return TEXT, f"integers that look up a table of {rows} rows, the largest of this model"
    if rows is not None:
        return None, f"integers that look up a small table of {rows} rows (types or positions)"
    if _is_binary(tensor):
        return None, "a 0/1 matrix that looks nothing up"
    return None


def _is_binary(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def table_rows(captured: CapturedGraph, spec: InputSpec) -> int | None:
    """Rows of the largest table that an integer input looks up directly, None when it looks nothing up."""
    if spec.dtype.is_floating_point or spec.dtype == torch.bool:
        return None
    reached: set[fx.Node] = {captured.node(spec.node)}
    rows: int | None = None
    for node in captured.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in reached]
        if not sources:
            continue
        if operator_name(node) in {"embedding", "index_select"}:
            table = argument(node, "weight", 0) if operator_name(node) == "embedding" else argument(node, "self", 0)
            index = argument(node, "indices", 1) if operator_name(node) == "embedding" else argument(node, "index", 2)
            if index in reached and table not in reached:
                rows = max(rows or 0, int(table.meta["val"].shape[0]))
        elif _stays_integer(node):
            reached.add(node)
    return rows


def _stays_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    dtype = getattr(value, "dtype", None)
    return dtype is not None and not dtype.is_floating_point and dtype != torch.bool
