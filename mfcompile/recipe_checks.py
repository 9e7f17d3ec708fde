"""Which values the options of a recipe can have, and why others are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FORMATS = ("packed", "dense", "onnx-sparse")
VALUES = ("fp32", "fp16", "int8")
SPLITS = ("regions",)
ROUNDINGS = ("exact", "official")
PRECISIONS = ("model", "float64")
WEIGHTINGS = ("none", "cip")
"""How calibration weighs tokens: all alike, or by their importance (Eq. 4 of CoMP, CVPR 2026)."""
TOKEN_REST = ("drop", "merge")
TOKEN_RESTORE = ("zeros", "last")
TOKEN_OUTPUTS = ("restore", "shorter")
UPDATES = ("sparsegpt", "least-squares", "gradual")


def sparsity_problem(value: Any) -> str | None:
    """Why a value cannot be a sparsity, or a sparsity per region; None when it can."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        problems = (fraction_problem(item) for item in value.values())
        return next((problem for problem in problems if problem), None if value else "it names no region")
    return fraction_problem(value)


def fraction_problem(value: Any) -> str | None:
    """Why a value cannot be a fraction of weights; None when it can."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{value!r} is not a number. Give the fraction of weights to remove, such as 0.63"
    if 0 <= value < 1:
        return None
    if 1 < value < 100:
        return f"{value:g} is not in [0, 1): it is the fraction of weights to remove. Did you mean {value / 100:g}?"
    return f"{value:g} is not in [0, 1): it is the fraction of weights to remove, such as 0.63"


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if value in choices else f"{value!r} is none of {', '.join(choices)}"

    return check


def _is_pattern_list(value: Any) -> str | None:
    is_list = isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)
    return None if is_list else f"{value!r} is not a list of patterns"


def _is_optional_pattern_list(value: Any) -> str | None:
    return None if value is None else _is_pattern_list(value)


def _is_string_map(value: Any) -> str | None:
    is_map = isinstance(value, Mapping) and all(isinstance(item, str) for pair in value.items() for item in pair)
    return None if is_map else f"{value!r} is not a mapping from names to names"


def _is_option_map(value: Any) -> str | None:
    is_map = isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, (str, int, float, bool)) for key, item in value.items()
    )
    return None if is_map else f"{value!r} is not a mapping from names to plain values"


def _flops_problem(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        return f"{value!r} is not in (0, 1]: it is the share of the dense FLOPs that stays, such as 0.5"
    return None


def _allocation_problem(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return None
    is_map = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return sparsity_problem(value) if is_map else f"{value!r} is neither the name of an allocation nor a mapping"


def _tokens_problem(value: Any) -> str | None:
    if value is None:
        return None
    kept = list(value.values()) if isinstance(value, Mapping) else [value]
    is_map = not isinstance(value, Mapping) or (bool(value) and all(isinstance(key, str) for key in value))
    is_keep = all(isinstance(item, (int, float)) and not isinstance(item, bool) and item > 0 for item in kept)
    if is_map and is_keep:
        return None
    return f"{value!r} is no share (0.7) and no number of tokens (64), and no mapping of places to them"


def _is_flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"{value!r} is neither true nor false"


def _is_load_budget(value: Any) -> str | None:
    is_budget = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1)
    return None if is_budget else f"{value!r} is not a number of at least 1"


def _is_string(value: Any) -> str | None:
    return None if isinstance(value, str) else f"{value!r} is not a string"


def _is_optional_string(value: Any) -> str | None:
    return None if value is None else _is_string(value)


def _is_seed(value: Any) -> str | None:
    is_integer = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if is_integer else f"{value!r} is not a whole number of at least 0"


def _is_sample_count(value: Any) -> str | None:
    is_count = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
    return None if is_count else f"{value!r} is not a whole number of at least 1"


CHECKS: dict[str, Callable[[Any], str | None]] = {
    "sparsity": sparsity_problem,
    "criterion": _is_optional_string,
    "criterion_options": _is_option_map,
    "allocation": _allocation_problem,
    "pattern": _is_string,
    "update": lambda value: None if value is None else _one_of(UPDATES)(value),
    "update_options": _is_option_map,
    "rounding": _one_of(ROUNDINGS),
    "seed": _is_seed,
    "targets": _is_optional_pattern_list,
    "ignore": _is_pattern_list,
    "regions": _is_string_map,
    "modalities": _is_string_map,
    "padding_mask": _is_optional_string,
    "num_calibration_samples": _is_sample_count,
    "precision": _one_of(PRECISIONS),
    "weighting": _one_of(WEIGHTINGS),
    "tokens": _tokens_problem,
    "token_scorer": _is_string,
    "token_rest": _one_of(TOKEN_REST),
    "token_restore": _one_of(TOKEN_RESTORE),
    "token_outputs": _one_of(TOKEN_OUTPUTS),
    "method": _is_optional_string,
    "flops": _flops_problem,
    "method_options": _is_option_map,
    "onnx": _is_flag,
    "format": _one_of(FORMATS),
    "values": _one_of(VALUES),
    "inline": _is_flag,
    "external_data": lambda value: None if value is None else _is_flag(value),
    "load_budget": _is_load_budget,
    "split": lambda value: None if value is None else _one_of(SPLITS)(value),
    "evaluate": _is_flag,
    "digest": _is_string,
    "fingerprint": _is_string,
    "versions": _is_string_map,
}
"""Option -> why a value cannot be its; None where it can."""
