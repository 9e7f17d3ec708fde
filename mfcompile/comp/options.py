"""The options of joint pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mfcompile.comp.loss import LOSSES
from mfcompile.errors import InputError

COSTS = ("flops", "latency")
"""What a stage's loss is divided by: FLOPs that it saves, or seconds in onnxruntime that it saves on this machine."""

EVALUATE = "evaluate"
"""The loss of a search that asks the user's own measure."""


@dataclass(frozen=True)
class CompOptions:
    """How a model is pruned jointly. Numbers with a symbol are those of CoMP (CVPR 2026).

    Attributes:
        strategy: how the mode of a stage is chosen: "probe" (a step of every mode is tried, the cheapest taken), "comp" (Eq. 8
            to 10), "fixed" (in turn), "greedy" (Eq. 8 alone).
        cost: one of ``COSTS``.
        step: FLOPs that a stage saves, as a share of the dense model's.
        mode_step: at most this share of what a mode has left goes in one stage, however little that saves: a step of one
            size for all would be most of a small region.
        modes: names of the modes to use; None for all but tokens of text.
        order: modes in the order of "fixed", and of first visits.
        caps: mode -> how much of every unit, or of the tokens of every site, may go; 1.0 where it is not named: all but one.
        scorer: what scores units: "cip" (Eq. 4), "wanda" (Eq. 3), "magnitude", "random".
        token_scorer, rest, restore: how tokens are cut; see ``mfcompile.prune_tokens``.
        at: depths of the cuts among the sites of a mode.
        loss: "cos" or "kl", what outputs are compared by, or "evaluate" for the user's measure.
        outputs: names of the outputs that are compared; None for all.
        samples: about how many calibration samples are run for every step that is tried; None for all.
        refit: after the search, give output weights of units that lost elements the values, by least squares on all
            calibration samples, with which those that stay stand in for them; see ``mfcompile.remove_units``.
        exploration, temperature, memory, horizon: rho, tau, lambda_0 and I_max of "comp".
        tolerance: how far from the target the end may be, as a share of it.
        seed: of exploration, and of what a model draws.
    """

    strategy: str = "probe"
    cost: str = "flops"
    step: float = 0.05
    mode_step: float = 0.2
    modes: tuple[str, ...] | None = None
    order: tuple[str, ...] | None = None
    caps: Mapping[str, float] = field(default_factory=dict)
    scorer: str = "cip"
    token_scorer: str = "cit"
    rest: str = "drop"
    restore: str = "zeros"
    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    loss: str = "cos"
    outputs: tuple[str, ...] | None = None
    samples: int | None = 64
    refit: bool = False
    exploration: float = 0.2
    temperature: float = 5.0
    memory: float = 0.4
    horizon: int = 5
    tolerance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("cost", self.cost, COSTS), ("loss", self.loss, (*LOSSES, EVALUATE))):
            if value not in known:
                raise InputError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")
        if not isinstance(self.caps, Mapping):
            raise InputError(f"caps={self.caps!r}: give a mapping from modes to the share that may go")
        if self.samples is not None and (
            isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1
        ):
            raise InputError(f"samples={self.samples!r} must be a positive integer or None")
        if not isinstance(self.refit, bool):
            raise InputError(f"refit={self.refit!r} is neither true nor false")
        if isinstance(self.mode_step, bool) or not isinstance(self.mode_step, (int, float)) or not 0 < self.mode_step <= 1:
            raise InputError(f"mode_step={self.mode_step!r} is not in (0, 1]: it is the share of a mode that goes in a stage")
        for mode, share in self.caps.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise InputError(f"caps[{mode!r}] is {share!r}: give the share that may go, from 0 to 1")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> CompOptions:
        """Options by their names.

        Raises:
            InputError: there is none of that name, or it cannot have its value.
        """
        known = [item.name for item in fields(cls)]
        odd = next((name for name in options if name not in known), None)
        if odd is not None:
            raise InputError(f"joint pruning has no option {odd!r}; it has {', '.join(known)}")
        read = {**dict.fromkeys(("modes", "order", "outputs"), _names), "at": _depths, "caps": _shares}
        return cls(**{name: read[name](value) if name in read else value for name, value in options.items()})


def _names(value: Any) -> Any:
    """Several names, or one, as a tuple; "a,b" of a command line too."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, Sequence) else value


def _depths(value: Any) -> Any:
    """Several numbers, or one, as a tuple; "0.25,0.5" too."""
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else (value,)
    try:
        return tuple(float(part) for part in given)
    except (TypeError, ValueError) as error:
        raise InputError(f"at={value!r}: give depths between 0 and 1, such as 0.25,0.5,0.75") from error


def _shares(value: Any) -> Any:
    """Mode -> share; "tokens:vision=0.5,parameters:text=0" too."""
    if not isinstance(value, str):
        return value
    try:
        return {mode.strip(): float(share) for mode, _, share in (part.rpartition("=") for part in value.split(","))}
    except ValueError as error:
        raise InputError(f"caps={value!r}: give MODE=SHARE,MODE=SHARE") from error
