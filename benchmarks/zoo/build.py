"""A row of the table becomes a tiny model and its inputs, with no download."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.zoo.row import DROP, VOCABULARY, Row

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "projection_dim", "projection_size",
                     "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 40),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "num_encoder_layers"), 2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
"""Sizes that a default configuration is shrunk to, by the key; a row overrides what does not fit."""

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it says of configurations half made tiny is noise

DERIVED = frozenset(
    {
        "layer_types",
        "mlp_layer_types",
        "per_layer_config",
        "transformers_version",
        "_name_or_path",
        "architectures",
        "torch_dtype",
    }
)
"""Keys whose length follows from the sizes: dropped, so that the configuration class derives them again."""


def build(row: Row, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny model of a row in eval mode with random weights, and its inputs.

    Args:
        row: of the table.
        seed: of weights and inputs.

    Raises:
        Exception: whatever transformers raises for a class that it cannot build.
    """
    model_class = getattr(transformers, row.name)
    config_class = getattr(transformers, row.config_class) if row.config_class else model_class.config_class
    config = config_class(**row.config) if row.plain_config else tiny_config(config_class, row.config)
    torch.manual_seed(seed)
    module: nn.Module = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    return module, {name: spec.make(generator) for name, spec in row.inputs.items()}


def tiny_config(config_class: Any, overrides: Mapping[str, Any]) -> Any:
    """The default configuration with its sizes shrunk, nested ones too, and ``overrides`` laid over it.

    A nested configuration whose override names another ``model_type`` starts from that type's defaults; one that names a
    ``config_class`` becomes an object of that class, for places that take an object of any class but read a mapping as theirs.

    Args:
        config_class: a configuration class of transformers.
        overrides: key -> value; mappings go into nested configurations, DROP leaves a key out.
    """
    return config_class(**_lay_over(_shrunk(config_class().to_dict()), overrides))


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in DERIVED:
            continue
        if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
            found[key] = _shrunk(value)
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[key] = SIZES[key]
        else:
            found[key] = value
    return found


def _lay_over(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(values)
    for key, value in overrides.items():
        if value is DROP or (isinstance(value, str) and value == DROP):
            found.pop(key, None)
        elif isinstance(value, Mapping) and "config_class" in value:
            others = {name: item for name, item in value.items() if name != "config_class"}
            found[key] = tiny_config(getattr(transformers, value["config_class"]), others)
        elif isinstance(value, Mapping):
            base = found.get(key)
            base = base if isinstance(base, dict) else {}
            kind = value.get("model_type")
            if kind is not None and kind != base.get("model_type"):
                base = _shrunk(transformers.CONFIG_MAPPING[kind]().to_dict())
            found[key] = _lay_over(base, value)
        else:
            found[key] = value
    return found
