"""What torch.export is given in place of the user's module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mfcompile.inputs import ExampleInputs


def _admit_all(_: ExampleInputs) -> bool:
    return True


@dataclass(frozen=True)
class Traceable:
    """A module to trace, and what it is good for.

    Attributes:
        module: it computes what the user's module computes, over the same parameters under the same names.
        notes: what was fixed in it.
        admits: whether inputs are among those that it is right for; may raise what the user's module raises.
    """

    module: nn.Module
    notes: tuple[str, ...] = ()
    admits: Callable[[ExampleInputs], bool] = _admit_all
