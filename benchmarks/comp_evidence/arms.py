"""The arms: what may go, by which scores, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VISION_TOKENS = "tokens:vision"
PARAMETERS = ("parameters:vision", "parameters:text", "parameters:fusion")
EVERY = (*PARAMETERS, VISION_TOKENS)
FLOPS = (0.7, 0.5, 0.35)
SEEDS = (0, 1, 2, 3, 4)
ONE_SHOT, RECOVERED, INSIDE = "one-shot", "recovered", "inside"
TUNINGS = (ONE_SHOT, RECOVERED, INSIDE)
"""No training; as many steps after the pruning; the same number of steps, in stages and after them."""


@dataclass(frozen=True)
class Arm:
    """One way of pruning.

    Attributes:
        name: of its files.
        title: of its rows.
        group: what it is there for: "joint", "single", "scores" or "floor".
        strategy, modes, scorer, token_scorer: as in ``mfcompile.CompOptions``.
    """

    name: str
    title: str
    group: str
    strategy: str = "probe"
    modes: tuple[str, ...] = EVERY
    scorer: str = "cip"
    token_scorer: str = "cit"

    def options(self, seed: int) -> dict[str, Any]:
        """For ``mfcompile.CompOptions``."""
        own = {"strategy": self.strategy, "modes": self.modes, "scorer": self.scorer, "token_scorer": self.token_scorer}
        return {**own, **SEARCH, "seed": seed}


SEARCH: dict[str, Any] = {
    "step": 0.05,
    "mode_step": 0.2,
    "outputs": ("image_embeds", "text_embeds", "itm_logits"),  # what retrieval reads
    "samples": 32,
}

_ROWS = (
    Arm("probe", "joint, probing", "joint"),
    Arm("comp", "joint, MPS (Eq. 8-10)", "joint", "comp"),
    Arm("fixed", "joint, fixed order", "joint", "fixed"),
    Arm("greedy", "joint, greedy (Eq. 8)", "joint", "greedy"),
    Arm("parameters", "parameters of all regions", "single", modes=PARAMETERS),
    Arm("vision-parameters", "parameters of vision alone", "single", modes=PARAMETERS[:1]),
    Arm("text-parameters", "parameters of text alone", "single", modes=PARAMETERS[1:2]),
    Arm("fusion-parameters", "parameters of fusion alone", "single", modes=PARAMETERS[2:]),
    Arm("vision-tokens", "vision tokens alone", "single", modes=(VISION_TOKENS,)),
    Arm("wanda-cit", "joint, Wanda + attention received", "scores", scorer="wanda"),
    Arm("wanda-cls", "joint, Wanda + CLS attention", "scores", scorer="wanda", token_scorer="cls_attention"),
    Arm("wanda-norm", "joint, Wanda + norm", "scores", scorer="wanda", token_scorer="norm"),
    Arm("wanda-random", "joint, Wanda + random tokens", "scores", scorer="wanda", token_scorer="random"),
    Arm("random", "joint, random units and tokens", "floor", scorer="random", token_scorer="random"),
)
ARMS = {arm.name: arm for arm in _ROWS}
JOINT, SINGLE, SCORES = (tuple(arm.name for arm in _ROWS if arm.group == kind) for kind in ("joint", "single", "scores"))
ORDERED = "fixed"
"""The arm that mode searches are compared with."""


def cim(tuning: str) -> str:
    """The arm with all of CoMP's scores, which single modes and independent scores are compared with."""
    return "comp" if tuning == INSIDE else "probe"


def arms_of(tuning: str) -> tuple[str, ...]:
    """The arms that differ: a stage that was trained cannot be taken back, so that probing would be another name for MPS."""
    return tuple(name for name in ARMS if tuning != INSIDE or name != cim(ONE_SHOT))


def trained_strategy(arm: Arm) -> str:
    """Of pruning inside fine-tuning, which takes no step back: Eq. 8 to 10 in the place of probing."""
    return "comp" if arm.strategy == "probe" else arm.strategy
