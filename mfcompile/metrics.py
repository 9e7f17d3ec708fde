"""The user's own ``evaluate``: how it is called, and what it may return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mfcompile.errors import InputError


def evaluated(evaluate: Callable[[Any], Any], module: nn.Module, what: str) -> dict[str, float]:
    """The metrics of a model, evaluated in eval mode without autograd; it gets its training mode back.

    Args:
        evaluate: takes the model, and returns a number or a mapping from metric names to numbers.
        module: the model.
        what: what messages call it ("dense", "pruned").

    Raises:
        InputError: ``evaluate`` failed, or returned something that is no metric.
    """
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            result = evaluate(module)
    except Exception as error:
        cause = first_cause(error)
        raise InputError(
            f"evaluate failed on the {what} model: {type(cause).__name__}: {cause}. "
            f"Correct it in model.py (--debug shows where), or pass --no-evaluate"
        ) from error
    finally:
        module.train(was_training)
    return read_metrics(result)


def read_metrics(result: Any) -> dict[str, float]:
    """What ``evaluate`` returned as metric -> number.

    Raises:
        InputError: it is neither a number nor a mapping from names to numbers.
    """
    named = result if isinstance(result, Mapping) else {"score": result}
    try:
        return {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"evaluate returned {type(result).__name__} {str(result)[:80]!r}: "
            f"it must return a number, or a dict from metric names to numbers"
        ) from error


def first_cause(error: BaseException) -> BaseException:
    """What went wrong first, below the explanations that were put around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
